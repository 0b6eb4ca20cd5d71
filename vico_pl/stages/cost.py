"""FLOPs of a sample, by which samples are assigned to ranks and runs are planned.

A forward pass counts once, and twice more what is trained: for the gradients of its weights and of its
input. A frozen part that gradients pass through counts once more, and so does what is recomputed.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from vico_pl.model.connector import FULL_RATIO
from vico_pl.model.flops import ModelFlops
from vico_pl.stages.settings import RunSettings

Number = int | float
Parts = dict[str, Number]  # FLOPs by part of the step
TilesPerRatio = Mapping[int, Number]


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What a sample costs in a stage. Numbers alone, so that data workers need no model."""

    compares: ClassVar[bool] = True  # with a reference
    flops: ModelFlops
    ratios: Sequence[int] = (FULL_RATIO,)  # that the policy's tiles may have

    def __call__(self, position: int, tiles_per_image: Sequence[int], text_tokens: int) -> float:
        """Return the FLOPs of the sample at a position of the run, without heads and router."""
        tiles = Counter(self.ratios_at(position, tiles_per_image))
        return sum(self.parts(tiles, text_tokens).values())

    def ratios_at(self, position: int, tiles_per_image: Sequence[int]) -> Sequence[int]:
        """Return the compression ratio of each tile of the sample at a position: full tokens."""
        return [FULL_RATIO] * sum(tiles_per_image)

    @abstractmethod
    def parts(self, tiles: TilesPerRatio, text_tokens: Number, response_tokens: Number = 0) -> Parts:
        """Return the FLOPs of a sample whose policy sees `tiles`; heads run on the response tokens."""

    def expected_parts(self, tiles: Number, text_tokens: Number, response_tokens: Number) -> Parts:
        """Return the FLOPs expected of a sample: the mean over ratios, all of its tiles at the same one."""
        draws = [self.parts({ratio: tiles}, text_tokens, response_tokens) for ratio in self.ratios]
        return {name: fmean(draw[name] for draw in draws) for name in draws[0]}

    def vision_tokens(self, tiles: Number) -> dict[str, Number]:
        """Return the vision tokens that each model is expected to see of a sample."""
        per_tile = self.flops.vision_tokens_per_tile
        policy = {"policy": tiles * fmean(per_tile[ratio] for ratio in self.ratios)}
        return {**policy, "reference": tiles * per_tile[FULL_RATIO]} if self.compares else policy


@dataclass(frozen=True, kw_only=True)
class TrainedCost(StageCost):
    """Forward and backward pass of the policy."""

    compares = False
    passes: Mapping[str, int]

    def parts(self, tiles: TilesPerRatio, text_tokens: Number, response_tokens: Number = 0) -> Parts:
        """Return what the policy costs."""
        forward = forward_parts(self.flops, tiles, text_tokens)
        forward["head"] = response_tokens * self.flops.head_per_token
        return {f"policy {part}": self.passes[part] * work for part, work in forward.items()}


def forward_parts(flops: ModelFlops, tiles: TilesPerRatio, text_tokens: Number) -> Parts:
    """Return the FLOPs from tiles, a number per ratio, to hidden states."""
    tokens = text_tokens + sum(flops.vision_tokens_per_tile[ratio] * n for ratio, n in tiles.items())
    return {
        "vision": sum(tiles.values()) * flops.vision_per_tile,
        "connectors": sum(flops.connector_per_tile[ratio] * n for ratio, n in tiles.items()),
        "language": flops.language(round(tokens)),
    }


def trained_passes(run: RunSettings) -> dict[str, int]:
    """Return how many forward passes' work each part of a trained policy does in a step."""
    trainable, recomputed = set(run.model.trainable), run.trainer.activation_checkpointing
    vision = "vision" in trainable
    reached = bool(trainable & {"vision", "connectors"})  # gradients flow back into the connectors
    return {
        "vision": 3 + recomputed if vision else 1,
        "connectors": 1 + ("connectors" in trainable) + vision if reached else 1,
        "language": 2 + ("language" in trainable) + recomputed,
        "head": 2 + ("language" in trainable),
    }
