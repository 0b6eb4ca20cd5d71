"""From router logits to a compression ratio per tile: our rule, or that of released models."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vico_pl.model.router import RoutingRule

NEVER = 1.1  # a threshold that no probability reaches: every tile keeps full tokens


def compress_probability(logits: Float[Tensor, "T K"]) -> Float[Tensor, " T"]:
    """Return P(compress): the probability of any ratio coarser than full tokens."""
    return _coarser_probabilities(logits)[:, -1]


def routing_scores(logits: Float[Tensor, "T K"], rule: RoutingRule) -> Float[Tensor, " T"]:
    """Return for each tile of one sample what is held against the rule's threshold: P(compress), or -1.

    Under the rule of released models a tile must also lie above a quantile of its sample's tiles; one that
    does not gets -1. A sample of one tile is its own quantile, and so is never compressed.
    """
    return _coarser_scores(logits, rule)[:, -1]


def choose_ratios(
    logits: Float[Tensor, "T K"], *, ratios: list[int], rule: RoutingRule
) -> Int64[Tensor, " T"]:
    """Give each tile of one sample the coarsest ratio whose probability passes the rule, coarser ones added.

    With two ratios: compress iff P(compress) >= threshold. Our own rule looks at nothing but the tile, so
    neighbours never change a choice and one-tile images are routed like any other.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])  # P(compress) is 0.88 and 0.12
    >>> choose_ratios(logits, ratios=[4, 16], rule=RoutingRule(threshold=0.1))
    tensor([16, 16])
    >>> choose_ratios(logits, ratios=[4, 16], rule=RoutingRule(threshold=0.1, relative_threshold=0.5))
    tensor([16,  4])
    """
    steps_down = (_coarser_scores(logits, rule) >= rule.threshold).sum(
        -1
    )  # 0: keep; K - 1: the coarsest ratio
    return torch.tensor(ratios, device=logits.device)[steps_down]


def _coarser_scores(logits: Tensor, rule: RoutingRule) -> Tensor:
    scores = _coarser_probabilities(logits)
    if rule.relative_threshold is None or not len(scores):
        return scores
    # In float32 and strictly above, as released code compares.
    is_above = scores > torch.quantile(scores.float(), rule.relative_threshold, dim=0)
    return torch.where(is_above, scores, -1.0)


def _coarser_probabilities(logits: Float[Tensor, "T K"]) -> Float[Tensor, "T K-1"]:
    """Return for each ratio but full tokens the probability of it or a coarser one, coarsest first."""
    return logits.softmax(-1).cumsum(-1)[:, :-1]
