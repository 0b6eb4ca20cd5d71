"""What a family is: how it recognises a folder, names its tensors and writes its configuration.

Most tensors are only renamed. Some are split differently: official InternViT fuses queries, keys and values
into one tensor, and released mixtures of experts store every expert separately. A `TensorPart` maps a part of
a stored tensor to a part of one of ours; reading and writing both follow that list:

    TensorPart("attention.k_proj.weight", "attn.qkv.weight", rows=(C, 2 * C))    a third of a stored tensor
    TensorPart("experts.down_proj", "experts.7.down_proj.weight", at=(7,))       one expert of our tensor

Weights are safetensors files: one `model.safetensors`, or numbered shards and their index. They are read as
views of the mapped file, so that opening a checkpoint takes no memory of its own.

Our own layout is at the end: `config.json` is the `ModelSpec`, tensors have the names of our modules.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vico_pl.files import atomic_path, read_json, write_json
from vico_pl.model.router import DEFAULT_ROUTER, RoutingRule
from vico_pl.model.vlm import ModelSpec

CONFIG_NAME = "config.json"
PROCESSING_NAME = "processing.json"  # tiling and chat settings
CALIBRATION_NAME = "calibration.json"  # routing threshold, and the curve it was chosen from
FORMAT = "vico_pl"
# What transformers reads of a config.json of ours. Opening the tokenizer, it warns of a model_type that it
# does not know, unless a part of the configuration has an empty one.
MARKS: dict[str, Any] = {
    "format": FORMAT,
    "model_type": FORMAT,
    "transformers_version": transformers.__version__,
    "tokenizer": {"model_type": ""},
}
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

Json = dict[str, Any]
Shape = tuple[int, ...]


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
            try:
                save_file(whole, temporary, metadata={"format": "pt"})
            except SafetensorError as error:  # a full disk, too
                raise OSError(f"{folder / name}: cannot be written ({error}); free space") from error
            temporary.chmod(usual_mode)  # safetensors makes it readable by its owner only
    written = set(plan.filename_to_tensors)
    if plan.is_sharded:
        weight_map = dict(sorted(plan.tensor_to_filename.items()))
        write_json({"metadata": plan.metadata, "weight_map": weight_map}, folder / INDEX_NAME, indent=2)
        written.add(INDEX_NAME)
    for old in {path.name for path in folder.glob("model*.safetensors*")} - written:
        (folder / old).unlink()  # of a model that was here before


def name_dtypes(tensors: Iterable[Tensor]) -> str:
    """Return the types of tensors: `bfloat16`, or `bfloat16, float32` if the router is in float32."""
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX_NAME).is_file():
        try:
            names = sorted(set(read_json(folder / INDEX_NAME)["weight_map"].values()))
            if any(Path(name).name != name for name in names):
                raise ValueError("it names files outside the folder")
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


@dataclass(frozen=True, kw_only=True)
class FolderContents:
    """What a model folder says, apart from weights and tokenizer."""

    spec: ModelSpec
    processing: Json | None  # {"tiling": settings, "chat": settings}; None: the folder does not say
    rule: RoutingRule | None = None  # None: not calibrated


@dataclass(frozen=True)
class TensorPart:
    """One part of one of our tensors and where a family stores it."""

    own: str
    stored: str
    at: tuple[int | slice, ...] = ()  # index into our tensor; (): all of it
    rows: tuple[int, int] | None = None  # rows of the stored tensor; None: all of it


@dataclass(frozen=True, kw_only=True)
class Family:
    """One way to store a model; a new family defines these functions."""

    name: str  # as `vico export --layout` takes it
    marks: tuple[str, ...]  # any of them, as format, model_type or architecture, marks its config.json
    # Folder, its config.json, names of its tensors. Without names, tokenizer and weights are not opened:
    # the id of the placeholder is 0, and ratios and router are those of the base model.
    read: Callable[[Path, Json, set[str] | None], FolderContents]
    stored_name: Callable[[str], str] = str  # unifies tensors that may be stored under two names
    parts_of: Callable[[str, Shape], Iterable[TensorPart]]  # of our tensor with this name and shape
    # What the family can store; ValueError: it cannot store the model.
    reduce: Callable[[FolderContents], FolderContents] = lambda contents: contents
    # Writes further files and returns config.json; the string is the type of the weights.
    write: Callable[[Path, FolderContents, str], Json]
    takes_remote_code: bool = False  # config.json may name code in the folder, for servers

    def recognises(self, config: Json) -> bool:
        """Say whether a config.json is of this family."""
        listed = config.get("architectures")
        named = [
            config.get("format"),
            config.get("model_type"),
            *(listed if isinstance(listed, list) else []),
        ]
        return any(mark in named for mark in self.marks)

    def stored_shapes(self, own: Mapping[str, Tensor]) -> dict[str, Shape]:
        """Return the shapes that stored tensors must have; those of `own` count, not their values."""
        empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in own.items()}
        return {name: tuple(tensor.shape) for name, tensor in self.to_stored(empty).items()}

    def to_stored(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that the family stores, made from ours."""
        pieces: dict[str, list[Tensor]] = defaultdict(list)
        for part in self._parts(own):
            pieces[part.stored].append(own[part.own][part.at])
        return {name: found[0] if len(found) == 1 else torch.cat(found) for name, found in pieces.items()}

    def to_own(
        self, stored: StoredTensors, wanted: Mapping[str, Tensor], *, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        """Read tensors of the names and shapes of `wanted`, in `dtype` or as stored; whole ones are views."""
        own: dict[str, Tensor] = {}
        for part in self._parts(wanted):
            tensor = stored[part.stored]
            tensor = tensor if part.rows is None else tensor[slice(*part.rows)]
            if part.at == ():
                own[part.own] = tensor.to(dtype)
                continue
            if part.own not in own:
                own[part.own] = torch.empty(wanted[part.own].shape, dtype=dtype or tensor.dtype)
            own[part.own][part.at] = tensor
        return own

    def _parts(self, own: Mapping[str, Tensor]) -> Iterator[TensorPart]:
        for name, tensor in own.items():
            yield from self.parts_of(name, tuple(tensor.shape))


def routing_rule(file: Path, threshold: Any, relative: Any) -> RoutingRule:
    """Return the rule that a file holds.

    Raises:
        ValueError: its thresholds are not numbers that the rule can compare with.
    """
    is_number = isinstance(threshold, float | int) and not math.isnan(threshold)
    is_quantile = relative is None or (isinstance(relative, float | int) and 0 <= relative <= 1)
    if not is_number or not is_quantile:
        found = f"its threshold is {threshold!r}, its relative_threshold {relative!r}"
        raise ValueError(
            f"{file}: {found}; expected a number, and none or one from 0 to 1; run 'vico calibrate'"
        )
    return RoutingRule(threshold=float(threshold), relative_threshold=relative)


def _read(folder: Path, config: Json, names: set[str] | None) -> FolderContents:
    try:
        spec = ModelSpec(**{key: value for key, value in config.items() if key not in MARKS})
    except (TypeError, ValueError) as error:  # keys missing or unknown, or of another type
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    processing = folder / PROCESSING_NAME
    return FolderContents(spec=spec, processing=read_json(processing) if processing.is_file() else None)


def _write(folder: Path, contents: FolderContents, dtype: str) -> Json:
    """Write processing.json, and calibration.json unless one was copied with its curve."""
    if contents.processing is not None:
        write_json(contents.processing, folder / PROCESSING_NAME, indent=2)
    if contents.rule is not None and not (folder / CALIBRATION_NAME).exists():
        write_json(asdict(contents.rule), folder / CALIBRATION_NAME, indent=2)
    spec = asdict(contents.spec)
    if spec["router"] == DEFAULT_ROUTER:
        del spec["router"]  # so that a folder has the same bytes as one written before there was a choice
    return {**MARKS, **spec}


OURS = Family(
    name="ours", marks=(FORMAT,), read=_read, parts_of=lambda name, _: [TensorPart(name, name)], write=_write
)
