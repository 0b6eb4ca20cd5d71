"""Copies of samples that differ in one tile: what per-tile router labels are computed from."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from vico_pl.types import Batch


@dataclass(frozen=True, kw_only=True)
class Branches:
    """One copy of a sample for each of its tiles, in the order of the tiles."""

    batch: Batch  # T samples; branch i belongs to tile i of the original batch
    tile_origin: Int64[Tensor, " TB"]  # tile of the original batch behind each tile of the branches
    is_own_tile: Bool[Tensor, " TB"]  # the tile that its branch stands for
    response_origin: Int64[Tensor, " RB"]  # response token of the original batch behind each of the branches


def branch_per_tile(batch: Batch) -> Branches:
    """Repeat every sample once per tile of its own.

    Samples of 2 tiles (a, b) and 1 tile (c) give the branches a: (a b), b: (a b), c: (c).
    """
    token_starts = batch.sample_lengths.cumsum(0) - batch.sample_lengths
    tiles_per_sample = torch.bincount(batch.tile_to_sample, minlength=batch.num_samples)
    tile_starts = tiles_per_sample.cumsum(0) - tiles_per_sample
    sample_of_branch = batch.tile_to_sample
    tokens, _ = _ranges(token_starts[sample_of_branch], batch.sample_lengths[sample_of_branch])
    tiles, branch_of_tile = _ranges(tile_starts[sample_of_branch], tiles_per_sample[sample_of_branch])
    copies = replace(
        batch,
        ids=[batch.ids[s] for s in sample_of_branch.tolist()],
        tiles=batch.tiles[tiles],
        tile_to_sample=branch_of_tile,
        tile_to_image=_renumber(batch.tile_to_image[tiles], branch_of_tile),
        input_ids=batch.input_ids[tokens],
        response_mask=batch.response_mask[tokens],
        sample_lengths=batch.sample_lengths[sample_of_branch],
    )
    response_number = batch.response_mask.cumsum(0) - 1
    return Branches(
        batch=copies,
        tile_origin=tiles,
        is_own_tile=tiles == branch_of_tile,
        response_origin=response_number[tokens][copies.response_mask],
    )


def _ranges(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the concatenation of `start .. start + length` and which range each entry comes from."""
    owner = torch.arange(len(starts), device=starts.device).repeat_interleave(lengths)
    offsets = torch.arange(len(owner), device=starts.device) - (lengths.cumsum(0) - lengths)[owner]
    return starts[owner] + offsets, owner


def _renumber(image: Tensor, branch: Tensor) -> Tensor:
    """Give images of different branches different numbers, counted from 0."""
    pairs = torch.stack([branch, image], dim=1)
    return torch.unique_consecutive(pairs, dim=0, return_inverse=True)[1]
