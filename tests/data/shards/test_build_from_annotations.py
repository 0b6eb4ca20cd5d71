import gc
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.support.tiny import encoded_image
from vico_pl.data.decode import read_image
from vico_pl.data.shards import build as build_module
from vico_pl.data.shards.build import build_from_annotations
from vico_pl.data.shards.reader import RecordReader, find_faults, read_samples, write_shard

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
    return build_from_annotations([path], images, tmp_path / "out", max_samples=samples_per_shard)


def test_images_and_conversations_come_back_as_they_were(tmp_path, images):
    lines = [
        line(image="a.png", answer="eine Kätzchen 猫", id=17, skills=["ocr"]),
        line(images=["a.png", "deep/b.JPG"], text="<image><image>\nWhich?"),
        line(text="Who?", answer="me"),
    ]
    index, faults = build(tmp_path, images, *lines)
    assert faults == []
    assert (index.num_samples, len(index.names)) == (3, 2)
    assert RecordReader(index)(1).files["1.jpg"] == (images / "deep" / "b.JPG").read_bytes(), "copied"
    one, two, none = read_samples(tmp_path / "out")
    assert torch.equal(one.images[0], read_image(images / "a.png"))
    assert (one.turns[1].text, one.turns[1].group, one.metadata) == ("eine Kätzchen 猫", "ocr", {"id": 17})
    assert [i.shape[1:] for i in two.images] == [(30, 40), (50, 20)]
    assert two.metadata == {}, "paths on the disk of whoever built the shards stay there"
    assert (none.images, none.turns[0].text) == ([], "Who?")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "JSON: "),
        ("[1]", "expected a JSON object"),
        ("[" * 100_000, "JSON: "),
        (json.dumps({"image": "a.png"}), "no list 'conversations'"),
        (line(image="absent.png"), "image 'absent.png' is absent"),
        (line(image="../secret.png"), "image path '../secret.png' leads out of"),
        (line(image="/etc/passwd.png"), "leads out of"),
        (line(image="note.txt"), "expected one of jpg, jpeg, png, webp"),
        (line(image=7), "image path 7 is not a path"),
        (line(image="a\0.png"), "is not a path"),
        (line(image="a.png", text="What?"), "0 <image> marks in the conversation but 1 images"),
        (line(text="<image>"), "1 <image> marks in the conversation but 0 images"),
        (line(image="a.png", answer=None), "turn 1: expected"),
        (line(image="a.png", answer="\ud83d"), "half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_and_left_out(tmp_path, images, bad, message):
    index, faults = build(tmp_path, images, line(image="a.png"), "", "  ", bad, line(image="deep/b.JPG"))
    assert [fault.id for fault in faults] == ["train.jsonl:4"], "empty lines are passed over and counted"
    assert message in faults[0].reason
    assert index.num_samples == 2
    assert [s.images[0].shape[1:] for s in read_samples(tmp_path / "out")] == [(30, 40), (50, 20)]
    assert list(find_faults(index)) == []


def test_links_in_the_image_folder_are_followed_as_in_the_cache_of_the_hub(tmp_path, images, monkeypatch):
    blob = tmp_path / "blobs" / "0a1b2c"  # without an ending
    blob.parent.mkdir()
    blob.write_bytes((images / "a.png").read_bytes())
    (images / "link.png").symlink_to(blob)
    (tmp_path / "linked").symlink_to(images)
    monkeypatch.chdir(tmp_path / "linked")
    _, faults = build(tmp_path, Path(), line(image="link.png"), line(image="../secret.png"))
    assert [(fault.id, "leads out of" in fault.reason) for fault in faults] == [("train.jsonl:2", True)]
    assert [s.images[0].shape[1:] for s in read_samples(tmp_path / "out")] == [(30, 40)]


def test_files_written_on_windows_are_read(tmp_path, images):
    """A byte order mark and CRLF, in JSONL and in a list, whose items are read again by position."""
    lines = [line(image="a.png", answer="Kätzchen"), line(image="deep/b.JPG")]
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[\r\n" + ",\r\n".join(lines).encode() + b"\r\n]\r\n")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    files = [tmp_path / "a.json", tmp_path / "b.jsonl"]
    index, faults = build_from_annotations(files, images, tmp_path / "out")
    assert (index.num_samples, faults) == (4, [])
    assert [s.turns[1].text for s in read_samples(tmp_path / "out")] == ["Kätzchen", "a cat"] * 2


def test_an_empty_image_path_marks_text_alone_and_metadata_need_be_no_utf8(tmp_path, images):
    _, faults = build(tmp_path, images, line(image="", text="Who?"), line(image="a.png", note="\ud83d"))
    assert faults == []
    assert [len(s.images) for s in read_samples(tmp_path / "out")] == [0, 1]


def test_absent_and_unusable_inputs_are_refused_and_nothing_is_written(tmp_path, images):
    with pytest.raises(ValueError, match="the first fault: JSON"):
        build(tmp_path, images, "{", "{")
    with pytest.raises(ValueError, match="no usable line; the first fault: empty"):
        build(tmp_path, images, "")
    with pytest.raises(ValueError, match=r"absent\.jsonl: no such file; expected JSONL"):
        build_from_annotations([tmp_path / "absent.jsonl"], images, tmp_path / "out")
    with pytest.raises(ValueError, match="absent: no such folder; image paths"):
        build_from_annotations([tmp_path / "train.jsonl"], tmp_path / "absent", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("limits", "num_shards"),
    [({}, 1), ({"max_samples": 3}, 4), ({"max_bytes": 40_960}, 2), ({"max_bytes": 1}, 10)],
)
def test_the_bytes_depend_on_what_is_asked_for_and_not_on_who_writes_them(
    tmp_path, images, limits, num_shards
):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f"{line(image='a.png', answer='x' * 700 * i)}\n" for i in range(10)))
    for workers in (1, 3):
        build_from_annotations([path], images, tmp_path / f"{workers}" / "set", **limits, workers=workers)
    assert contents(tmp_path / "1" / "set") == contents(tmp_path / "3" / "set")
    sizes = [path.stat().st_size for path in (tmp_path / "1" / "set").glob("*.tar")]
    assert len(sizes) == num_shards
    assert num_shards == 10 or max(sizes) <= limits.get("max_bytes", 10**6)


