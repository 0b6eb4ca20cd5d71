"""What a layout of model folders is: a way to name tensors and to say in `config.json` what they make up."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vico_pl.model.families.pieces import Piece, Shapes
from vico_pl.model.router import RoutingRule
from vico_pl.model.vlm import ModelSpec

CONFIG_NAME = "config.json"

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All that a model folder says, its weights and tokenizer aside."""

    spec: ModelSpec
    processing: Json | None  # {"tiling": settings, "chat": settings}; None: the folder does not say
    rule: RoutingRule | None  # None: not calibrated


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One layout; adding another one means writing these functions."""

    name: str  # as `vico export --layout` takes it
    recognises: Callable[[Json], bool]  # a config.json
    read: Callable[[Path, Json, set[str]], Contents]  # folder, its config.json, names of its tensors
    stored_name: Callable[[str], str] = str  # the one name of a tensor that a folder may name in two ways
    pieces: Callable[[Shapes], list[Piece]]  # of our tensors with these shapes
    # What the layout keeps of a model; ValueError: it cannot hold the model.
    reduce: Callable[[Contents], Contents]
    write: Callable[
        [Path, Contents, str], Json
    ]  # further files; returns config.json; str: type of the weights
