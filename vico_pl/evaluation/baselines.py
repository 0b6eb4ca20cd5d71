"""Other ways to choose the tiles to compress, as scores per tile: the higher, the sooner a tile is compressed."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from vico_pl.data.collate import collate
from vico_pl.data.tiling import TilingConfig, choose_grid
from vico_pl.inference.questions import Group
from vico_pl.inference.routing import compress_probability
from vico_pl.inference.session import Session
from vico_pl.model.reference import FrozenReference
from vico_pl.stages.router import RouterConfig, tile_loss_ratios

TileScores = list[Float[Tensor, " t"]]  # one entry per sample


@torch.no_grad()
def router_scores(session: Session, group: Group) -> TileScores:
    """P(compress) by the router."""
    return [compress_probability(session.router_logits(features)) for features in group.features]


def random_scores(group: Group, *, seed: int) -> TileScores:
    """Uniform noise: a router that has learned nothing."""
    generator = torch.Generator().manual_seed(seed + group.first)
    return [torch.rand(len(sample.tiles), generator=generator) for sample in group.samples]


def pixel_detail_scores(group: Group) -> TileScores:
    """Compress what has few edges: minus the mean absolute difference between neighbouring pixels."""
    return [-_edge_energy(sample.tiles.float()) for sample in group.samples]


@torch.no_grad()
def oracle_scores(session: Session, group: Group) -> TileScores:
    """Compress what changes the model's answers least; knows the questions and the answers.

    The score is minus the loss ratio of the tile, with the model at full tokens as its own reference.
    """
    batch = collate([session.chat.encode(sample) for sample in group.samples])
    reference = FrozenReference(session.model)
    harm = tile_loss_ratios(
        session.model, reference, batch, torch.cat(group.features), RouterConfig(epsilon=1e-6)
    )
    return list((-harm).split([len(sample.tiles) for sample in group.samples]))


def shrunken_tilings(
    sizes: Sequence[tuple[int, int]], tiling: TilingConfig, *, budget: float
) -> list[TilingConfig]:
    """Give images (width, height) fewer tiles, so that full tokens for all cost at most `budget` of the original.

    Every image gets the same fraction of its tiles, rounded down to a grid it can have, but at least one tile.
    """
    original = sum(_num_tiles(size, tiling) for size in sizes)
    fraction = 1.0
    while fraction > 0:
        tilings = [_shrink(size, tiling, fraction=fraction) for size in sizes]
        if sum(_num_tiles(s, t) for s, t in zip(sizes, tilings, strict=True)) <= budget * original:
            return tilings
        fraction -= 0.02
    return [replace(tiling, min_tiles=1, max_tiles=1) for _ in sizes]


def _shrink(size: tuple[int, int], tiling: TilingConfig, *, fraction: float) -> TilingConfig:
    allowed = fraction * _num_tiles(size, tiling)
    for max_tiles in range(tiling.max_tiles, 1, -1):
        smaller = replace(tiling, min_tiles=min(tiling.min_tiles, max_tiles), max_tiles=max_tiles)
        if _num_tiles(size, smaller) <= allowed:
            return smaller
    return replace(tiling, min_tiles=1, max_tiles=1)


def _num_tiles(size: tuple[int, int], tiling: TilingConfig) -> int:
    columns, rows = choose_grid(*size, tiling)
    return columns * rows + (tiling.use_thumbnail and columns * rows > 1)


def _edge_energy(tiles: Float[Tensor, "t 3 H W"]) -> Float[Tensor, " t"]:
    horizontal = tiles.diff(dim=3).abs().mean((1, 2, 3))
    vertical = tiles.diff(dim=2).abs().mean((1, 2, 3))
    return horizontal + vertical
