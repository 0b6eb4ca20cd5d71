"""A set at a glance: the first samples on a contact sheet, counts of all, and how they differ."""

import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vico_pl.data.decode import IMAGE_TOKEN
from vico_pl.data.shards.reader import read_all, read_index
from vico_pl.data.tiling import Size, TilingConfig, count_tiles
from vico_pl.types import BadRecord, Sample

COLUMNS = 4
MIN_CELL, MAX_CELL = 480, 1000  # px: a cell is as wide as the widest image, within these limits
MAX_SCALE = 3  # small images only get blurred beyond it
GAP = 20.0  # px between cells
DPI = 100
CHARACTER, LINE = 7.8, 18.0  # px, of the font below
Part = tuple[Any, Any, float]  # a line and its colour, or an image and its scale; height in px
FONT: dict[str, Any] = {"family": "monospace", "size": 9, "va": "top", "parse_math": False}
COLOUR, FAULT_COLOUR = "#2f6db3", "#c2502e"
NUM_BINS = 40


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


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The statistics of a set; lists have an entry per usable sample, `image_sizes` one per image."""

    name: str
    num_shards: int
    text_unit: str  # tokens or bytes
    bad: Counter[str] = field(default_factory=Counter)  # by kind
    groups: Counter[str] = field(default_factory=Counter)  # answers by group
    tiles: list[int] = field(default_factory=list)  # thumbnails included
    images: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    image_sizes: list[Size] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Return the totals, and if there are any the bad records by kind and the answers by group."""
        counts = {
            "shards": self.num_shards,
            "samples": len(self.images),
            "images": sum(self.images),
            "tiles": sum(self.tiles),
            "answers": sum(self.answers),
            f"text {self.text_unit}": sum(self.text),
        }
        counts.update({f"answers: {group}": count for group, count in sorted(self.groups.items())})
        if self.bad:
            counts["bad records"] = self.bad.total()
        return counts | {f"bad records: {kind}": count for kind, count in sorted(self.bad.items())}


def survey(source: Path | str, *, tokenize: Callable[[str], Sized] | None = None) -> Survey:
    """Read a whole set; without `tokenize` texts are measured in bytes."""
    index = read_index(source)
    unit, split = ("tokens", tokenize) if tokenize else ("bytes", str.encode)
    found = Survey(name=str(index.folder), num_shards=len(index.names), text_unit=unit)
    for item in read_all(index):
        if isinstance(item, BadRecord):
            found.bad[item.kind] += 1
            continue
        sizes = [(image.shape[2], image.shape[1]) for image in item.images]
        answers = [turn for turn in item.turns if turn.role == "gpt"]
        found.tiles.append(count_tiles(sizes, TilingConfig()))
        found.images.append(len(sizes))
        found.answers.append(len(answers))
        found.groups.update(turn.group for turn in answers if turn.group is not None)
        found.text.append(sum(len(split(turn.text)) for turn in item.turns))
        found.image_sizes.extend(sizes)
    return found


def draw(found: Survey) -> Figure:
    """Draw the distributions of a survey."""
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    (tiles, images, text), (sizes, answers, bad) = figure.subplots(2, 3)
    _histogram(tiles, found.tiles, title="Tiles per sample", unit="tiles, thumbnails included")
    _histogram(images, found.images, title="Images per sample", unit="images")
    _histogram(text, found.text, title=f"Text per sample, {found.text_unit}", unit=found.text_unit)
    _histogram(answers, found.answers, title="Answers per sample", unit="answers")
    _draw_sizes(sizes, found.image_sizes)
    bad.set(title="Bad records by kind", xlabel="records")
    bad.bar_label(bad.barh([*found.bad], [*found.bad.values()], color=FAULT_COLOUR), padding=3)
    if not found.bad:
        bad.set(xticks=[], yticks=[], xlabel="none")
    counts = found.counts()
    totals = ", ".join(f"{counts[name]:,} {name}" for name in ("samples", "images", "tiles", "shards"))
    figure.suptitle(f"{found.name}: {totals}", parse_math=False)
    return figure


def _histogram(axes: Axes, values: Sequence[int], *, title: str, unit: str) -> None:
    """Draw a bar per number, or a histogram to the 99th percentile if the numbers range far."""
    axes.set(title=title, xlabel=unit, ylabel="samples")
    if not values:
        return
    low, high = min(values), max(values)
    if high - low <= NUM_BINS:
        axes.hist(values, bins=[n - 0.5 for n in range(low, high + 2)], rwidth=0.85, color=COLOUR)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return
    end, median = max(float(np.percentile(values, 99)), 1.0), float(np.median(values))
    axes.hist(np.minimum(values, end), bins=NUM_BINS, range=(0, end), color=COLOUR)
    axes.axvline(median, color="black", linewidth=1, linestyle="--")
    axes.set_title(f"{title}\nmedian {median:,.0f}, longest {high:,}")
    axes.set_xlabel(f"{unit} (the longest 1 % in the last bar)")


def _draw_sizes(axes: Axes, sizes: Sequence[Size]) -> None:
    axes.set(title="Image sizes", xlabel="width, px", ylabel="height, px")
    if not sizes:
        return
    sides = np.array(sizes)
    ends = np.maximum(np.percentile(sides, 99, axis=0), 2.0)  # larger images lie at the edge
    widths, heights = np.minimum(sides, ends).T
    limits = [(0, end * 1.001) for end in ends]
    *_, drawn = axes.hist2d(widths, heights, bins=NUM_BINS, range=limits, cmin=1, norm=LogNorm())
    axes.figure.colorbar(drawn, ax=axes, label="images")
