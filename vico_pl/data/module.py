"""The DataModule, and the path of a sample: position -> record -> sample -> tiles -> token ids -> batch."""

import itertools
import math
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import lightning as L
import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from vico_pl.data.chat import ChatConfig, ChatEncoder
from vico_pl.data.collate import MicroBatchLimits, SampleCost, SampleLoad, assign, collate, keep_limits
from vico_pl.data.decode import ImageLimits, bad_record, decode_record, with_caption
from vico_pl.data.order import EvenOrder, SampleOrder, SourceShape
from vico_pl.data.shards.cache import StreamingConfig
from vico_pl.data.shards.reader import RecordReader, read_index
from vico_pl.data.shards.shard import MAX_OPEN, ShardIndex
from vico_pl.data.tiling import TilingConfig, estimated_tiles, tile_sample
from vico_pl.errors import STOP_SIGNALS, RecordError, check_settings
from vico_pl.types import BadRecord, EncodedSample, RankBatch, TiledSample

Item = tuple[int, Any]  # a position and what it has become so far; a bad record keeps its position


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A set of shards, and how long (a curriculum) or how often (a mixture) the run reads it."""

    path: str  # a folder, glob, brace range or URL of shards, see data/README.md
    steps: int | None = None  # optimizer steps before the next source takes over; the last source has none
    weight: float | None = None  # relative share of the samples; all sources have one or none has
    caption_prompt: str | None = None  # question of records that have a caption (KEY.txt), no conversation


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """A held-out set; each validation uses the same of its samples, spread evenly, in the same order."""

    name: str  # in the names of its metrics, val/NAME/...
    path: str  # as that of a source
    max_samples: int = 256  # of the set
    answers: int = 4  # of these, whose questions are answered and scored as well; none under fsdp
    caption_prompt: str | None = None  # as that of a source

    def __post_init__(self) -> None:
        check_settings(
            f"data.validation '{self.name}'",
            self,
            name=(re.fullmatch(r"[\w-]+", self.name, re.ASCII) is not None, "letters, digits, _ and -"),
            max_samples=(self.max_samples >= 1, "1 or more"),
            answers=(self.answers >= 0, "0 or more"),
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it becomes optimizer steps."""

    sources: list[SourceConfig] = field(default_factory=list)  # one after the other, or mixed by weight
    validation: list[ValidationConfig] = field(default_factory=list)  # every trainer.validate_every steps
    batch_size: int = 16  # samples of a global batch, which is one optimizer step over all ranks
    num_workers: int = 1  # processes per rank that decode; 0: in the training process
    tiling: TilingConfig = field(default_factory=TilingConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    micro_batch: MicroBatchLimits = field(default_factory=MicroBatchLimits)  # what the model gets at a time
    images: ImageLimits = field(default_factory=ImageLimits)  # of a file and of its pixels
    streaming: StreamingConfig = field(default_factory=StreamingConfig)  # of URLs and compressed shards
    max_bad_fraction: float = 0.05  # of the last 2,000 samples; if more are bad the run stops

    def __post_init__(self) -> None:
        fraction = (0 <= self.max_bad_fraction <= 1, "0 to 1")
        size = (self.batch_size >= 1, "1 or more")
        check_settings("data", self, batch_size=size, max_bad_fraction=fraction)
        names = [entry.name for entry in self.validation]
        for name in {name for name in names if names.count(name) > 1}:
            raise ValueError(f"data.validation names '{name}' twice; their metrics need names of their own")
        _check_sources(self.sources)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A validation set, opened."""

    indexes: list[ShardIndex]  # one
    order: EvenOrder
    prompts: list[str | None]


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
        max_positions: int | None = None,
    ) -> None:
        """Open the shards. Samples are assigned by `cost`; default: tokens at full vision tokens.

        Samples of more tokens than `max_positions`, those of the language model, are bad records.
        """
        super().__init__()
        self.config, self.cost = config, cost
        self.indexes = open_sources(config)
        self.chat = ChatEncoder(tokenizer, config.chat, full_tokens_per_tile, max_positions)
        self.order = build_order(config, self.indexes, seed=seed)
        self.prompts = [source.caption_prompt for source in config.sources]
        self._source_names = _source_names(self.indexes)
        self.held_out = [self._open(entry) for entry in config.validation]

    def source_of(self, position: int) -> str | None:
        """Name the source of a position; None: the run has only one, or the position is the dummy's."""
        if position < 0 or not self._source_names:
            return None
        return self._source_names[self.order(position).source]

    def train_dataloader(self) -> DataLoader[RankBatch]:
        """Return an endless loader that starts at the trainer's global step."""
        assert self.trainer is not None  # which asks for the loader
        return self._loader(first_step=self.trainer.global_step)

    def val_dataloader(self) -> list[DataLoader[RankBatch]]:
        """Return a loader for each validation set; the last step of a set has what remains of it."""
        return [self._loader(held_out=held_out) for held_out in self.held_out]

    def _loader(self, **settings: Any) -> DataLoader[RankBatch]:
        trainer, workers = self.trainer, self.config.num_workers
        assert trainer is not None
        return DataLoader(
            RankBatches(self, rank=trainer.global_rank, world=trainer.world_size, **settings),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_stop_signals,
        )

    def _open(self, entry: ValidationConfig) -> HeldOut:
        """Open a validation set; one sample of it must have an answer that can be read."""
        index = read_index(entry.path, streaming=self.config.streaming, max_open=8)  # read in order
        order = EvenOrder(size=index.num_samples, count=min(entry.max_samples, index.num_samples))
        held_out = HeldOut(indexes=[index], order=order, prompts=[entry.caption_prompt])
        batches = RankBatches(self, rank=0, world=1, held_out=held_out)
        firsts = (batches.rank_batch([position]).micro_batches[0] for position in range(order.count))
        if not any(batch.num_response_tokens for batch in firsts):
            unusable = f"{index.folder}: none of {order.count} samples can be read and has an answer"
            raise ValueError(f"data.validation '{entry.name}': {unusable}; see 'vico shards check'")
        return held_out


class RankBatches(IterableDataset[RankBatch]):
    """The rank batch of every step from `first_step` on; worker k of w makes every w-th.

    Those of the run have no end; those of a validation set end with its last sample.
    """

    def __init__(
        self, data: DataModule, *, rank: int, world: int, first_step: int = 0, held_out: HeldOut | None = None
    ) -> None:
        """Serve one rank of `world`. Worker processes get neither trainer nor model."""
        super().__init__()
        self.first_step, self.rank, self.world = first_step, rank, world
        source = data if held_out is None else held_out
        self.config, self.indexes, self.order = data.config, source.indexes, source.order
        self.num_positions = sys.maxsize if held_out is None else held_out.order.count
        self.chat, self.cost = data.chat, data.cost
        side = data.config.tiling.tile_size
        tile = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        black = TiledSample(id="", tiles=tile, tiles_per_image=[1], turns=[], metadata={})
        self.dummy = data.chat.encode_prompt(black, "<image>")  # no response
        self.stages: list[Callable[[Iterable[Any]], Iterator[Item]]] = [
            partial(
                read, order=self.order, readers=list(map(RecordReader, self.indexes)), prompts=source.prompts
            ),
            partial(apply, function=partial(decode_record, limits=data.config.images)),
            partial(apply, function=partial(tile_sample, config=data.config.tiling)),
            partial(apply, function=data.chat.encode),
        ]

    def __iter__(self) -> Iterator[RankBatch]:
        """Yield rank batches."""
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        num_steps = -(-self.num_positions // self.config.batch_size)
        for step in range(self.first_step + worker, num_steps, num_workers):
            yield self.rank_batch(*self.rank_positions(step))

    def rank_positions(self, step: int) -> tuple[list[int], list[list[int]]]:
        """Return this rank's positions of a step, and its micro-batches of them as planned by estimates.

        All ranks compute the same assignment. One rank waits for no other, so it plans nothing: it makes its
        micro-batches of what it has read.
        """
        size = self.config.batch_size
        positions = range(step * size, min((step + 1) * size, self.num_positions))
        if self.world == 1:
            return list(positions), []
        loads = list(map(self._estimate, positions))
        assigned = assign(loads, self.config.micro_batch, num_ranks=self.world)[self.rank]
        planned = [[positions[index] for index in samples] for samples in assigned]
        return sorted(itertools.chain(*planned)), planned

    def rank_batch(self, positions: Sequence[int], planned: Sequence[Sequence[int]] = ()) -> RankBatch:
        """Read samples and batch them, if possible as planned.

        Every micro-batch has a tile and every rank batch a micro-batch, if necessary the dummy sample's, so
        that all ranks run the same parts of the model. The dummy adds nothing to the gradients.
        """
        items = list(wds.DataPipeline(partial(iter, positions), *self.stages))
        good = {position: item for position, item in items if isinstance(item, EncodedSample)}
        loads = {
            position: self._load(position, sample.tiles_per_image, len(sample.input_ids) - len(sample.tiles))
            for position, sample in good.items()
        }
        micro_batches = []
        for chosen in keep_limits(planned, loads, self.config.micro_batch) or [[]]:
            has_tile = any(loads[position].tiles for position in chosen)
            members = chosen if has_tile else [*chosen, -1]
            samples = [good.get(position, self.dummy) for position in members]
            micro_batches.append(collate(samples, positions=members))
        bad = [replace(item, source=self._source(p)) for p, item in items if isinstance(item, BadRecord)]
        dummy = collate([self.dummy], positions=[-1])
        return RankBatch(micro_batches=micro_batches, bad_records=bad, dummy=dummy)

    def _source(self, position: int) -> str:
        return str(self.indexes[self.order(position).source].folder)

    def _estimate(self, position: int) -> SampleLoad:
        """Return the load of a sample without reading it."""
        place = self.order(position)
        size = self.indexes[place.source].size_of(place.sample)
        return self._load(position, estimated_tiles(size, self.config.tiling), size.text_tokens)

    def _load(self, position: int, tiles_per_image: list[int], text_tokens: int) -> SampleLoad:
        tiles = sum(tiles_per_image)
        tokens = text_tokens + tiles * self.chat.full_tokens_per_tile
        cost = float(tokens) if self.cost is None else self.cost(position, tiles_per_image, text_tokens)
        return SampleLoad(cost, tiles, tokens)


def read(
    positions: Iterable[int],
    *,
    order: SampleOrder | EvenOrder,
    readers: Sequence[RecordReader],
    prompts: Sequence[str | None],
) -> Iterator[Item]:
    """Turn positions into raw records, and let each reader prefetch the shards that come next."""
    for position in positions:
        place = order(position)
        reader = readers[place.source]
        reader.expect(order.shards_after(position))
        try:
            yield position, with_caption(reader(place.sample), prompts[place.source])
        except RecordError as error:
            yield position, bad_record(f"source {place.source}, sample {place.sample}", error)


def apply(source: Iterable[Item], *, function: Callable[[Any], Any]) -> Iterator[Item]:
    """Apply `function` to each item; one that raises `RecordError` becomes a `BadRecord` in its place."""
    for position, item in source:
        try:
            yield position, item if isinstance(item, BadRecord) else function(item)
        except RecordError as error:
            yield position, bad_record(item.id, error)


def ignore_stop_signals(_: int) -> None:
    """Let a worker outlive signals to the whole process group: the run still needs its batches to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def open_sources(config: DataConfig) -> list[ShardIndex]:
    """Open the sources of a run.

    Raises:
        ValueError: one is absent, damaged or without samples.
    """
    max_open = max(1, MAX_OPEN // max(1, len(config.sources)))
    indexes = [
        read_index(source.path, streaming=config.streaming, max_open=max_open) for source in config.sources
    ]
    for index in indexes:
        if index.num_samples == 0:
            raise ValueError(f"{index.folder}: its shards hold no samples")
    return indexes


def _source_names(indexes: Sequence[ShardIndex]) -> list[str]:
    """Name sources by their last folders, numbered if these are the same; none if there is only one."""
    names = [re.sub(r"[^\w.-]+", "_", str(index.folder).rstrip("/").split("/")[-1]) for index in indexes]
    if len(names) == len(set(names)):
        return names if len(names) > 1 else []
    return [f"{name}_{number}" for number, name in enumerate(names)]


def build_order(config: DataConfig, indexes: Sequence[ShardIndex], *, seed: int) -> SampleOrder:
    """Return the order in which a run reads its sources."""
    window = config.streaming.window
    windows = [window if index.is_streamed else None for index in indexes]
    shapes = [SourceShape(shard_sizes=i.shard_sizes, window=w) for i, w in zip(indexes, windows, strict=True)]
    weights = [source.weight for source in config.sources if source.weight is not None]
    if weights:
        return SampleOrder(sources=shapes, source_ends=[None] * len(shapes), seed=seed, weights=weights)
    steps = itertools.accumulate(source.steps or 0 for source in config.sources[:-1])
    ends = [*(number * config.batch_size for number in steps), None]
    return SampleOrder(sources=shapes, source_ends=ends, seed=seed)


def _check_sources(sources: Sequence[SourceConfig]) -> None:
    """Reject sources that are neither a curriculum nor a mixture."""
    is_mixture = any(source.weight is not None for source in sources)
    for number, source in enumerate(sources, start=1):
        name = f"data.sources: {source.path}"
        if not is_mixture:
            if source.steps is None and number < len(sources):
                raise ValueError(f"{name} needs 'steps', as another source follows it")
        elif source.steps is not None:
            choice = "they either follow each other by steps or are mixed by weight"
            raise ValueError(f"{name} has 'steps' where sources have a 'weight'; {choice}")
        elif source.weight is None:
            raise ValueError(f"{name} needs a 'weight', as other sources have one")
        elif not 0 < source.weight < math.inf:
            raise ValueError(f"{name} has weight {source.weight}; expected a number above 0")