def test_a_build_does_not_go_on_with_other_annotations_images_or_settings(tmp_path, images):
    build(tmp_path, images, line(image="a.png"), line(image="a.png", answer="2"))
    (tmp_path / "out" / "index.json").unlink()  # as if it had been interrupted
    before = contents(tmp_path / "out")
    message = (
        "already holds a part of a set of other annotations, images or settings, or build.json is damaged; "
    )
    two = [line(image="a.png"), line(image="a.png", answer="2")]
    with pytest.raises(ValueError, match=message):
        build(tmp_path, images, line(image="a.png"), line(image="a.png", answer="3"))
    with pytest.raises(ValueError, match=message):
        build(tmp_path, images, *two, samples_per_shard=1)
    (images / "a.png").write_bytes(encoded_image("PNG", size=(41, 31)))
    with pytest.raises(ValueError, match=message):
        build(tmp_path, images, *two)
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "build.json").write_text("[]")
    with pytest.raises(ValueError, match=message):
        build(tmp_path, images, *two)


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("change_s", [-3600, 3600])
def test_an_image_that_was_replaced_by_one_of_its_size_is_noticed(tmp_path, images, is_whole, change_s):
    """An older one as well: copies often keep the time of their original."""
    build(tmp_path, images, line(image="a.png"))
    if not is_whole:
        (tmp_path / "out" / "index.json").unlink()
    copied = shutil.copytree(images, tmp_path / "copied")
    build(tmp_path, copied, line(image="a.png"))  # the same
    time = (images / "a.png").stat().st_mtime_ns + change_s * 10**9
    os.utime(images / "a.png", ns=(time, time))
    with pytest.raises(ValueError, match="already holds a set of other annotations, images or settings"):
        build(tmp_path, images, line(image="a.png"))


