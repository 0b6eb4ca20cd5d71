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
from vico_pl.types import Sample

MIN_CELL, MAX_CELL = 480, 1000  # px: a cell is as wide as the widest image, within these limits
MAX_SCALE = 3  # small images only get blurred beyond it
GAP = 20.0  # px between cells
DPI = 100
CHARACTER, LINE = 7.8, 18  # px, of the font below
FONT: dict[str, Any] = {"family": "monospace", "size": 9}


def contact_sheet(samples: Sequence[Sample], *, columns: int = 4) -> PIL.Image.Image:
    """Draw samples in rows of `columns`; long texts are wrapped, never cut.

    Raises:
        ValueError: there is no sample, or no column to put it in.
    """
    if not samples or columns < 1:
        raise ValueError(f"{len(samples)} samples in {columns} columns: expected at least one of each")
    widest = max((image.shape[2] for sample in samples for image in sample.images), default=0)
    width = min(max(widest, MIN_CELL), MAX_CELL)
    rows = [samples[i : i + columns] for i in range(0, len(samples), columns)]
    heights = [max(_height(sample, width) for sample in row) for row in rows]
    page_width = GAP + (width + GAP) * len(rows[0])
    page_height = GAP + sum(heights) + 2 * GAP * len(rows)
    figure = Figure(figsize=(page_width / DPI, page_height / DPI), dpi=DPI)
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


def _image_sizes(sample: Sample, width: int) -> list[tuple[float, float]]:
    sizes = [(image.shape[2], image.shape[1]) for image in sample.images]
    scales = [min(MAX_SCALE, width / image_width) for image_width, _ in sizes]
    return [(float(scale * w), float(scale * h)) for scale, (w, h) in zip(scales, sizes, strict=True)]


def _lines(sample: Sample, width: int) -> list[str]:
    """Return the wrapped questions and answers."""
    pairs = zip(sample.turns[::2], sample.turns[1::2], strict=True)
    texts = [f"{q.text.replace(IMAGE_TOKEN, '').strip()}  ->  {a.text.strip()}" for q, a in pairs]
    return [line for text in texts for part in text.splitlines() for line in _wrap(part, width)]


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, int(width / CHARACTER), break_on_hyphens=False) or [""]


def _height(sample: Sample, width: int) -> float:
    num_lines = len(_wrap(sample.id, width)) + len(_lines(sample, width))
    return float(num_lines * LINE) + sum(height + LINE for _, height in _image_sizes(sample, width))


def _draw(figure: Figure, sample: Sample, *, left: float, top: float, width: int) -> None:
    """Draw a sample into a cell whose upper left corner is given in pixels."""
    page_width, page_height = figure.get_size_inches() * DPI

    def write(lines: Sequence[str], colour: str) -> float:
        for number, line in enumerate(lines):  # a text of several lines would be spaced unevenly
            place = left / page_width, 1 - (top + number * LINE) / page_height
            figure.text(*place, line, color=colour, va="top", parse_math=False, **FONT)
        return top + LINE * len(lines)

    top = write(_wrap(sample.id, width), "gray")
    for image, (w, h) in zip(sample.images, _image_sizes(sample, width), strict=True):
        box = (left / page_width, 1 - (top + h) / page_height, w / page_width, h / page_height)
        axes = figure.add_axes(box, xticks=[], yticks=[])
        axes.imshow(image.permute(1, 2, 0).numpy(), aspect="auto")
        top += h + LINE / 2
    write(_lines(sample, width), "black")
