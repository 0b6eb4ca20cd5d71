"""What goes along with a run: records of metrics and bad records, seeds, checkpoints never half there."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from vico_pl.types import Batch


class JsonlLogger(Logger):
    """Appends every logged set of metrics as one JSON line."""

    def __init__(self, path: Path) -> None:
        """Write to `path`."""
        super().__init__()
        self._path = path

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "jsonl"

    @property
    def version(self) -> str:
        """Runs have no versions: a run folder is one run."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Settings are in the run's config.yaml."""


class StepProgressBar(TQDMProgressBar):
    """A bar over the steps of the whole run, also when the run goes on in the middle."""

    def __init__(self, title: str) -> None:
        """Show `title` before the bar."""
        super().__init__(refresh_rate=5)
        self._title = title

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the step that the run resumes from, so that speed and time left are right."""
        super().on_train_start(trainer, pl_module)
        bar = self.train_progress_bar
        bar.reset(total=trainer.max_steps)
        bar.initial = bar.n = bar.last_print_n = trainer.global_step
        bar.set_description(self._title)

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """There are no epochs to show: a run is one count of steps."""


class BadRecordLog(L.Callback):
    """Appends each bad record of a training batch to `bad_records.jsonl` and counts them."""

    def __init__(self, path: Path) -> None:
        """Write to `path`."""
        self._path = path
        self._count = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Write the bad records of the batch just used."""
        if not batch.bad_records:
            return
        self._count += len(batch.bad_records)
        step = trainer.global_step
        lines = [{"step": step, "id": bad.id, "reason": bad.reason} for bad in batch.bad_records]
        with self._path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        pl_module.log("data/bad_records", float(self._count), batch_size=1)


class StepSeed(L.Callback):
    """Seeds torch at each step from (seed, step, rank): a resumed run drops out what an unbroken one does."""

    def __init__(self, seed: int) -> None:
        """Derive all seeds from `seed`."""
        self._seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Seed the generator that dropout draws from."""
        entropy = [self._seed, trainer.global_step, trainer.global_rank, 1]  # 1: not that of the ratio draw
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name, syncs it to disk and renames it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save; at every moment `path` is either the old checkpoint or the new one."""
        temporary = f"{path}.partial"
        super().save_checkpoint(checkpoint, temporary, storage_options)
        with Path(temporary).open("rb") as file:
            os.fsync(file.fileno())
        Path(temporary).replace(path)
