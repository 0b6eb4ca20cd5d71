"""Checkpoints of sharded weights: a folder to which each rank writes its part.

    step-00000100.ckpt/
        meta.pt         what is no tensor, and the size of each other file; written last
        .metadata       which part of which tensor is where
        __0_0.distcp    the part of rank 0, and so on

Any number of ranks reads it, with or without sharding: tensors are named by parameter.
"""

import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils._pytree import tree_leaves

from vico_pl.files import publish, remove

META, INDEX = "meta.pt", ".metadata"
_WEIGHT, _OPTIMIZER = "weight/", "optimizer/"
# What torch's index of a folder, a pickle, is made of besides dtypes and the classes of its own module.
_INDEX_MODULE = "torch.distributed.checkpoint.metadata"
_INDEX_NAMES = {
    *(("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout")),
    *(("torch", "Size"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")),
}


class ShardedStrategy(ModelParallelStrategy):
    """FSDP whose ranks write their parts of a checkpoint themselves, without a copy in host memory."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the weights, where it is; Lightning's own copies it to the host."""
        return get_model_state_dict(self._stage)

    def optimizer_state(self, optimizer: Any) -> Any:
        """Return this rank's part of the optimizer state, by parameter name."""
        return get_optimizer_state_dict(self._stage, getattr(optimizer, "_optimizer", optimizer))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save; at any moment `filepath` is absent, the old checkpoint or the new one. A collective call.

        Raises:
            ValueError: the disk is too full or cannot be written; earlier checkpoints are unchanged.
        """
        path = Path(self.broadcast(filepath))
        temporary = path.with_name(f".{path.name}.partial")
        states = checkpoint.pop("optimizer_states", [])
        tensors = _named(checkpoint.pop("state_dict"), states)
        if states:
            checkpoint["param_groups"] = states[0]["param_groups"]
        try:
            self._on_first(lambda: _begin(temporary, tensors))
            save(tensors, storage_writer=FileSystemWriter(temporary))
            self._on_first(lambda: _finish(temporary, path, checkpoint))
        except (CheckpointException, OSError, RuntimeError) as error:
            reason = f"{path} could not be written ({_sentence(error)})"
            raise ValueError(f"{reason}; the previous checkpoint is intact") from error
        finally:
            if self.is_global_zero:
                remove(temporary)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **settings: Any) -> dict[str, Any]:
        """Load this rank's part of a folder, or of a file that an earlier version or one process wrote.

        Raises:
            ValueError: the folder lacks something that is trained.
        """
        path = Path(self.broadcast(checkpoint_path))
        if path.is_file():
            return super().load_checkpoint(path, *args, **settings)
        checkpoint, reader = _read_meta(path), FileSystemReader(path)
        known = reader.read_metadata().state_dict_metadata
        weights = {n: t for n, t in get_model_state_dict(self._stage).items() if _WEIGHT + n in known}
        (optimizer,) = self.optimizers
        states = get_optimizer_state_dict(self._stage, optimizer)
        try:
            load(_named(weights, [states]), storage_reader=reader)
        except CheckpointException as error:
            raise ValueError(f"{path} does not fit this run ({_sentence(error)})") from error
        self._stage.load_state_dict(weights, strict=self._stage.strict_loading)
        states["param_groups"] = checkpoint.pop("param_groups")
        set_optimizer_state_dict(self._stage, optimizer, states)
        return checkpoint

    @property
    def _stage(self) -> Any:
        return self.lightning_module

    def _on_first(self, act: Callable[[], None]) -> None:
        """Act on the first rank; what it raises is raised on all ranks."""
        problem: Exception | None = None
        if self.is_global_zero:
            try:
                act()
            except (ValueError, OSError, RuntimeError) as error:
                problem = error
        problem = self.broadcast(problem)
        if problem is not None:
            raise problem


def read_checkpoint(path: Path, *, optimizer: bool = True) -> dict[str, Any]:
    """Read a checkpoint, file or folder, as one process writes it; tensors of a file stay on disk."""
    if not path.is_dir():
        state: dict[str, Any] = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        return state
    checkpoint, reader = _read_meta(path), FileSystemReader(path)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and (optimizer or name.startswith(_WEIGHT))
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
        load(tensors, storage_reader=reader, no_dist=True)
    checkpoint["state_dict"], state = {}, {}
    for key, tensor in tensors.items():
        if key.startswith(_WEIGHT):
            checkpoint["state_dict"][key.removeprefix(_WEIGHT)] = tensor
        else:
            name, _, quantity = key.removeprefix(_OPTIMIZER).rpartition("/")
            state.setdefault(name, {})[quantity] = tensor
    groups = checkpoint.pop("param_groups", None)
    if groups is not None and optimizer:  # an optimizer takes any keys that its groups name in order
        checkpoint["optimizer_states"] = [{"state": state, "param_groups": groups}]
    return checkpoint


class _IndexReader(pickle.Unpickler):
    """Reads an index without running code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what an index may name."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_own = module == _INDEX_MODULE and "." not in name  # "os.system" would be what it imports
        if is_dtype or is_own or (module, name) in _INDEX_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{INDEX} names {module}.{name}, which no index of torch does")


def folder_fault(path: Path) -> str | None:
    """Return which file of a checkpoint folder is missing or truncated, or None.

    Raises:
        OSError: there is no meta.pt or index; UnpicklingError and others of `torch.load`: it is damaged.
    """
    files = torch.load(path / META, weights_only=True)["files"]
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, expected {size}"
    with (path / INDEX).open("rb") as index:
        _IndexReader(index).load()
    return None


def check_room(tensors: Any, folder: Path) -> None:
    """Raise ValueError if a disk has no room for tensors; sharded ones count in full."""
    needed = sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder}: {free >> 20:,} MiB are free and a checkpoint needs {-(-needed >> 20):,}; "
            "make room, or lower trainer.keep_checkpoints; the same command resumes from the previous one"
        )


def _named(weights: dict[str, Any], optimizer_states: list[dict[str, Any]]) -> dict[str, Any]:
    """Return tensors under flat names, such as weight/model.a.bias and optimizer/model.a.bias/exp_avg."""
    return {
        **{_WEIGHT + name: tensor for name, tensor in weights.items()},
        **{
            f"{_OPTIMIZER}{name}/{quantity}": tensor
            for state in optimizer_states
            for name, quantities in state["state"].items()
            for quantity, tensor in quantities.items()
        },
    }


def _begin(temporary: Path, tensors: dict[str, Any]) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    remove(temporary)  # of a killed process
    check_room(tensors, temporary.parent)
    temporary.mkdir()


def _finish(temporary: Path, path: Path, checkpoint: dict[str, Any]) -> None:
    sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
    torch.save({**checkpoint, "files": sizes}, temporary / META)
    publish(temporary, path)


def _read_meta(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path / META, weights_only=True)
    del checkpoint["files"]
    return checkpoint


def _sentence(error: BaseException) -> str:
    """Return the reason; of an error that several ranks report, that of the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).splitlines() or [type(error).__name__])[0]
