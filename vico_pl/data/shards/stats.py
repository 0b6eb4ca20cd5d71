"""What is in a set of shards: counts, and one picture of how its samples differ."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vico_pl.data.shards.inspect import read_all
from vico_pl.data.shards.reader import read_index
from vico_pl.data.tiling import TilingConfig, choose_grid
from vico_pl.types import BadRecord, Sample

COLOUR, FAULT_COLOUR, INK = "#2f6db3", "#c2502e", "#1b1f24"
NUM_BINS = 40
STYLE: Any = {  # matplotlib types each key
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
}
DEFAULT_TILING = TilingConfig()


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was found in a set; lists have an entry per usable sample, `image_sizes` one per image."""

    name: str
    num_shards: int
    text_unit: str  # tokens or bytes
    bad: Counter[str] = field(default_factory=Counter)  # by kind
    skills: Counter[str] = field(default_factory=Counter)  # answers by skill
    tiles: list[int] = field(default_factory=list)  # thumbnails counted
    images: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    image_sizes: list[tuple[int, int]] = field(default_factory=list)  # width, height, px

    def counts(self) -> dict[str, int]:
        """Return the totals.

        Keys: shards, samples, images, tiles, answers, text, and where there are some bad records,
        `bad records: KIND` and `answers: SKILL`.
        """
        counts = {
            "shards": self.num_shards,
            "samples": len(self.images),
            "images": sum(self.images),
            "tiles": sum(self.tiles),
            "answers": sum(self.answers),
            f"text {self.text_unit}": sum(self.text),
        }
        counts.update({f"answers: {skill}": count for skill, count in sorted(self.skills.items())})
        if self.bad:
            counts["bad records"] = self.bad.total()
        return counts | {f"bad records: {kind}": count for kind, count in sorted(self.bad.items())}


def survey(
    source: Path | str,
    *,
    count_tokens: Callable[[str], int] | None = None,
    tiling: TilingConfig = DEFAULT_TILING,
) -> Survey:
    """Read a whole set; without `count_tokens` texts are measured in bytes."""
    index = read_index(source)
    unit = "bytes" if count_tokens is None else "tokens"
    found = Survey(name=str(index.folder), num_shards=len(index.names), text_unit=unit)
    for item in read_all(index):
        if isinstance(item, BadRecord):
            found.bad[item.kind] += 1
        else:
            _enter(found, item, count_tokens or _num_bytes, tiling)
    return found


def draw(found: Survey) -> Figure:
    """Draw what was found as one picture."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 6.6), layout="constrained")
        (tiles, images, text), (sizes, answers, bad) = figure.subplots(2, 3)
        _bars(tiles, Counter(found.tiles), "Tiles per sample", "tiles, thumbnails counted")
        _bars(images, Counter(found.images), "Images per sample", "images")
        _histogram(text, found.text, f"Text per sample, {found.text_unit}", found.text_unit)
        _draw_sizes(sizes, found.image_sizes)
        _bars(answers, Counter(found.answers), "Answers per sample", "answers")
        _draw_bad(bad, found.bad)
        counts = found.counts()
        totals = ", ".join(f"{counts[name]:,} {name}" for name in ("samples", "images", "tiles", "shards"))
        figure.suptitle(f"{found.name}: {totals}", color=INK, fontsize=11)
    return figure


def _enter(found: Survey, sample: Sample, count: Callable[[str], int], tiling: TilingConfig) -> None:
    sizes = [(image.shape[2], image.shape[1]) for image in sample.images]
    answers = [turn for turn in sample.turns if turn.role == "gpt"]
    found.tiles.append(_num_tiles(sizes, tiling))
    found.images.append(len(sizes))
    found.answers.append(len(answers))
    found.skills.update(turn.skill for turn in answers if turn.skill is not None)
    found.text.append(sum(count(turn.text) for turn in sample.turns))
    found.image_sizes.extend(sizes)


def _num_bytes(text: str) -> int:
    return len(text.encode())


def _num_tiles(sizes: Sequence[tuple[int, int]], tiling: TilingConfig) -> int:
    tiling = tiling.per_image(len(sizes))
    grids = [columns * rows for columns, rows in (choose_grid(*size, tiling) for size in sizes)]
    return sum(grid + (tiling.use_thumbnail and grid > 1) for grid in grids)


def _bars(axes: Axes, counts: Counter[int], title: str, unit: str) -> None:
    """Draw how many samples have each number; a wide range is drawn as a histogram."""
    if counts and max(counts) - min(counts) > NUM_BINS:
        return _histogram(axes, list(counts.elements()), title, unit)
    axes.bar(list(counts), list(counts.values()), color=COLOUR, width=0.85)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(counts) == 1:
        (only,) = counts
        axes.set_xticks([only])
        axes.set_xlim(only - 2, only + 2)
    return _label(axes, title, unit)


def _histogram(axes: Axes, values: Sequence[int], title: str, unit: str) -> None:
    """Draw a histogram to the 99th percentile; a mark shows the median."""
    if values:
        end = max(float(np.percentile(values, 99)), 1.0)
        axes.hist(np.minimum(values, end), bins=NUM_BINS, range=(0, end), color=COLOUR)
        median = float(np.median(values))
        axes.axvline(median, color=INK, linewidth=1, linestyle="--")
        axes.annotate(
            f" median {median:,.0f}, longest {max(values):,}",
            (median, 0.97),
            xycoords=("data", "axes fraction"),
            va="top",
        )
    _label(axes, title, f"{unit} (the longest 1 % in the last bar)")


def _draw_sizes(axes: Axes, sizes: Sequence[tuple[int, int]]) -> None:
    _label(axes, "Image sizes", "width, px")
    axes.set_ylabel("height, px")
    if not sizes:
        return
    width, height = np.array(sizes).T
    ends = [max(float(np.percentile(side, 99)), 2.0) for side in (width, height)]
    *_, drawn = axes.hist2d(
        np.minimum(width, ends[0]),
        np.minimum(height, ends[1]),
        bins=NUM_BINS,
        range=[(0, ends[0] * 1.001), (0, ends[1] * 1.001)],
        cmin=1,
        norm=LogNorm(),
        cmap="viridis",
    )
    bar = axes.figure.colorbar(drawn, ax=axes)
    bar.set_label("images")


def _draw_bad(axes: Axes, bad: Counter[str]) -> None:
    _label(axes, "Bad records by kind", "records")
    axes.set_ylabel("")
    kinds = [kind for kind, _ in bad.most_common()][::-1]
    if not kinds:
        axes.set_axis_off()
        axes.text(0, 0.9, "none", transform=axes.transAxes, color=INK)
        return
    bars = axes.barh(kinds, [bad[kind] for kind in kinds], color=FAULT_COLOUR)
    axes.bar_label(bars, padding=3)


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(unit)
    axes.set_ylabel("samples")
