"""Lightning's side of the data: which positions this rank and this worker read."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import lightning as L
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from vico_pl.data.chat import ChatConfig, ChatEncoder
from vico_pl.data.decode import ImageLimits
from vico_pl.data.order import SampleOrder
from vico_pl.data.pipeline import build_stages, run_stages
from vico_pl.data.shards import read_index
from vico_pl.data.tiling import TilingConfig
from vico_pl.types import Batch


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A folder of shards, and how long (a curriculum) or how often (a mixture) it feeds the run."""

    path: str
    steps: int | None = None  # optimizer steps before the next source takes over; the last source has none
    weight: float | None = None  # share of the samples, of any sum over the sources; all have one or none


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it becomes batches."""

    sources: list[SourceConfig] = field(default_factory=list)  # one after the other, or mixed by weight
    batch_size: int = 16  # samples of a global batch, which is one optimizer step over all ranks
    num_workers: int = 1  # processes per rank that decode; 0: in the training process
    tiling: TilingConfig = field(default_factory=TilingConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    images: ImageLimits = field(default_factory=ImageLimits)  # what an image may cost
    max_bad_fraction: float = 0.05  # of the last 2,000 samples; if more are bad the run stops

    def __post_init__(self) -> None:
        """Refuse batches of nothing, and sources that are neither a curriculum nor a mixture."""
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size is {self.batch_size}; expected at least 1")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is {self.max_bad_fraction}; expected 0 to 1")
        if any(source.weight is not None for source in self.sources):
            _check_mixture(self.sources)
        else:
            _check_curriculum(self.sources)


class DataModule(L.LightningDataModule):
    """Gives the trainer batches, from the position that its global step implies."""

    def __init__(
        self, config: DataConfig, *, tokenizer: PreTrainedTokenizerBase, full_tokens_per_tile: int, seed: int
    ) -> None:
        """Open the shards, so that a missing one is found before anything else is built."""
        super().__init__()
        if not config.sources:
            raise ValueError("data.sources is empty; name at least one folder of shards")
        self.config = config
        self.indexes = [read_index(source.path) for source in config.sources]
        for index in self.indexes:
            if index.num_samples == 0:
                raise ValueError(f"{index.folder}: its shards hold no samples")
        self.chat = ChatEncoder(tokenizer, config.chat, full_tokens_per_tile)
        self.order = build_order(config, [index.num_samples for index in self.indexes], seed=seed)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return an endless loader that goes on at the trainer's global step."""
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("the DataModule is not attached to a Trainer")
        dataset = TrainingBatches(
            self, first_step=trainer.global_step, rank=trainer.global_rank, world=trainer.world_size
        )
        workers = self.config.num_workers
        prefetch = 4 if workers else None
        return DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=prefetch)


class TrainingBatches(IterableDataset[Batch]):
    """This rank's share of every global batch, from `first_step` on; worker k of w takes every w-th step."""

    def __init__(self, data: DataModule, *, first_step: int, rank: int, world: int) -> None:
        """Refuse a global batch that the ranks cannot share evenly."""
        super().__init__()
        size = data.config.batch_size
        if size % world:
            raise ValueError(f"data.batch_size {size} does not divide by the number of ranks, {world}")
        self.first_step, self.rank, self.share, self.batch_size = first_step, rank, size // world, size
        self.stages = build_stages(
            data.indexes,
            order=data.order,
            tiling=data.config.tiling,
            chat=data.chat,
            batch_size=self.share,
            limits=data.config.images,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end."""
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        return run_stages(self._positions(worker, num_workers), self.stages)

    def _positions(self, worker: int, num_workers: int) -> Iterator[int]:
        for step in itertools.count(self.first_step + worker, num_workers):
            start = step * self.batch_size + self.rank * self.share
            yield from range(start, start + self.share)


def build_order(config: DataConfig, sizes: list[int], *, seed: int) -> SampleOrder:
    """Return the order in which a run reads sources of `sizes` samples."""
    weights = [source.weight for source in config.sources if source.weight is not None]
    steps = itertools.accumulate(source.steps or 0 for source in config.sources[:-1])
    curriculum: list[int | None] = [*(step * config.batch_size for step in steps), None]
    return SampleOrder(
        source_sizes=sizes,
        source_ends=[None] * len(sizes) if weights else curriculum,
        seed=seed,
        weights=weights or None,
    )


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
