"""What a family is: how it recognises a folder, names its tensors and writes its configuration.

Most tensors are only renamed. Some are split differently: official InternViT fuses queries, keys and values
into one tensor, and released mixtures of experts store every expert separately. A `TensorPart` maps a part of
a stored tensor to a part of one of ours; reading and writing both follow that list:

    TensorPart("attention.k_proj.weight", "attn.qkv.weight", rows=(C, 2 * C))    a third of a stored tensor
    TensorPart("experts.down_proj", "experts.7.down_proj.weight", at=(7,))       one expert of our tensor

Our own layout is at the end: `config.json` is the `ModelSpec`, tensors have the names of our modules.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico_pl.files import read_json, write_json
from vico_pl.model.families.tensors import StoredTensors
from vico_pl.model.router import DEFAULT_ROUTER, RoutingRule
from vico_pl.model.vlm import ModelSpec

CONFIG_NAME = "config.json"
PROCESSING_NAME = "processing.json"  # tiling and chat settings
CALIBRATION_NAME = "calibration.json"  # routing threshold, and the curve it was chosen from
FORMAT = "vico_pl"

Json = dict[str, Any]
Shape = tuple[int, ...]


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
        named = config.get("format"), config.get("model_type"), *(config.get("architectures") or [])
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


def _read(folder: Path, config: Json, names: set[str] | None) -> FolderContents:
    try:
        spec = ModelSpec(**{key: value for key, value in config.items() if key != "format"})
    except TypeError as error:  # keys missing or unknown
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    processing = folder / PROCESSING_NAME
    return FolderContents(spec=spec, processing=read_json(processing) if processing.exists() else None)


def _write(folder: Path, contents: FolderContents, dtype: str) -> Json:
    """Write processing.json, and calibration.json unless one was copied with its curve."""
    if contents.processing is not None:
        write_json(contents.processing, folder / PROCESSING_NAME, indent=2)
    if contents.rule is not None and not (folder / CALIBRATION_NAME).exists():
        write_json(asdict(contents.rule), folder / CALIBRATION_NAME, indent=2)
    spec = asdict(contents.spec)
    if spec["router"] == DEFAULT_ROUTER:
        del spec["router"]  # so that a folder has the same bytes as one written before there was a choice
    return {"format": FORMAT, **spec}


OURS = Family(
    name="ours", marks=(FORMAT,), read=_read, parts_of=lambda name, _: [TensorPart(name, name)], write=_write
)
