"""The router and its baselines as scores per tile: tiles with the highest scores are compressed first."""

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from vico_pl.data.collate import collate
from vico_pl.data.shards.stats import Size, count_tiles
from vico_pl.data.tiling import TilingConfig
from vico_pl.evaluation.questions import Group
from vico_pl.inference.predictor import Predictor
from vico_pl.inference.routing import NEVER, routing_scores
from vico_pl.model.reference import FrozenReference
from vico_pl.model.router import RoutingRule
from vico_pl.stages.router import tile_loss_ratios

TileScores = list[Float[Tensor, " _"]]  # one entry per sample


@torch.no_grad()
def router_scores(predictor: Predictor, group: Group) -> TileScores:
    """Return the scores that the calibrated rule compares with its threshold."""
    rule = predictor.rule or RoutingRule(threshold=NEVER)
    return [routing_scores(predictor.router_logits(features), rule) for features in group.features]


def random_scores(group: Group, *, seed: int) -> TileScores:
    """Draw uniform noise: a router without knowledge."""
    generator = torch.Generator().manual_seed(seed + group.first)
    return [torch.rand(len(sample.tiles), generator=generator) for sample in group.samples]


def pixel_detail_scores(group: Group) -> TileScores:
    """Return minus the mean absolute difference of neighbouring pixels: tiles with few edges come first."""
    return [-_edge_energy(sample.tiles.float()) for sample in group.samples]


@torch.no_grad()
def oracle_scores(predictor: Predictor, group: Group) -> TileScores:
    """Return minus the loss ratio of each tile, which uses the expected answers.

    The model at full tokens is its own reference.
    """
    chat = replace(predictor.chat, config=replace(predictor.chat.config, max_tokens=sys.maxsize))
    batch = collate([chat.encode(sample) for sample in group.samples]).to(predictor.device)
    reference = FrozenReference(predictor.model)
    harm = tile_loss_ratios(
        predictor.model, reference, batch, torch.cat(group.features), mode="tile", epsilon=1e-6
    )
    return list((-harm).cpu().split([len(sample.tiles) for sample in group.samples]))


def ranked(scores: TileScores) -> TileScores:
    """Replace scores by their ranks over all tiles, 1 / n to 1: without ties any number can be chosen.

    Of equal scores the one of the earlier tile ranks higher.
    """
    flat = torch.cat(scores)
    ranks = torch.empty(len(flat), dtype=torch.float64)
    ranks[flat.argsort(descending=True, stable=True)] = torch.arange(len(flat), 0, -1).double() / len(flat)
    return list(ranks.split([len(of_sample) for of_sample in scores]))


def shrunken_tilings(
    samples: Sequence[Sequence[Size]], tiling: TilingConfig, *, budget: float
) -> list[TilingConfig]:
    """Give samples fewer tiles, so that full tokens for all cost at most `budget` of the original.

    Every sample gets the same fraction of its tiles, rounded down to possible grids, but at least one tile
    per image. The first samples that can use the rest of the budget get it.
    """
    looser = [tiling for _ in samples]
    allowed = budget * sum(_costs(samples, looser))
    for percent in range(100, -1, -2):
        tilings = [_shrink(sizes, tiling, fraction=percent / 100) for sizes in samples]
        spare = allowed - sum(_costs(samples, tilings))
        if spare >= 0:
            return _spend(spare, samples, tilings, looser)
        looser = tilings
    return looser


def _shrink(sizes: Sequence[Size], tiling: TilingConfig, *, fraction: float) -> TilingConfig:
    allowed = fraction * count_tiles(sizes, tiling)
    for max_tiles in range(tiling.max_tiles, 1, -1):
        smaller = replace(tiling, min_tiles=min(tiling.min_tiles, max_tiles), max_tiles=max_tiles)
        if count_tiles(sizes, smaller) <= allowed:
            return smaller
    return replace(tiling, min_tiles=1, max_tiles=1)


def _spend(
    spare: float,
    samples: Sequence[Sequence[Size]],
    tilings: Sequence[TilingConfig],
    looser: Sequence[TilingConfig],
) -> list[TilingConfig]:
    """Give samples their looser tiling while there are tiles to spare."""
    chosen = list(tilings)
    extra = [b - a for a, b in zip(_costs(samples, tilings), _costs(samples, looser), strict=True)]
    for place, more in enumerate(extra):
        if 0 < more <= spare:
            chosen[place] = looser[place]
            spare -= more
    return chosen


def _costs(samples: Sequence[Sequence[Size]], tilings: Sequence[TilingConfig]) -> list[int]:
    return [count_tiles(sizes, tiling) for sizes, tiling in zip(samples, tilings, strict=True)]


def _edge_energy(tiles: Float[Tensor, "t 3 H W"]) -> Float[Tensor, " t"]:
    horizontal = tiles.diff(dim=3).abs().mean((1, 2, 3))
    vertical = tiles.diff(dim=2).abs().mean((1, 2, 3))
    return horizontal + vertical
