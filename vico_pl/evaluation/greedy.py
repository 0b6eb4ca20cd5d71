"""The arm `greedy_oracle`: compress the tile that adds the least harm, given those compressed before.

The arm `oracle` measures each tile alone, although two tiles may say the same: then either can be compressed
but not both. Measuring this takes t * (t + 1) / 2 forward passes for t tiles: 28 for 7.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

from vico_pl.evaluation.answering import Group, kl_at
from vico_pl.inference.predictor import Predictor
from vico_pl.types import TiledSample


def greedy_scores(predictor: Predictor, group: Group) -> list[Float64[Tensor, " _"]]:
    """Score the tiles of a group by minus the harm that each adds, in nats per response token."""
    return [
        _score_sample(predictor, sample, features)
        for sample, features in zip(group.samples, group.features, strict=True)
    ]


def _score_sample(predictor: Predictor, sample: TiledSample, features: Tensor) -> Float64[Tensor, " t"]:
    full, coarse = predictor.model.ratios[0], predictor.model.ratios[-1]
    chosen, order, harm = [full] * len(features), list[int](), [0.0]
    while len(order) < len(chosen):
        left = [tile for tile, ratio in enumerate(chosen) if ratio == full]
        choices = [tuple(coarse if i == tile else r for i, r in enumerate(chosen)) for tile in left]
        kl = kl_at(predictor, sample, features, choices, reference=predictor)
        least = int(kl.argmin())
        order.append(left[least])
        chosen[left[least]] = coarse
        harm.append(float(kl[least]))
    scores = torch.empty(len(order), dtype=torch.float64)
    scores[order] = -rising_steps(torch.tensor(harm, dtype=torch.float64))
    return scores


def rising_steps(harm: Float64[Tensor, " n"]) -> Float64[Tensor, " m"]:
    """Return the slopes of the lower convex hull of harm after 0, 1, ... tiles, one per tile.

    They rise, so that a threshold on them compresses the tiles of a sample in their order. A step that costs
    much but makes the next ones cheap shares its cost with them; a tiny rise keeps their order.

    >>> rising_steps(torch.tensor([0.0, 1.0, 5.0, 6.0, 9.0], dtype=torch.float64)).round(decimals=6)
    tensor([1.0000, 2.5000, 2.5000, 3.0000], dtype=torch.float64)
    """
    steps, start = torch.empty(len(harm) - 1, dtype=torch.float64), 0
    while start < len(steps):
        slopes = (harm[start + 1 :] - harm[start]) / torch.arange(1, len(harm) - start)
        end = start + 1 + int(slopes.argmin())
        steps[start:end], start = slopes.min(), end
    return steps + 1e-9 * torch.arange(len(steps))