def test_a_set_of_an_earlier_version_is_kept_without_the_times_of_its_images(tmp_path, images):
    build(tmp_path, images, line(image="a.png"))
    plan = json.loads((tmp_path / "out" / "build.json").read_text())
    assert plan.pop("times")
    (tmp_path / "out" / "build.json").write_text(json.dumps(plan))
    before = contents(tmp_path / "out")
    build(tmp_path, images, line(image="a.png"))
    assert contents(tmp_path / "out") == before


def test_a_meta_file_of_internvl_is_named_as_such(tmp_path, images):
    meta = {"caption": {"root": "photos", "annotation": "caption.jsonl", "data_augment": False}}
    (tmp_path / "meta.json").write_text(json.dumps(meta, indent=2))
    message = "a meta file of InternVL, .*: --annotations caption.jsonl --images photos"
    with pytest.raises(ValueError, match=message):
        build_from_annotations([tmp_path / "meta.json"], images, tmp_path / "out")


def test_tars_of_unknown_origin_are_not_taken_for_shards_of_the_build(tmp_path, images):
    write_shard(tmp_path / "out" / "out-000000.tar", [("0", {"json": b"{}"})])
    with pytest.raises(ValueError, match=r"holds tars of which no build\.json tells the origin"):
        build(tmp_path, images, line(image="a.png"))


def test_several_files_follow_each_other_and_a_list_is_as_good_as_lines(tmp_path, images):
    entries = [line(image="a.png", answer=f"{i} 猫") for i in range(5)]
    paths = {name: tmp_path / name for name in ("a.jsonl", "b.json", "all.jsonl")}
    paths["a.jsonl"].write_text("\n".join(entries[:2]))
    listed = f"  [{entries[2]},\n[1] , {entries[3]}{entries[4]}]\n"
    paths["b.json"].write_text(listed, encoding="utf-8")
    paths["all.jsonl"].write_text("\n".join(entries))
    _, faults = build_from_annotations([paths["a.jsonl"], paths["b.json"]], images, tmp_path / "one" / "set")
    assert [(fault.id, fault.reason) for fault in faults] == [
        ("b.json[1]", "expected a JSON object in each line")
    ]
    build_from_annotations([paths["all.jsonl"]], images, tmp_path / "two" / "set")
    one, two = contents(tmp_path / "one" / "set"), contents(tmp_path / "two" / "set")
    assert one.pop("build.json") != two.pop("build.json")
    assert one == two


@pytest.mark.parametrize("content", ['[{"a": 1}', "[{]", "[1, ", "[" * 100_000])
def test_a_list_that_is_cut_or_damaged_is_refused(tmp_path, images, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: not a readable JSON list"):
        build_from_annotations([tmp_path / "a.json"], images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_json_nested_too_deep_runs_no_finalizer_without_stack(tmp_path, images, monkeypatch):
    """A garbage collection at the bottom of the parser's stack left finalizers no frame to run in."""

    class Finalized:
        def __del__(self):
            descend(50)

    def descend(num_frames):
        if num_frames:
            descend(num_frames - 1)

    (tmp_path / "a.json").write_text("[" * 100_000)
    failed = []
    monkeypatch.setattr(sys, "unraisablehook", failed.append)
    before = gc.get_threshold()
    try:
        for threshold in range(700, 1000, 20):  # new objects until the next collection
            garbage = Finalized()
            garbage.itself = garbage
            del garbage
            gc.set_threshold(threshold)
            with pytest.raises(ValueError, match="not a readable JSON list"):
                list(build_module._pieces(tmp_path / "a.json"))
    finally:
        gc.set_threshold(*before)
    assert failed == []
    assert gc.isenabled()
