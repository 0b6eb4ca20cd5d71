"""Other ways to spend the router's vision tokens: scores of tiles, and smaller images.

Tiles with the highest scores are compressed first.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from vico_pl.data.collate import collate
from vico_pl.data.tiling import Size, TilingConfig, count_tiles
from vico_pl.evaluation.answering import Group, encode_conversation
from vico_pl.inference.predictor import Predictor
from vico_pl.model.reference import FrozenReference
from vico_pl.model.router import NEVER, RoutingRule, routing_scores
from vico_pl.stages.router import tile_loss_ratios

TileScores = list[Float[Tensor, " _"]]  # one entry per sample


def score_tiles(arm: str, predictor: Predictor, group: Group, *, seed: int) -> TileScores:
    """Score the tiles of a group as an arm does."""
    if arm == "random":
        return random_scores(group, seed=seed)
    if arm == "pixel_detail":
        return pixel_detail_scores(group)
    return oracle_scores(predictor, group) if arm == "oracle" else router_scores(predictor, group)


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
    return [
        -(tiles.diff(dim=3).abs().mean((1, 2, 3)) + tiles.diff(dim=2).abs().mean((1, 2, 3)))
        for tiles in (sample.tiles.float() for sample in group.samples)
    ]


@torch.no_grad()
def oracle_scores(predictor: Predictor, group: Group) -> TileScores:
    """Return minus the loss ratio of each tile, which uses the responses of the conversation.

    The model at full tokens is its own reference.
    """
    batch = collate([encode_conversation(predictor, sample) for sample in group.samples])
    batch = batch.to(predictor.device)
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
    full = [count_tiles(sizes, tiling) for sizes in samples]
    chosen = looser = [(count, tiling) for count in full]
    for percent in range(100, -1, -2):
        looser, fraction = chosen, percent / 100
        chosen = [
            _shrink(sizes, tiling, fraction * count) for sizes, count in zip(samples, full, strict=True)
        ]
        spare = budget * sum(full) - sum(count for count, _ in chosen)
        if spare >= 0:
            break
    for place, (fewer, more) in enumerate(zip(chosen, looser, strict=True)):
        if 0 < more[0] - fewer[0] <= spare:
            chosen[place] = more
            spare -= more[0] - fewer[0]
    return [smaller for _, smaller in chosen]


def _shrink(sizes: Sequence[Size], tiling: TilingConfig, limit: float) -> tuple[int, TilingConfig]:
    """Return the largest number of tiles within the limit, but at least one per image, and its tiling."""
    for max_tiles in range(tiling.max_tiles, 0, -1):
        smaller = replace(tiling, min_tiles=min(tiling.min_tiles, max_tiles), max_tiles=max_tiles)
        count = count_tiles(sizes, smaller)
        if count <= limit or max_tiles == 1:
            break
    return count, smaller
