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

COLUMNS = 4
MIN_CELL, MAX_CELL = 480, 1000  # px: a cell is as wide as the widest image, within these limits
MAX_SCALE = 3  # small images only get blurred beyond it
GAP = 20.0  # px between cells
DPI = 100
CHARACTER, LINE = 7.8, 18.0  # px, of the font below
Part = tuple[Any, Any, float]  # a line and its colour, or an image and its scale; height in px
FONT: dict[str, Any] = {"family": "monospace", "size": 9, "va": "top", "parse_math": False}


def contact_sheet(samples: Sequence[Sample]) -> PIL.Image.Image:
    """Draw samples, at least one, in rows of four; long texts are wrapped, never cut."""
    widest = max((image.shape[2] for sample in samples for image in sample.images), default=0)
    width = min(max(widest, MIN_CELL), MAX_CELL)
    cells = [_parts(sample, width) for sample in samples]
    rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    heights = [max(sum(height for *_, height in cell) for cell in row) for row in rows]
    page = np.array([GAP + (width + GAP) * len(rows[0]), GAP + sum(heights) + 2 * GAP * len(rows)])
    figure = Figure(figsize=tuple(page / DPI), dpi=DPI)
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            _draw(figure, cell, left=GAP + column * (width + GAP), top=top)
        top += height + 2 * GAP
    return render(figure)


def render(figure: Figure) -> PIL.Image.Image:
    """Turn a figure into an RGB image; characters that the font lacks become boxes."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        canvas.draw()
    return PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _parts(sample: Sample, width: int) -> list[Part]:
    """Return the lines and images of a cell: name, images, questions and answers."""
    pairs = zip(sample.turns[::2], sample.turns[1::2], strict=True)
    texts = [f"{q.text.replace(IMAGE_TOKEN, '').strip()}  ->  {a.text.strip()}" for q, a in pairs]
    lines = [line for text in texts for part in text.splitlines() for line in _wrap(part, width)]
    scales = [min(MAX_SCALE, width / image.shape[2]) for image in sample.images]
    return [
        *((line, "gray", LINE) for line in _wrap(sample.id, width)),
        *((i, s, i.shape[1] * s + LINE / 2) for i, s in zip(sample.images, scales, strict=True)),
        *((line, "black", LINE) for line in lines),
    ]


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, int(width / CHARACTER), break_on_hyphens=False) or [""]


def _draw(figure: Figure, cell: list[Part], *, left: float, top: float) -> None:
    """Draw a cell whose upper left corner is given in pixels."""
    page_width, page_height = figure.get_size_inches() * DPI
    x = left / page_width
    for content, style, height in cell:
        if isinstance(content, str):  # a line at a time: a text of several would be spaced unevenly
            figure.text(x, 1 - top / page_height, content, color=style, **FONT)
        else:
            _, h, w = (style * side for side in content.shape)
            place = (x, 1 - (top + h) / page_height, w / page_width, h / page_height)
            figure.add_axes(place, xticks=[], yticks=[]).imshow(
                content.permute(1, 2, 0).numpy(), aspect="auto"
            )
        top += height
