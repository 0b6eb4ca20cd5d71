"""The DataModule: which positions of the order this rank and this worker read."""

import itertools
import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from vico_pl.data.chat import ChatConfig, ChatEncoder
from vico_pl.data.decode import ImageLimits
from vico_pl.data.order import SampleOrder, SourceShape
from vico_pl.data.packing import (
    MicroBatchLimits,
    SampleCost,
    assign_to_ranks,
    estimated_tiles,
    split_into_micro_batches,
)
from vico_pl.data.pipeline import build_stages, run_stages
from vico_pl.data.shards.cache import StreamingConfig
from vico_pl.data.shards.reader import ShardIndex, read_index
from vico_pl.data.tiling import TilingConfig
from vico_pl.errors import STOP_SIGNALS
from vico_pl.types import RankBatch


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A set of shards, and how long (a curriculum) or how often (a mixture) the run reads it."""

    path: str  # a folder, glob, brace range or URL of shards, see data/README.md
    steps: int | None = None  # optimizer steps before the next source takes over; the last source has none
    weight: float | None = None  # relative share of the samples; all sources have one or none has


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it becomes optimizer steps."""

    sources: list[SourceConfig] = field(default_factory=list)  # one after the other, or mixed by weight
    batch_size: int = 16  # samples of a global batch, which is one optimizer step over all ranks
    num_workers: int = 1  # processes per rank that decode; 0: in the training process
    tiling: TilingConfig = field(default_factory=TilingConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    micro_batch: MicroBatchLimits = field(
        default_factory=MicroBatchLimits
    )  # limits of what goes through the model at a time
    images: ImageLimits = field(default_factory=ImageLimits)  # of a file and of its pixels
    streaming: StreamingConfig = field(default_factory=StreamingConfig)  # of URLs and compressed shards
    max_bad_fraction: float = 0.05  # of the last 2,000 samples; if more are bad the run stops

    def __post_init__(self) -> None:
        """Reject empty batches, and sources that are neither a curriculum nor a mixture."""
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size is {self.batch_size}; expected at least 1")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is {self.max_bad_fraction}; expected 0 to 1")
        if any(source.weight is not None for source in self.sources):
            _check_mixture(self.sources)
        else:
            _check_curriculum(self.sources)


class DataModule(L.LightningDataModule):
    """Gives the trainer rank batches, from the position that follows from its global step."""

    def __init__(
        self,
        config: DataConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        full_tokens_per_tile: int,
        seed: int,
        cost: SampleCost | None = None,
    ) -> None:
        """Open the shards. Samples are assigned to ranks by `cost`; default: tokens at full vision tokens."""
        super().__init__()
        if not config.sources:
            raise ValueError("data.sources is empty; name at least one folder of shards")
        self.config = config
        self.indexes = open_sources(config)
        self.chat = ChatEncoder(tokenizer, config.chat, full_tokens_per_tile)
        self.order = build_order(config, self.indexes, seed=seed)
        self.cost = cost or partial(_num_tokens, tokens_per_tile=full_tokens_per_tile)

    def train_dataloader(self) -> DataLoader[RankBatch]:
        """Return an endless loader that starts at the trainer's global step."""
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("the DataModule is not attached to a Trainer")
        dataset = RankBatches(
            self, first_step=trainer.global_step, rank=trainer.global_rank, world=trainer.world_size
        )
        workers = self.config.num_workers
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_stop_signals,
        )


