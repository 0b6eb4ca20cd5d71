"""Counts of a set of shards, and one figure of how its samples differ."""

from collections import Counter
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vico_pl.data.shards.inspect import read_all
from vico_pl.data.shards.reader import read_index
from vico_pl.data.tiling import Size, TilingConfig, count_tiles
from vico_pl.types import BadRecord

COLOUR, FAULT_COLOUR = "#2f6db3", "#c2502e"
NUM_BINS = 40


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
