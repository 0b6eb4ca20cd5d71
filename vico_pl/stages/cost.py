"""FLOPs of a sample, by which samples are assigned to ranks and runs are planned.

A forward pass counts once, and twice more what is trained: for the gradients of its weights and of its
input. A frozen part that gradients pass through counts once more, and so does what is recomputed.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from vico_pl.model.connector import FULL_RATIO
from vico_pl.model.flops import ModelFlops
from vico_pl.stages.settings import RunSettings

Number = int | float
Parts = dict[str, Number]  # FLOPs by part of the step


class SampleCounts(NamedTuple):
    """What a sample consists of, as the policy sees it."""

    tiles: Mapping[int, Number]  # by compression ratio
    text_tokens: Number
    response_tokens: Number = 0  # which run through the heads


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What a sample costs in a stage. Data workers hold it, so it refers to no model."""

    flops: ModelFlops
    ratios: Sequence[int]  # that the policy's tiles may have
    compares: bool  # with a reference
    ratios_at: Callable[[int, Sequence[int]], Sequence[int]]  # `Stage.ratios_at` of a run
    parts: Callable[[SampleCounts], Parts]  # `Stage.cost_parts` of a run

    def __call__(self, position: int, tiles_per_image: Sequence[int], text_tokens: int) -> float:
        """Return the FLOPs of the sample at a position of the run, without heads and router."""
        tiles = Counter(self.ratios_at(position, tiles_per_image))
        parts = self.parts(SampleCounts(tiles, text_tokens))
        return sum(work for part, work in parts.items() if part != "router")

    def expected_parts(self, tiles: Number, text_tokens: Number, response_tokens: Number) -> Parts:
        """Return the FLOPs expected of a sample: the mean over ratios, all of its tiles at the same one."""
        draws = [self.parts(SampleCounts({r: tiles}, text_tokens, response_tokens)) for r in self.ratios]
        return {name: fmean(draw[name] for draw in draws) for name in draws[0]}

    def vision_tokens(self, tiles: Number) -> dict[str, Number]:
        """Return the vision tokens that each model is expected to see of a sample."""
        per_tile = self.flops.vision_tokens_per_tile
        policy = {"policy": tiles * fmean(per_tile[ratio] for ratio in self.ratios)}
        return {**policy, "reference": tiles * per_tile[FULL_RATIO]} if self.compares else policy


def forward_parts(flops: ModelFlops, tiles: Mapping[int, Number], text_tokens: Number) -> Parts:
    """Return the FLOPs from tiles, a number per ratio, to hidden states."""
    tokens = text_tokens + sum(flops.vision_tokens_per_tile[ratio] * n for ratio, n in tiles.items())
    return {
        "vision": sum(tiles.values()) * flops.vision_per_tile,
        "connectors": sum(flops.connector_per_tile[ratio] * n for ratio, n in tiles.items()),
        "language": flops.language(round(tokens)),
    }


def trained_parts(run: RunSettings, flops: ModelFlops, sample: SampleCounts) -> Parts:
    """Return the FLOPs of forward and backward pass of a policy of which parts are trained."""
    trainable, recomputed = set(run.model.trainable), run.trainer.activation_checkpointing
    vision = "vision" in trainable
    reached = bool(trainable & {"vision", "connectors"})  # gradients flow back into the connectors
    passes = {
        "vision": 3 + recomputed if vision else 1,
        "connectors": 1 + ("connectors" in trainable) + vision if reached else 1,
        "language": 2 + ("language" in trainable) + recomputed,
        "head": 2 + ("language" in trainable),
    }
    forward = forward_parts(flops, sample.tiles, sample.text_tokens)
    forward["head"] = sample.response_tokens * flops.head_per_token
    return {f"policy {part}": passes[part] * work for part, work in forward.items()}
