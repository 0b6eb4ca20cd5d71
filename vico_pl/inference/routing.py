"""From router logits to a compression ratio per tile: our rule, or that of released models."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vico_pl.model.router import RoutingRule

NEVER = 1.1  # a threshold above every probability: every tile keeps full tokens


def compress_probability(logits: Float[Tensor, "T K"]) -> Float[Tensor, " T"]:
    """Return P(compress): the probability of any ratio coarser than full tokens."""
    return _coarser_scores(logits)[:, -1]


def routing_scores(logits: Float[Tensor, "T K"], rule: RoutingRule) -> Float[Tensor, " T"]:
    """Return for each tile of one sample the score that the rule compares with its threshold.

    It is P(compress). Under the rule of released models a tile must also lie above a quantile of its
    sample's tiles, or its score is -1: a single tile equals its quantile and is never compressed.
    """
    return _coarser_scores(logits, rule)[:, -1]


def choose_ratios(
    logits: Float[Tensor, "T K"], *, ratios: list[int], rule: RoutingRule
) -> Int64[Tensor, " T"]:
    """Choose for each tile of one sample the coarsest ratio whose cumulative probability passes the rule.

    With two ratios: compress iff P(compress) >= threshold. Our own rule looks at each tile alone, so other
    tiles never change a choice, and one-tile images are routed like any other.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])  # P(compress) is 0.88 and 0.12
    >>> choose_ratios(logits, ratios=[4, 16], rule=RoutingRule(threshold=0.1))
    tensor([16, 16])
    >>> choose_ratios(logits, ratios=[4, 16], rule=RoutingRule(threshold=0.1, relative_threshold=0.5))
    tensor([16,  4])
    """
    passed = _coarser_scores(logits, rule) >= rule.threshold
    return torch.tensor(ratios, device=logits.device)[passed.sum(-1)]  # 0 passed: full tokens


def at_threshold(
    scores: Sequence[Float[Tensor, " _"]], threshold: float, *, ratios: list[int]
) -> list[Int64[Tensor, " _"]]:
    """Compress the tiles whose score reaches the threshold to the coarsest ratio."""
    return [torch.where(score >= threshold, ratios[-1], ratios[0]) for score in scores]


def threshold_for(
    scores: Sequence[Float[Tensor, " _"]], *, compressed_fraction: float, halfway: bool = False
) -> float:
    """Return the threshold that this fraction of all tiles reaches: the lowest score among them.

    With `halfway` it lies between that score and the next lower one, or is 0 if every tile reaches it.

    >>> threshold_for([torch.tensor([0.1, 0.9]), torch.tensor([0.4, 0.6])], compressed_fraction=0.5)
    0.6000000238418579
    """
    ranked = torch.cat(list(scores)).sort(descending=True).values
    count = round(compressed_fraction * len(ranked))
    if count == 0:
        return math.inf
    if not halfway:
        return float(ranked[count - 1])
    return 0.0 if count == len(ranked) else float(ranked[count - 1] + ranked[count]) / 2


def vision_tokens(ratios: Sequence[Int64[Tensor, " _"]], *, num_patches: int) -> list[int]:
    """Return the vision tokens of each sample."""
    return [int((num_patches // of_sample).sum()) for of_sample in ratios]


def _coarser_scores(logits: Float[Tensor, "T K"], rule: RoutingRule | None = None) -> Float[Tensor, "T K-1"]:
    """Return for each ratio except full tokens the score of it or a coarser one, coarsest first."""
    scores = logits.softmax(-1).cumsum(-1)[:, :-1]
    if rule is None or rule.relative_threshold is None or not len(scores):
        return scores
    # In float32 and strictly above, as released code compares.
    is_above = scores > torch.quantile(scores.float(), rule.relative_threshold, dim=0)
    return torch.where(is_above, scores, -1.0)
