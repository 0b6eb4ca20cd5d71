"""A contact sheet: each image of a sample above its questions and answers."""

import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vico_pl.data.decode import IMAGE_TOKEN
from vico_pl.types import Image, Sample

COLUMNS = 4
MIN_CELL, MAX_CELL = 480, 1000  # px: a cell is as wide as the widest image, within these limits
MAX_SCALE = 3  # small images only get blurred beyond it
GAP = 20.0  # px between cells
DPI = 100
CHARACTER, LINE = 7.8, 18  # px, of the font below
FONT: dict[str, Any] = {"family": "monospace", "size": 9, "va": "top", "parse_math": False}


def contact_sheet(samples: Sequence[Sample]) -> PIL.Image.Image:
    """Draw samples, at least one, in rows of four; long texts are wrapped, never cut."""
    widest = max((image.shape[2] for sample in samples for image in sample.images), default=0)
    width = min(max(widest, MIN_CELL), MAX_CELL)
    rows = [samples[i : i + COLUMNS] for i in range(0, len(samples), COLUMNS)]
    heights = [max(_height(sample, width) for sample in row) for row in rows]
    page = np.array([GAP + (width + GAP) * len(rows[0]), GAP + sum(heights) + 2 * GAP * len(rows)])
    figure = Figure(figsize=tuple(page / DPI), dpi=DPI)
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, sample in enumerate(row):
            _draw(figure, sample, left=GAP + column * (width + GAP), top=top, width=width)
        top += height + 2 * GAP
    return render(figure)


def render(figure: Figure) -> PIL.Image.Image:
    """Turn a figure into an RGB image; characters that the font lacks become boxes."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        canvas.draw()
    return PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _scale(image: Image, width: int) -> float:
    return float(min(MAX_SCALE, width / image.shape[2]))


def _lines(sample: Sample, width: int) -> list[str]:
    """Return the wrapped questions and answers."""
    pairs = zip(sample.turns[::2], sample.turns[1::2], strict=True)
    texts = [f"{q.text.replace(IMAGE_TOKEN, '').strip()}  ->  {a.text.strip()}" for q, a in pairs]
    return [line for text in texts for part in text.splitlines() for line in _wrap(part, width)]


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, int(width / CHARACTER), break_on_hyphens=False) or [""]


def _height(sample: Sample, width: int) -> float:
    num_lines = len(_wrap(sample.id, width)) + len(_lines(sample, width))
    return float(num_lines * LINE) + sum(_scale(i, width) * i.shape[1] + LINE for i in sample.images)


def _draw(figure: Figure, sample: Sample, *, left: float, top: float, width: int) -> None:
    """Draw a sample into a cell whose upper left corner is given in pixels."""
    page_width, page_height = figure.get_size_inches() * DPI
    x = left / page_width
    for line in _wrap(sample.id, width):  # one by one: a text of several lines would be spaced unevenly
        figure.text(x, 1 - top / page_height, line, color="gray", **FONT)
        top += LINE
    for image in sample.images:
        _, h, w = (_scale(image, width) * side for side in image.shape)
        axes = figure.add_axes(
            (x, 1 - (top + h) / page_height, w / page_width, h / page_height), xticks=[], yticks=[]
        )
        axes.imshow(image.permute(1, 2, 0).numpy(), aspect="auto")
        top += h + LINE / 2
    for line in _lines(sample, width):
        figure.text(x, 1 - top / page_height, line, color="black", **FONT)
        top += LINE
