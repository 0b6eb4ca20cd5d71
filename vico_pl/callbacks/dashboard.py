"""What TensorBoard shows besides curves: a first page of charts, and pictures of held-out tiles."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from torch import Tensor

from vico_pl.config import load_config
from vico_pl.data.module import RankBatches
from vico_pl.data.shards.preview import render
from vico_pl.types import Batch, RankBatch

NUM_SHOWN = 4  # samples of each set, always the same
NUM_DISAGREEMENTS = 16  # tiles
NUM_BINS = 10  # of the reliability curve
COLUMNS = 8  # tiles in a row of a picture
THRESHOLD = 0.5  # of P(compress) until the router is calibrated
KEPT, COMPRESSED = "#0072b2", "#d55e00"  # frames and titles, safe for colour-blind readers

# Category -> chart -> patterns of metric names. The first category is a stage's own, see `Stage.charts`.
SHARED_CHARTS = {
    "Is it fast?": {
        "seconds of a step, and of it waiting for data": ["speed/step_s", "speed/data_wait_s"],
        "tokens per second": ["speed/.*_tokens_per_s"],
        "memory, GiB": ["memory/.*"],
    },
    "Optimiser": {"learning rate": ["optim/lr.*"], "gradient norm": ["optim/grad_norm.*"]},
}


class Tile(NamedTuple):
    """What the router says of a held-out tile, and what compressing it costs."""

    position: int  # of its sample in the set
    number: int  # in its sample
    score: float  # P(compress)
    loss_ratios: list[float]  # a value per coarser ratio, coarsest first


class Dashboard(L.Callback):
    """Writes the layout once, and pictures after each validation.

    Rank 0 reads the few samples that it shows again, so that ranks exchange no images.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Keep the names of the validation sets, in the order of their loaders."""
        self._names = names
        self._tiles: list[list[Tile]] = [[] for _ in names]

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, stage: Any) -> None:
        """Arrange the charts of the tab "Custom scalars"; one by source only if there are several."""
        has_sources = trainer.datamodule.source_of(0) is not None  # type: ignore[attr-defined]
        own = {c: names for c, names in stage.charts.items() if has_sources or "_source_" not in names[0]}
        layout = {
            category: {chart: ["Multiline", names] for chart, names in charts.items()}
            for category, charts in {"Is it working?": own, **SHARED_CHARTS}.items()
        }
        for writer in writers(trainer):
            writer.add_custom_scalars(layout)

    def on_validation_start(self, *_: Any) -> None:
        """Forget the tiles of the last validation."""
        self._tiles = [[] for _ in self._names]

    def on_validation_batch_end(
        self, trainer: Any, stage: Any, out: Any, batch: RankBatch, number: int, dataloader_idx: int = 0
    ) -> None:
        """Keep what the router said of each tile."""
        for micro_batch, figures in zip(batch.micro_batches, out, strict=False):  # dummies come last
            scores, ratios = figures.get("scores"), figures.get("loss_ratios")
            if isinstance(scores, Tensor) and isinstance(ratios, Tensor):
                places = tile_places(micro_batch)
                values = zip(places, scores.tolist(), ratios.tolist(), strict=True)
                self._tiles[dataloader_idx] += [Tile(*place, score, ratio) for place, score, ratio in values]

    def on_validation_epoch_end(self, trainer: Any, stage: Any) -> None:
        """Show what rank 0 can show; the others wait for it at their next exchange."""
        of_ranks = zip(*stage.ranks.gather(self._tiles), strict=True)
        gathered = [sorted(chain.from_iterable(tiles)) for tiles in of_ranks]
        if trainer.is_global_zero and stage.validated_step == trainer.global_step:
            for writer in writers(trainer):
                for set_number, name in enumerate(self._names):
                    read = _Reader(trainer.datamodule, set_number)
                    self._show(writer, f"val/{name}", trainer, stage, read, gathered[set_number])

    def _show(
        self, writer: Any, tag: str, trainer: Any, stage: Any, read: "_Reader", tiles: list[Tile]
    ) -> None:
        step = trainer.global_step
        if tiles:
            _add_picture(writer, f"{tag}/routed_tiles", draw_routed(tiles, read), step)
            labelled, limits = label(tiles, thresholds=stage.config.thresholds)
            if labelled:
                _add_picture(writer, f"{tag}/disagreements", draw_disagreements(labelled, read), step)
                _add_picture(writer, f"{tag}/labels", draw_labels(labelled, limits), step)


class _Reader:
    """Reads samples of a validation set again, as batches of one."""

    def __init__(self, data: Any, set_number: int) -> None:
        self._batches = RankBatches(data, rank=0, world=1, held_out=data.held_out[set_number])
        self.count = min(NUM_SHOWN, data.held_out[set_number].order.count)

    def __call__(self, position: int) -> Batch:
        return self._batches.rank_batch([position]).micro_batches[0]


def writers(trainer: L.Trainer) -> list[Any]:
    """Return TensorBoard's writer, if the run has that logger."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def log_report(run_dir: Path, report: dict[str, Any]) -> None:
    """Add settings and report of a run to TensorBoard's tab "HParams"; of what is no such run, nothing."""
    recipe = run_dir / "config.yaml"
    if not recipe.is_file() or not (run_dir / "tensorboard").is_dir():
        return
    config = load_config(recipe, [])
    settings = {"stage": config.stage, "seed": config.seed, "max_steps": config.trainer.max_steps}
    for section in (config.optim, getattr(config, config.stage, None)):
        settings |= {} if section is None else asdict(section)
    figures = {
        f"report/{arm}/{name}": value
        for arm, values in report["arms"].items()
        for name, value in {
            "token_fraction": values["token_fraction"],
            "retention": values["retention"]["mean"],
            "accuracy": values["accuracy"]["mean"],
        }.items()
        if value is not None
    }
    logger = TensorBoardLogger(run_dir, name="tensorboard", version="")
    logger.log_hyperparams(settings, figures)
    logger.finalize("success")


