"""The safetensors files of a model folder: one `model.safetensors`, or numbered shards and their index.

Tensors are read as views of the mapped file, so that opening a checkpoint takes no memory of its own.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vico_pl.files import atomic_path, read_json, write_json

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000


class StoredTensors:
    """All tensors of a model folder by name; `stored_name` gives each the name it goes by here.

    Raises:
        ValueError: no weights, only pickled ones, a shard is absent, or a file is no safetensors.
    """

    def __init__(self, folder: Path, stored_name: Callable[[str], str] = str) -> None:
        self._places: dict[str, tuple[Any, str]] = {}
        for path in _weight_files(folder):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: no readable weights ({error})") from error
            self._places |= {stored_name(name): (file, name) for name in file.keys()}  # noqa: SIM118
        self.names = set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        file, name = self._places[name]
        return tuple(file.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor as a view of the file."""
        file, name = self._places[name]
        return file.get_tensor(name)


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, *, max_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write tensors, in shards if larger than `max_bytes`; each file appears whole or not at all."""
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        get_storage_id=lambda _: None,  # equal storage means nothing: views of one file share it
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    for name, members in plan.filename_to_tensors.items():
        whole = {member: tensors[member].contiguous() for member in members}
        with atomic_path(folder / name) as temporary:
            temporary.touch()
            usual_mode = temporary.stat().st_mode
            save_file(whole, temporary, metadata={"format": "pt"})
            temporary.chmod(usual_mode)  # safetensors makes it readable by its owner only
    written = set(plan.filename_to_tensors)
    if plan.is_sharded:
        weight_map = dict(sorted(plan.tensor_to_filename.items()))
        write_json({"metadata": plan.metadata, "weight_map": weight_map}, folder / INDEX_NAME, indent=2)
        written.add(INDEX_NAME)
    for old in {path.name for path in folder.glob("model*.safetensors*")} - written:
        (folder / old).unlink()  # of a model that was here before


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX_NAME).is_file():
        try:
            names = sorted(set(read_json(folder / INDEX_NAME)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX_NAME}: no readable index of weights ({error})") from error
        absent = ", ".join(name for name in names if not (folder / name).is_file())
        if absent:
            raise ValueError(f"{folder}: {INDEX_NAME} names {absent}, which is absent; fetch it again")
        return [folder / name for name in names]
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if any(folder.glob("*.bin")):
        raise ValueError(f"{folder}: pickled weights may run code; save them as {WEIGHTS_NAME}")
    raise ValueError(f"{folder}: no {WEIGHTS_NAME}; a model folder holds weights next to config.json")