class RankBatches(IterableDataset[RankBatch]):
    """The rank batch of every step from `first_step` on; worker k of w makes every w-th."""

    def __init__(self, data: DataModule, *, first_step: int, rank: int, world: int) -> None:
        """Serve one rank of `world`. Worker processes get neither trainer nor model."""
        super().__init__()
        self.first_step, self.rank, self.world = first_step, rank, world
        self.config, self.indexes, self.order = data.config, data.indexes, data.order
        self.chat, self.cost = data.chat, data.cost
        self.stages = build_stages(
            data.indexes,
            order=data.order,
            tiling=data.config.tiling,
            chat=data.chat,
            cost=data.cost,
            image_limits=data.config.images,
            micro_batch_limits=data.config.micro_batch,
        )

    def __iter__(self) -> Iterator[RankBatch]:
        """Yield rank batches without end."""
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        for step in itertools.count(self.first_step + worker, num_workers):
            positions, num_micro_batches = self.rank_positions(step)
            yield from run_stages(positions, self.stages, min_micro_batches=num_micro_batches)

    def rank_positions(self, step: int) -> tuple[list[int], int]:
        """Return this rank's positions of a step, and how many micro-batches to make of them at least.

        All ranks compute the same assignment from the same estimates, so each knows the largest number of
        micro-batches of any rank.
        """
        size = self.config.batch_size
        positions = range(step * size, (step + 1) * size)
        if self.world == 1:
            return list(positions), 1
        estimates = [self._estimate(position) for position in positions]
        assigned = assign_to_ranks([cost for cost, _, _ in estimates], self.world)
        counts = [self._num_micro_batches([estimates[i] for i in indices]) for indices in assigned]
        return [positions[index] for index in assigned[self.rank]], max(counts)

    def _num_micro_batches(self, estimates: Sequence[tuple[float, int, int]]) -> int:
        costs = [cost for cost, _, _ in estimates]
        tiles, tokens = [tiles for _, tiles, _ in estimates], [tokens for _, _, tokens in estimates]
        return len(split_into_micro_batches(costs, tiles, tokens, self.config.micro_batch))

    def _estimate(self, position: int) -> tuple[float, int, int]:
        """Return estimated cost, tiles and tokens of a sample, without reading it."""
        place = self.order(position)
        size = self.indexes[place.source].size_of(place.sample)
        tiles_per_image = estimated_tiles(size, self.config.tiling)
        text, num_tiles = size.text_tokens, sum(tiles_per_image)
        cost = self.cost(position, tiles_per_image, text)
        return cost, num_tiles, text + num_tiles * self.chat.full_tokens_per_tile


def ignore_stop_signals(_: int) -> None:
    """Let a worker outlive signals to the whole process group: the run still needs its batches to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def open_sources(config: DataConfig) -> list[ShardIndex]:
    """Open the sources of a run.

    Raises:
        ValueError: one is absent, damaged or without samples.
    """
    indexes = [read_index(source.path, streaming=config.streaming) for source in config.sources]
    for index in indexes:
        if index.num_samples == 0:
            raise ValueError(f"{index.folder}: its shards hold no samples")
    return indexes


def build_order(config: DataConfig, indexes: Sequence[ShardIndex], *, seed: int) -> SampleOrder:
    """Return the order in which a run reads its sources."""
    weights = [source.weight for source in config.sources if source.weight is not None]
    steps = itertools.accumulate(source.steps or 0 for source in config.sources[:-1])
    curriculum: list[int | None] = [*(step * config.batch_size for step in steps), None]
    shapes = [
        SourceShape(
            shard_sizes=tuple(index.shard_sizes),
            window=config.streaming.window if index.is_streamed else None,
        )
        for index in indexes
    ]
    return SampleOrder(
        sources=shapes,
        source_ends=[None] * len(indexes) if weights else curriculum,
        seed=seed,
        weights=weights or None,
    )


def _num_tokens(_: int, tiles_per_image: Sequence[int], text_tokens: int, *, tokens_per_tile: int) -> float:
    return float(text_tokens + sum(tiles_per_image) * tokens_per_tile)


def _check_curriculum(sources: list[SourceConfig]) -> None:
    for source in sources[:-1]:
        if source.steps is None:
            raise ValueError(f"data.sources: {source.path} needs 'steps', as another source follows it")


def _check_mixture(sources: list[SourceConfig]) -> None:
    for source in sources:
        if source.steps is not None:
            raise ValueError(
                f"data.sources: {source.path} has 'steps' where sources have a 'weight'; they either follow "
                "each other by steps or are mixed by weight"
            )
        if source.weight is None:
            raise ValueError(f"data.sources: {source.path} needs a 'weight', as other sources have one")
        if not 0 < source.weight < math.inf:
            raise ValueError(
                f"data.sources: {source.path} has weight {source.weight}; expected a number above 0"
            )
