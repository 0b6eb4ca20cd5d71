"""What a step costs per sample, in floating-point operations: by this, samples are dealt to ranks.

A forward pass counts once and a backward pass twice. Functions of numbers alone, so that data workers can
call them without a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vico_pl.model.connector import FULL_RATIO
from vico_pl.model.flops import ModelFlops
from vico_pl.stages.consistency import draw_sample_ratios


@dataclass(frozen=True, kw_only=True)
class PretrainCost:
    """Forward and backward at full tokens."""

    flops: ModelFlops

    def __call__(self, position: int, tiles_per_image: Sequence[int], text_tokens: int) -> float:
        """Return the cost of the sample at a position of the run."""
        return 3 * forward_flops(self.flops, [FULL_RATIO] * sum(tiles_per_image), text_tokens)


@dataclass(frozen=True, kw_only=True)
class ConsistencyCost:
    """Forward and backward of the policy at the ratios that stage 1 draws, forward of the reference."""

    flops: ModelFlops
    ratios: Sequence[int]
    ratio_draw: str
    seed: int
    trains_vision: bool = True

    def __call__(self, position: int, tiles_per_image: Sequence[int], text_tokens: int) -> float:
        """Return the cost of the sample at a position of the run."""
        drawn = draw_sample_ratios(
            position, tiles_per_image, ratios=self.ratios, mode=self.ratio_draw, seed=self.seed
        )
        reference = forward_flops(self.flops, [FULL_RATIO] * len(drawn), text_tokens)
        policy = 3 * forward_flops(self.flops, drawn, text_tokens)
        spared = 0.0 if self.trains_vision else 2 * len(drawn) * self.flops.vision_per_tile
        return policy + reference - spared


@dataclass(frozen=True, kw_only=True)
class RouterCost:
    """Forward of reference and policy, and of a branch per tile: half a sample's tokens on average."""

    flops: ModelFlops

    def __call__(self, position: int, tiles_per_image: Sequence[int], text_tokens: int) -> float:
        """Return the cost of the sample at a position of the run."""
        num_tiles = sum(tiles_per_image)
        forward = forward_flops(self.flops, [FULL_RATIO] * num_tiles, text_tokens)
        language = forward - num_tiles * self.flops.vision_per_tile
        return 2 * forward + num_tiles * language / 2


def forward_flops(flops: ModelFlops, ratios: Sequence[int], text_tokens: int) -> float:
    """Return the cost from tiles, seen at these ratios, to hidden states; the head is left out."""
    tokens = text_tokens + sum(flops.vision_tokens_per_tile[ratio] for ratio in ratios)
    tiles = sum(flops.vision_per_tile + flops.connector_per_tile[ratio] for ratio in ratios)
    return tiles + flops.language(tokens)
