"""How the tensors of a layout make up our own: the one list that reading and writing both follow.

Most tensors only have another name. Some are cut differently: official InternViT stores queries, keys and
values as one tensor, where our module has three; released mixtures of experts store each expert apart, where
our module has all in one tensor. A `Piece` says which part of which stored tensor is which part of which of
ours:

    Piece("attention.k_proj.weight", "attn.qkv.weight", rows=(C, 2 * C))    a third of a stored tensor
    Piece("experts.down_proj", "experts.7.down_proj.weight", at=(7,))       an eighth of one of ours
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Piece:
    """One part of a tensor of ours and where a layout keeps it."""

    own: str
    stored: str
    at: tuple[int | slice, ...] = ()  # place in our tensor; (): all of it
    rows: tuple[int, int] | None = None  # rows of the stored tensor; None: all of it


def stored_shapes(pieces: Iterable[Piece], own: Shapes) -> dict[str, Shape]:
    """Return the shapes that stored tensors must have."""
    shapes: dict[str, Shape] = {}
    for piece in pieces:
        shape = tuple(torch.empty(own[piece.own], device="meta")[piece.at].shape)
        rows = shapes[piece.stored][0] if piece.stored in shapes else 0
        shapes[piece.stored] = shape if piece.rows is None else (rows + shape[0], *shape[1:])
    return shapes


def assemble_own(
    pieces: Iterable[Piece], own: Shapes, stored: Callable[[str], Tensor], *, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return our tensors from stored ones: views where they are whole, in `dtype` or as stored."""
    result: dict[str, Tensor] = {}
    for name, parts in _grouped(pieces, lambda piece: piece.own).items():
        if parts[0].at == ():
            result[name] = _cut(stored(parts[0].stored), parts[0]).to(dtype)
            continue
        result[name] = torch.empty(own[name], dtype=dtype or stored(parts[0].stored).dtype)
        for part in parts:
            result[name][part.at] = _cut(stored(part.stored), part)
    return result


def assemble_stored(pieces: Iterable[Piece], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a layout from ours."""
    result: dict[str, Tensor] = {}
    for name, parts in _grouped(pieces, lambda piece: piece.stored).items():
        values = [own[part.own][part.at] for part in parts]
        result[name] = values[0] if len(values) == 1 else torch.cat(values)
    return result


def _cut(tensor: Tensor, piece: Piece) -> Tensor:
    return tensor if piece.rows is None else tensor[slice(*piece.rows)]


def _grouped(pieces: Iterable[Piece], key: Callable[[Piece], str]) -> dict[str, list[Piece]]:
    groups: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        groups[key(piece)].append(piece)
    return groups
