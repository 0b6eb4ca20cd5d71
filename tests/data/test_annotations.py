import json

import pytest
import torch

from tests.helpers import encoded_image
from vico_pl.data.annotations import build_from_annotations
from vico_pl.data.decode import read_image
from vico_pl.data.inspect import find_faults, read_samples
from vico_pl.data.shards import RecordReader

# Shards are written by several processes at once, as users have it.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.png").write_bytes(encoded_image("PNG", size=(40, 30), seed=1))
    (folder / "deep" / "b.JPG").write_bytes(encoded_image(size=(20, 50), seed=2))
    (folder / "note.txt").write_text("no image")
    (tmp_path / "secret.png").write_bytes(encoded_image("PNG"))
    return folder


def line(*, text="<image>\nWhat?", answer="a cat", **fields):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return json.dumps({"conversations": turns, **fields})


def build(tmp_path, images, *lines, samples_per_shard=2):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return build_from_annotations(path, images, tmp_path / "out", samples_per_shard=samples_per_shard)


def test_images_and_conversations_come_back_as_they_were(tmp_path, images):
    lines = [
        line(image="a.png", answer="eine Kätzchen 猫", id=17, skills=["ocr"]),
        line(images=["a.png", "deep/b.JPG"], text="<image><image>\nWhich?"),
        line(text="Who?", answer="me"),
    ]
    index, faults = build(tmp_path, images, *lines)
    assert faults == []
    assert (index.num_samples, len(index.names)) == (3, 2)
    one, two, none = read_samples(tmp_path / "out")
    assert torch.equal(one.images[0], read_image(images / "a.png"))
    assert (one.turns[1].text, one.turns[1].skill, one.metadata) == ("eine Kätzchen 猫", "ocr", {"id": 17})
    assert [i.shape[1:] for i in two.images] == [(30, 40), (50, 20)]
    assert torch.equal(two.images[1], read_image(images / "deep" / "b.JPG"))
    assert two.metadata == {}, "paths on the disk of whoever built the shards stay there"
    assert (none.images, none.turns[0].text) == ([], "Who?")


def test_image_bytes_are_copied_and_not_encoded_anew(tmp_path, images):
    index, _ = build(tmp_path, images, line(image="deep/b.JPG"))
    record = RecordReader(index)(0)
    assert record.files["jpg"] == (images / "deep" / "b.JPG").read_bytes()


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("{", "JSON: "),
        ("[1]", "expected a JSON object"),
        ("[" * 100_000, "JSON: "),
        (json.dumps({"image": "a.png"}), "no list 'conversations'"),
        (line(image="absent.png"), "image 'absent.png' is absent"),
        (line(image="../secret.png"), "image path '../secret.png' leads out of"),
        (line(image="deep/../../secret.png"), "leads out of"),
        (line(image="/etc/passwd.png"), "leads out of"),
        (line(image="note.txt"), "expected one of jpg, jpeg, png, webp"),
        (line(image="deep"), "expected one of"),
        (line(image=7), "image path 7 is no path"),
        (line(image="a\0.png"), "is no path"),
        (line(image="a.png", text="What?"), "0 <image> marks in the conversation but 1 images"),
        (line(text="<image>"), "1 <image> marks in the conversation but 0 images"),
        (line(images=["a.png", "absent.png"], text="<image><image>"), "image 'absent.png' is absent"),
        (line(image="a.png", answer=None), "turn 1: expected"),
        (line(image="a.png", answer="\ud83d"), "half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_and_left_out(tmp_path, images, bad, told):
    index, faults = build(tmp_path, images, line(image="a.png"), bad, line(image="deep/b.JPG"))
    assert [fault.id for fault in faults] == ["train.jsonl:2"]
    assert told in faults[0].reason
    assert index.num_samples == 2
    assert [s.images[0].shape[1:] for s in read_samples(tmp_path / "out")] == [(30, 40), (50, 20)]
    assert list(find_faults(tmp_path / "out")) == []


def test_empty_lines_are_passed_over_and_counted(tmp_path, images):
    index, faults = build(tmp_path, images, line(image="a.png"), "", "  ", "{", "")
    assert index.num_samples == 1
    assert [fault.id for fault in faults] == ["train.jsonl:4"]


def test_a_link_out_of_the_image_folder_is_not_followed(tmp_path, images):
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    _, faults = build(tmp_path, images, line(image="a.png"), line(image="link.png"))
    assert "leads out of" in faults[0].reason


def test_metadata_that_is_no_utf8_does_not_stop_the_others(tmp_path, images):
    index, faults = build(tmp_path, images, line(image="a.png", note="\ud83d"), line(image="a.png"))
    assert (index.num_samples, faults) == (2, [])
    assert len(list(read_samples(tmp_path / "out"))) == 2


def test_without_a_usable_line_nothing_is_written(tmp_path, images):
    for lines, told in (
        (["{", "{"], "the first fault: JSON"),
        ([""], "no usable line; the first fault: empty"),
    ):
        with pytest.raises(ValueError, match=told):
            build(tmp_path, images, *lines)
    assert not (tmp_path / "out").exists()


def test_absent_inputs_are_refused_by_name(tmp_path, images):
    with pytest.raises(ValueError, match=r"absent\.jsonl: no such file; expected JSONL"):
        build_from_annotations(tmp_path / "absent.jsonl", images, tmp_path / "out", samples_per_shard=1)
    (tmp_path / "train.jsonl").write_text(line())
    with pytest.raises(ValueError, match="absent: no such folder; image paths"):
        build_from_annotations(
            tmp_path / "train.jsonl", tmp_path / "absent", tmp_path / "out", samples_per_shard=1
        )
    assert not (tmp_path / "out").exists()
