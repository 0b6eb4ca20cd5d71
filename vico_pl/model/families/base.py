"""What a family is: how it recognises a folder, names its tensors and writes its configuration.

Most tensors are only renamed. Some are split differently: official InternViT fuses queries, keys and values
into one tensor, and released mixtures of experts store every expert separately. A `TensorPart` maps a part of
a stored tensor to a part of one of ours; reading and writing both follow that list:

    TensorPart("attention.k_proj.weight", "attn.qkv.weight", rows=(C, 2 * C))    a third of a stored tensor
    TensorPart("experts.down_proj", "experts.7.down_proj.weight", at=(7,))       one expert of our tensor

Our own layout is at the end: `config.json` is the `ModelSpec`, tensors have the names of our modules.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico_pl.files import read_json, write_json
from vico_pl.model.router import DEFAULT_ROUTER, RoutingRule
from vico_pl.model.vlm import ModelSpec

CONFIG_NAME = "config.json"
PROCESSING_NAME = "processing.json"  # tiling and chat settings
CALIBRATION_NAME = "calibration.json"  # routing threshold, and the curve it was chosen from
FORMAT = "vico_pl"

Json = dict[str, Any]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a model folder says, apart from weights and tokenizer."""

    spec: ModelSpec
    processing: Json | None  # {"tiling": settings, "chat": settings}; None: the folder does not say
    rule: RoutingRule | None  # None: not calibrated


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
    recognises: Callable[[Json], bool]  # a config.json
    # Folder, its config.json, names of its tensors. Without names, tokenizer and weights are not opened:
    # the id of the placeholder is 0, and ratios and router are those of the base model.
    read: Callable[[Path, Json, set[str] | None], Contents]
    stored_name: Callable[[str], str] = str  # unifies tensors that may be stored under two names
    parts: Callable[[Shapes], list[TensorPart]]  # of our tensors with these shapes
    reduce: Callable[[Contents], Contents]  # what the family can store; ValueError: it cannot store the model
    # Writes further files and returns config.json; the string is the type of the weights.
    write: Callable[[Path, Contents, str], Json]


def stored_shapes(parts: Iterable[TensorPart], own: Shapes) -> dict[str, Shape]:
    """Return the shapes that stored tensors must have."""
    shapes: dict[str, Shape] = {}
    for part in parts:
        shape = tuple(torch.empty(own[part.own], device="meta")[part.at].shape)
        rows = shapes[part.stored][0] if part.stored in shapes else 0
        shapes[part.stored] = shape if part.rows is None else (rows + shape[0], *shape[1:])
    return shapes


def assemble_own(
    parts: Iterable[TensorPart], own: Shapes, stored: Callable[[str], Tensor], *, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return our tensors, in `dtype` or as stored; whole tensors are views of the stored ones."""
    result: dict[str, Tensor] = {}
    for name, group in _grouped(parts, lambda part: part.own).items():
        if group[0].at == ():
            result[name] = _rows(stored(group[0].stored), group[0]).to(dtype)
            continue
        result[name] = torch.empty(own[name], dtype=dtype or stored(group[0].stored).dtype)
        for part in group:
            result[name][part.at] = _rows(stored(part.stored), part)
    return result


def assemble_stored(parts: Iterable[TensorPart], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a family stores, made from ours."""
    result: dict[str, Tensor] = {}
    for name, group in _grouped(parts, lambda part: part.stored).items():
        values = [own[part.own][part.at] for part in group]
        result[name] = values[0] if len(values) == 1 else torch.cat(values)
    return result


def read_rule(folder: Path) -> RoutingRule | None:
    """Read the threshold that `vico calibrate` wrote into a folder of any family.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / CALIBRATION_NAME
    if not path.exists():
        return None
    content = read_json(path)
    threshold, relative = content.get("threshold"), content.get("relative_threshold")
    if not isinstance(threshold, float | int) or not isinstance(relative, float | int | None):
        raise ValueError(f"{path}: its threshold is {threshold!r}, no number; run 'vico calibrate' again")
    return RoutingRule(threshold=float(threshold), relative_threshold=relative)


def _rows(tensor: Tensor, part: TensorPart) -> Tensor:
    return tensor if part.rows is None else tensor[slice(*part.rows)]


def _grouped(parts: Iterable[TensorPart], key: Callable[[TensorPart], str]) -> dict[str, list[TensorPart]]:
    groups: dict[str, list[TensorPart]] = defaultdict(list)
    for part in parts:
        groups[key(part)].append(part)
    return groups


def _read(folder: Path, config: Json, names: set[str] | None) -> Contents:
    try:
        spec = ModelSpec(**{key: value for key, value in config.items() if key != "format"})
    except TypeError as error:  # keys missing or unknown
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    processing = folder / PROCESSING_NAME
    return Contents(spec=spec, processing=read_json(processing) if processing.exists() else None, rule=None)


def _write(folder: Path, contents: Contents, dtype: str) -> Json:
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
    name="ours",
    recognises=lambda config: config.get("format") == FORMAT,
    read=_read,
    parts=lambda own: [TensorPart(name, name) for name in own],
    reduce=lambda contents: contents,
    write=_write,
)
