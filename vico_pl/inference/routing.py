"""From router logits to a compression ratio per tile, one tile at a time."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

NEVER = 1.1  # a threshold that no probability reaches: every tile keeps full tokens


def compress_probability(logits: Float[Tensor, "T K"]) -> Float[Tensor, " T"]:
    """Return P(compress): the probability of any ratio coarser than full tokens."""
    return _coarser_probabilities(logits)[:, -1]


def choose_ratios(
    logits: Float[Tensor, "T K"], *, ratios: list[int], threshold: float
) -> Int64[Tensor, " T"]:
    """Give each tile the coarsest ratio whose probability, coarser ones counted in, reaches the threshold.

    With two ratios: compress iff P(compress) >= threshold. A tile's choice depends on nothing but the tile,
    so neighbours in a batch never change it and one-tile images are routed like any other.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])  # P(compress) is 0.88 and 0.12
    >>> choose_ratios(logits, ratios=[4, 16], threshold=0.5)
    tensor([16,  4])
    """
    steps_down = (_coarser_probabilities(logits) >= threshold).sum(-1)  # 0: keep; K - 1: the coarsest ratio
    return torch.tensor(ratios, device=logits.device)[steps_down]


def _coarser_probabilities(logits: Float[Tensor, "T K"]) -> Float[Tensor, "T K-1"]:
    """Return for each ratio but full tokens the probability of it or a coarser one, coarsest first."""
    return logits.softmax(-1).cumsum(-1)[:, :-1]
