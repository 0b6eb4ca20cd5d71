import io

import numpy as np
from PIL import Image, ImageColor

from tests.support.tiny import encoded_image, record
from vico_pl.data.shards.preview import COLOUR, FAULT_COLOUR, Survey, draw, survey
from vico_pl.data.shards.reader import write_shard


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
