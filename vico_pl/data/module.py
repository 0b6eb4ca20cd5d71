"""Lightning's side of the data: which positions this rank and this worker read."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import lightning as L
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from vico_pl.data.chat import ChatConfig, ChatEncoder
from vico_pl.data.order import SampleOrder
from vico_pl.data.pipeline import build_stages, run_stages
from vico_pl.data.shards import read_index
from vico_pl.data.tiling import TilingConfig
from vico_pl.types import Batch


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A folder of shards and how long it feeds the run."""

    path: str
    steps: int | None = None  # optimizer steps before the next source takes over; the last source has none


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it becomes batches."""

    sources: list[SourceConfig] = field(default_factory=list)  # one after the other
    batch_size: int = 16  # samples of a global batch, which is one optimizer step over all ranks
    num_workers: int = 1  # processes per rank that decode; 0: in the training process
    tiling: TilingConfig = field(default_factory=TilingConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)

    def __post_init__(self) -> None:
        """Refuse sources that would never be left or never be reached."""
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size is {self.batch_size}; expected at least 1")
        for source in self.sources[:-1]:
            if source.steps is None:
                raise ValueError(f"data.sources: {source.path} needs 'steps', as another source follows it")


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
        steps = list(itertools.accumulate(source.steps or 0 for source in config.sources[:-1]))
        self.order = SampleOrder(
            source_sizes=[index.num_samples for index in self.indexes],
            source_ends=[step * config.batch_size for step in steps] + [None],
            seed=seed,
        )

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
            data.indexes, order=data.order, tiling=data.config.tiling, chat=data.chat, batch_size=self.share
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
