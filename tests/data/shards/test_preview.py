import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from vico_pl.data.glyphs import GlyphsConfig, draw_records
from vico_pl.data.shards.preview import contact_sheet
from vico_pl.types import Sample, Turn

RED = (200, 20, 30)


def sample(*, num_images=1, question="What colour?", answer="red", size=(64, 64)):
    image = torch.tensor(RED, dtype=torch.uint8)[:, None, None].expand(3, *size)
    turns = [Turn(role="human", text="<image>\n" * num_images + question), Turn(role="gpt", text=answer)]
    return Sample(id="train-000000.tar/00000017", images=[image] * num_images, turns=turns, metadata={})


def count(picture, colour):
    return int((np.asarray(picture) == colour).all(-1).sum())


@pytest.fixture
def lines(monkeypatch):
    """Collect every line of text that is drawn."""
    drawn = []
    write = Figure.text

    def recording(figure, x, y, text, **style):
        drawn.append(text)
        return write(figure, x, y, text, **style)

    monkeypatch.setattr(Figure, "text", recording)
    return drawn


def test_sheet_has_rows_of_columns():
    one, four, five = (contact_sheet([sample()] * n).size for n in (1, 4, 5))
    assert four[0] > 3.5 * one[0]
    assert four[1] == one[1]
    assert five[0] == four[0]
    assert five[1] > 1.8 * four[1]


def test_small_images_are_enlarged_and_photographs_are_not_shrunk():
    assert count(contact_sheet([sample(size=(64, 64))]), RED) > 180 * 180
    assert count(contact_sheet([sample(size=(300, 900))]), RED) > 0.95 * 300 * 900


def test_every_image_of_a_sample_is_drawn():
    single, double = (count(contact_sheet([sample(num_images=n)]), RED) for n in (1, 2))
    assert double == 2 * single


def test_all_questions_of_a_glyphs_record_are_on_the_sheet(lines):
    _, files = next(draw_records(GlyphsConfig(), seed=3, start=2, count=1))
    turns = [Turn(role=t["from"], text=t["value"]) for t in json.loads(files["json"])["conversations"]]
    contact_sheet([Sample(id="a/1", images=sample().images, turns=turns, metadata={})])
    text = "\n".join(lines)
    assert len(turns) == 16
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        assert f"{question.text.removeprefix('<image>').strip()}  ->  {answer.text}" in text
    assert "<image>" not in text


def test_long_text_makes_the_sheet_taller_and_loses_nothing(lines):
    words = " ".join(f"word{i}" for i in range(200))
    short, long = contact_sheet([sample()]), contact_sheet([sample(answer=words)])
    assert long.width == short.width
    assert long.height > short.height + 300
    assert words in " ".join(lines)


def test_text_only_sample_is_drawn(lines):
    turns = [Turn(role="human", text="Who wrote it?"), Turn(role="gpt", text="Nobody.\nKnown.")]
    contact_sheet([Sample(id="a/1", images=[], turns=turns, metadata={})])
    assert lines == ["a/1", "Who wrote it?  ->  Nobody.", "Known."]
