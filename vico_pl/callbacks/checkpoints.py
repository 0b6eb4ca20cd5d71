"""Atomic checkpoints, every n steps and at the last step before a run stops."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from vico_pl.callbacks.sharded import META, check_room, folder_fault, read_checkpoint
from vico_pl.files import atomic_path, remove, restore_replaced

# What torch and zipfile raise on truncated, empty or foreign files.
_FAULTS = (RuntimeError, OSError, ValueError, EOFError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)


class StepCheckpoint(ModelCheckpoint):
    """Keeps the last `keep` checkpoints of every `every` steps; `last.ckpt` links to the newest."""

    def __init__(self, folder: Path, *, every: int, keep: int) -> None:
        super().__init__(
            dirpath=folder,
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every,
            save_top_k=keep,
            monitor="step",
            mode="max",
            save_last="link",
            enable_version_counter=False,  # a repeated step replaces its checkpoint
        )

    @property
    def state_key(self) -> str:
        """Key of its state; Lightning's own changes with the settings, which would lose the state."""
        return type(self).__name__

    def on_train_start(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        """Remove what earlier, killed attempts left behind."""
        super().on_train_start(trainer, stage)
        folder = Path(str(self.dirpath))
        if trainer.is_global_zero:
            restore_replaced(folder)
        old = [
            path
            for path in folder.glob("step-*.ckpt")
            if int(path.stem.removeprefix("step-")) < trainer.global_step
            and str(path) not in self.best_k_models
        ]
        for path in (*folder.glob("*.partial"), *old):
            trainer.strategy.remove_checkpoint(path)

    def on_train_batch_end(self, trainer: L.Trainer, stage: Any, out: Any, *rest: Any) -> None:
        """Save every n-th step, and the step after which the run stops."""
        if out["stop"]:
            self._every_n_train_steps = 1
        super().on_train_batch_end(trainer, stage, out, *rest)


class BestCheckpoint(ModelCheckpoint):
    """Keeps in `best.ckpt` the weights of the step at which a metric of the validation was best."""

    def __init__(self, folder: Path, *, metric: str, mode: str) -> None:
        super().__init__(
            dirpath=folder,
            filename="best",
            monitor=metric,
            mode=mode,
            save_weights_only=True,
            save_on_train_epoch_end=False,
            enable_version_counter=False,  # a better one replaces it
        )

    def on_validation_end(self, trainer: L.Trainer, stage: Any) -> None:
        """Save if the metric is better than ever.

        Raises:
            ValueError: there is no such metric.
        """
        known = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        if stage.validated_step != trainer.global_step:  # interrupted: the metrics are old ones
            return
        if self.monitor not in known:
            raise ValueError(f"trainer.best_metric is '{self.monitor}'; expected one of {', '.join(known)}")
        super().on_validation_end(trainer, stage)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name, syncs it to disk and renames it; reads folders, too."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save; at any moment `path` is either the old checkpoint or the new one.

        Lightning's own way builds the whole file in memory and writes it to the temporary folder first, whose
        free space nobody has checked.

        Raises:
            ValueError: the disk is too full; earlier checkpoints are unchanged.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(checkpoint, path.parent)
        try:
            with atomic_path(path) as temporary:
                torch.save(checkpoint, temporary)
        except (OSError, RuntimeError) as error:
            reason = f"{path} could not be written ({error})"
            raise ValueError(f"{reason}; the previous checkpoint is intact") from error

    def load_checkpoint(self, path: Any, *args: Any, **settings: Any) -> dict[str, Any]:
        """Load a file, or a folder that sharded ranks wrote."""
        if Path(path).is_dir():
            return read_checkpoint(Path(path))
        return super().load_checkpoint(path, *args, **settings)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file, or a folder as a whole: killed in between, it leaves none under its name."""
        path = Path(path)
        if path.is_dir() and path.suffix != ".partial":
            path = path.replace(path.with_name(f".{path.name}.removed.partial"))
        remove(path)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest readable checkpoint of a run; warn about unreadable ones."""
    for path in sorted((run_dir / "checkpoints").glob("step-*.ckpt"), reverse=True):
        fault = checkpoint_fault(path)
        if fault is None:
            return path
        rank_zero_warn(f"{path} is skipped: it cannot be read ({fault})")
    return None


def checkpoint_fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None; tensors stay on disk."""
    folder = path.is_dir()
    try:
        fault = folder_fault(path) if folder else None
        state = torch.load(path / META if folder else path, mmap=True, weights_only=True, map_location="cpu")
    except _FAULTS as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    if fault is not None:
        return fault
    return None if isinstance(state, dict) and "global_step" in state else "it has no training state"
