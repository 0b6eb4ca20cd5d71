"""What watches a run: metrics as lines, bad records as lines, checkpoints that are never half there."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.loggers.logger import DummyExperiment, Logger, rank_zero_experiment
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

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """There is no experiment object."""
        return DummyExperiment()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Settings are in the run's config.yaml."""


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
        lines = [{"step": trainer.global_step, "id": bad.id, "reason": bad.reason} for bad in batch.bad_records]
        with self._path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        pl_module.log("data/bad_records", float(self._count), batch_size=1)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name, syncs it to disk and renames it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save; at every moment `path` is either the old checkpoint or the new one."""
        temporary = f"{path}.partial"
        super().save_checkpoint(checkpoint, temporary, storage_options)
        with Path(temporary).open("rb") as file:
            os.fsync(file.fileno())
        Path(temporary).replace(path)
