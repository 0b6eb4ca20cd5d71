"""Checkpoints that are whole or not there, at chosen steps and when the run is told to stop."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

# What torch and zipfile raise on files that are cut short, empty or of other content.
_UNREADABLE = (
    RuntimeError,
    OSError,
    ValueError,
    EOFError,
    KeyError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


class StepCheckpoint(ModelCheckpoint):
    """Keeps the newest checkpoints, `last.ckpt` a link to the newest of all."""

    def __init__(self, folder: Path, *, every: int, keep: int) -> None:
        """Save into `folder` every so many steps."""
        super().__init__(
            dirpath=folder,
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every,
            save_top_k=keep,
            monitor="step",
            mode="max",
            save_last="link",
            enable_version_counter=False,  # a step that is taken again replaces its checkpoint
        )

    @property
    def state_key(self) -> str:
        """Name its state in checkpoints; the usual name changes with the settings, and the state is lost."""
        return type(self).__name__

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove what a killed attempt wrote and no longer could remove: it would add up with each one."""
        super().on_train_start(trainer, pl_module)
        folder = Path(str(self.dirpath))
        for path in (*folder.glob("*.partial"), *folder.glob("step-*.ckpt")):
            is_partial = path.suffix == ".partial"
            if is_partial or (_step(path) < trainer.global_step and str(path) not in self.best_k_models):
                trainer.strategy.remove_checkpoint(path)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at every n-th step, and at the one after which the run stops."""
        if outputs["stop"]:
            self._every_n_train_steps = 1
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name, syncs it to disk and renames it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save; at every moment `path` is either the old checkpoint or the new one.

        Not by Lightning's own way, which puts the whole file together in memory and then writes it to the
        folder for temporary files first, where nobody looked for room.

        Raises:
            ValueError: the disk has no room; what was saved before is as it was.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.partial")
        _check_room(checkpoint, path.parent)
        try:
            torch.save(checkpoint, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            raise ValueError(f"{path} could not be written ({error}); the one before is whole") from error
        temporary.replace(path)
        _sync_folder(path.parent)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint of a run with the most steps; a warning names those that cannot be read."""
    paths = sorted((run_dir / "checkpoints").glob("step-*.ckpt"), key=lambda path: path.name, reverse=True)
    for path in paths:
        fault = _fault(path)
        if fault is None:
            return path
        rank_zero_warn(f"{path} is passed over, as it cannot be read ({fault})")
    return None


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _fault(path: Path) -> str | None:
    """Say what is wrong with a checkpoint, by its table of contents and its numbers; tensors stay on disk."""
    try:
        state = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except _UNREADABLE as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None if isinstance(state, dict) and "global_step" in state else "it holds no training state"


def _check_room(checkpoint: dict[str, Any], folder: Path) -> None:
    needed = sum(t.numel() * t.element_size() for t in _tensors(checkpoint))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder}: {free / 2**30:.1f} GiB are free and a checkpoint needs {needed / 2**30:.1f}; "
            "make room, or lower trainer.keep_checkpoints; the same command goes on from the one before"
        )


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for item in inner for tensor in _tensors(item)]


def _sync_folder(folder: Path) -> None:
    """Make a renamed file survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