def tile_places(batch: Batch) -> list[tuple[int, int]]:
    """Return for each tile the position of its sample and its number there; none of the dummy sample."""
    counts = map(sum, batch.tiles_per_image)
    samples = zip(batch.positions, counts, strict=True)
    return [(position, i) for position, count in samples if position >= 0 for i in range(count)]


class Labelled(NamedTuple):
    """A tile and its label."""

    tile: Tile
    keep: bool

    @property
    def error(self) -> float:
        """How much probability the router gives to the other label."""
        return self.tile.score if self.keep else 1 - self.tile.score


def label(
    tiles: Sequence[Tile], *, thresholds: Callable[[Tensor], list[float]]
) -> tuple[list[Labelled], list[float]]:
    """Label the tiles of a set by the thresholds of their own loss ratios; returns these too."""
    finite = [tile for tile in tiles if np.isfinite(tile.loss_ratios).all()]
    limits = thresholds(torch.tensor([tile.loss_ratios for tile in finite])) if finite else []
    return [Labelled(tile, bool((np.array(tile.loss_ratios) >= limits).all())) for tile in finite], limits


def draw_labels(labelled: Sequence[Labelled], limits: Sequence[float]) -> Figure:
    """Draw the distribution of loss ratios around their thresholds, and how far P(keep) can be trusted."""
    figure = Figure(figsize=(10, 4), dpi=80, layout="constrained")
    ratios, trust = figure.subplots(1, 2)
    values = np.array([one.tile.loss_ratios for one in labelled])
    bins = np.geomspace(values.min(), values.max() * 1.001, 40)
    for number, limit in enumerate(limits):  # of the coarsest ratio first, the finest one in blue
        colour = KEPT if number == len(limits) - 1 else "grey"
        ratios.hist(values[:, number], bins=bins, color=colour, alpha=0.7)
        ratios.axvline(limit, color=COMPRESSED, label=f"threshold {limit:.3g}: labelled compress below it")
    ratios.set(xscale="log", xlabel="factor of the loss under compression", ylabel="tiles")
    ratios.legend()
    keep, said = (np.array(v) for v in zip(*((o.keep, 1 - o.tile.score) for o in labelled), strict=True))
    bins = np.minimum((said * NUM_BINS).astype(int), NUM_BINS - 1)
    found = [(said[bins == b].mean(), keep[bins == b].mean()) for b in range(NUM_BINS) if (bins == b).any()]
    trust.plot([0, 1], [0, 1], color="grey", linestyle=":", label="perfectly calibrated")
    trust.plot(*zip(*found, strict=True), marker="o", color=KEPT, label="router")
    trust.set(xlabel="P(keep) of the router", ylabel="fraction of tiles labelled keep")
    trust.legend()
    return figure


def draw_routed(tiles: Sequence[Tile], read: _Reader) -> Figure:
    """Draw the first samples of a set, their tiles framed by what the router would do at `THRESHOLD`."""
    shown = [tile for tile in tiles if tile.position < read.count]
    images = {position: read(position).tiles for position in {tile.position for tile in shown}}
    cells = [
        (images[tile.position][tile.number], f"{tile.score:.2f}", tile.score < THRESHOLD) for tile in shown
    ]
    starts = [tile.number == 0 for tile in shown]
    return draw_tiles(cells, starts, title=f"P(compress); orange: compressed at {THRESHOLD}")


def draw_disagreements(labelled: Sequence[Labelled], read: _Reader) -> Figure:
    """Draw the tiles whose label the router denies most, framed by their label."""
    worst = sorted(labelled, key=lambda one: -one.error)[:NUM_DISAGREEMENTS]
    cells = [
        (read(tile.position).tiles[tile.number], f"{tile.score:.2f}, loss x {tile.loss_ratios[-1]:.3g}", keep)
        for tile, keep in worst
    ]
    title = "P(compress) and factor of the loss under compression; orange: labelled compress"
    return draw_tiles(cells, [False] * len(cells), title=title)


def draw_tiles(cells: Sequence[tuple[Tensor, str, bool]], starts: Sequence[bool], *, title: str) -> Figure:
    """Draw tiles (3, H, W) with a text and a frame: blue if kept; `starts` says where a row begins."""
    places: list[tuple[int, int]] = []
    for starts_row in starts:
        row, column = places[-1] if places else (0, -1)
        places.append((row + 1, 0) if places and (starts_row or column == COLUMNS - 1) else (row, column + 1))
    rows = places[-1][0] + 1 if places else 1
    figure = Figure(figsize=(1.4 * COLUMNS, 1.7 * rows + 0.4), dpi=80, layout="constrained")
    figure.suptitle(title, fontsize="medium")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for (row, column), (tile, text, is_kept) in zip(places, cells, strict=True):
        axes, colour = grid[row, column], KEPT if is_kept else COMPRESSED
        axes.imshow(tile.permute(1, 2, 0).cpu().numpy())
        axes.set_axis_on()
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=colour, linewidth=4)
        axes.set_title(text, color=colour, fontsize="small")
    return figure


def _add_picture(writer: Any, tag: str, figure: Figure, step: int) -> None:
    writer.add_image(tag, np.asarray(render(figure)), step, dataformats="HWC")
