import io
import json

import numpy as np
import pytest
from PIL import Image, ImageColor

from tests.support.tiny import encoded_image, record
from vico_pl.data.shards.preview import COLOUR, FAULT_COLOUR, Survey, draw, survey
from vico_pl.data.shards.reader import find_faults, read_index, read_samples, write_index, write_shard
from vico_pl.data.shards.tars import scan_boundaries


@pytest.fixture
def folder(tmp_path):
    """Two shards: four usable records and four that are bad in different ways."""
    two = [{"from": "human", "value": "<image> <image>"}, {"from": "gpt", "value": "both"}]
    none = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "me"}]
    talk = [*none, {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "so"}]
    image = encoded_image()
    contents = {
        "good": record(skills=["ocr"]).files,
        "cut": record(files={"jpg": image[:300]}).files,
        "two": {"0.jpg": image, "1.jpg": image, "json": json.dumps({"conversations": two}).encode()},
        "json": record(files={"json": b"{"}).files,
        "marks": record(text="no image?").files,
        "text": {"json": json.dumps({"conversations": talk, "skills": [None, "reasoning"]}).encode()},
        "torn": record().files,
        "last": record(skills=["ocr"]).files,
    }
    entries = list(contents.items())
    write_shard(tmp_path / "set" / "set-000000.tar", entries[:5])
    write_shard(tmp_path / "set" / "set-000001.tar", entries[5:])
    write_index(tmp_path / "set")
    tear(tmp_path / "set" / "set-000001.tar", sample=1)
    return tmp_path / "set"


def tear(path, *, sample):
    """Overwrite the tar header of a record's first member."""
    with path.open("r+b") as file:
        file.seek(int(scan_boundaries(path)[sample]))
        file.write(b"\xff" * 512)


def test_usable_samples_come_in_their_order_and_the_others_are_left_out(folder):
    assert [(s.id, len(s.images), len(s.turns)) for s in read_samples(folder)] == [
        ("set-000000.tar/good", 1, 2),
        ("set-000000.tar/two", 2, 2),
        ("set-000001.tar/text", 0, 4),
        ("set-000001.tar/last", 1, 2),
    ]


def test_every_bad_record_is_named_with_its_reason_and_the_last_does_not_end_the_search(folder):
    faults = [(bad.id, bad.reason) for bad in find_faults(read_index(folder))]
    assert [name for name, _ in faults] == [
        "set-000000.tar/cut",
        "set-000000.tar/json",
        "set-000000.tar/marks",
        "set-000001.tar, sample 6 of the set",  # its key is lost
    ]
    expected = ("image 'jpg' (300 bytes)", "JSON: ", "0 <image> marks", "no record")
    for (_, reason), part in zip(faults, expected, strict=True):
        assert part in reason


def test_contents_are_counted_by_kind(folder, shards):
    assert survey(folder).counts() == {
        "shards": 2,
        "bad records": 4,
        "bad records: image": 1,
        "bad records: json": 1,
        "bad records: marks": 1,
        "bad records: tar": 1,
        "samples": 4,
        "images": 4,
        "tiles": 40,  # 12 and a thumbnail, and 6 each of two images
        "text bytes": 79,
        "answers": 5,
        "answers: ocr": 2,
        "answers: reasoning": 1,
    }
    assert list(find_faults(read_index(shards))) == []
    assert "bad records" not in survey(shards).counts()


def count_pixels(found, *colours):
    """Count pixels of some colours in the picture of a survey."""
    buffer = io.BytesIO()
    draw(found).savefig(buffer, dpi=50)
    picture = np.asarray(Image.open(buffer).convert("RGB"), dtype=int)
    return [(abs(picture - ImageColor.getrgb(colour)).max(axis=2) < 10).sum() for colour in colours]


def test_samples_are_measured_one_by_one(tmp_path):
    wide = encoded_image(size=(1000, 500))
    records = [
        ("wide", record(text="<image>", answer="é", files={"jpg": wide}).files),
        ("text", record(text="Who?", answer="me", files={"jpg": None}, skills=["ocr"]).files),
        ("bad", {"json": b"{"}),
    ]
    write_shard(tmp_path / "a.tar", records)
    found = survey(tmp_path)
    assert (found.tiles, found.images, found.answers) == ([3, 0], [1, 0], [1, 1])
    assert found.text == [len("<image>") + 2, 6]
    assert found.image_sizes == [(1000, 500)]
    tokens = survey(tmp_path, tokenize=lambda text: 10 * text)
    assert (tokens.text, tokens.text_unit) == ([80, 60], "tokens")


def test_the_picture_shows_samples_and_faults_and_draws_also_nothing(shards):
    found, nothing = survey(shards), Survey(name="x", num_shards=0, text_unit="bytes")
    found.bad["image"] += 3
    assert count_pixels(nothing, COLOUR, FAULT_COLOUR) == [0, 0]
    assert min(count_pixels(found, COLOUR, FAULT_COLOUR)) > 1000
