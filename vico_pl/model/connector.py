"""Patch features -> vision tokens: one small MLP per compression ratio.

Masks of dropout depend on the tile alone, so that they are the same for any number of ranks. A mask is not
drawn from a generator, whose state would depend on what this rank computed before: it is a hash of seed,
position of the sample in the run, number of the tile in the sample, layer and element.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vico_pl.types import Batch

FULL_RATIO = 4  # patches per vision token of the reference; the first entry of every list of ratios
_MASK = 2**32 - 1


def pixel_unshuffle(features: Float[Tensor, "T P C"], factor: int) -> Float[Tensor, "T N F"]:
    """Fold `factor` x `factor` patches of a square grid into one vector of `factor**2 * C` channels.

    Channels of a folded vector are ordered (row within the block, column within the block, C), and vectors
    row by row, as released InternVL weights expect, which call it pixel_shuffle (`ps_version: v2`).
    """
    num_tiles, num_patches, channels = features.shape
    blocks = math.isqrt(num_patches) // factor
    grid = features.view(num_tiles, blocks, factor, blocks, factor, channels)
    return grid.transpose(2, 3).reshape(num_tiles, blocks * blocks, factor * factor * channels)


class Connector(nn.Module):
    """Pixel unshuffle by the square root of the ratio, then an MLP into the language model's width.

    At ratio 4 it has the layers of InternVL's `mlp1`; above, those of Flash's `mlp2` (wider, with dropout).
    """

    def __init__(self, ratio: int, *, vision_width: int, language_width: int) -> None:
        """Build the connector of one ratio, a square number of patches per vision token."""
        super().__init__()
        self.factor = math.isqrt(ratio)
        folded, width = ratio * vision_width, language_width
        hidden = [width] if ratio == FULL_RATIO else [2 * width, 2 * width]
        layers: list[nn.Module] = [nn.LayerNorm(folded)]
        for before, after in pairwise([folded, *hidden]):
            layers += [nn.Linear(before, after), nn.GELU()]
            if ratio != FULL_RATIO:
                layers.append(TileDropout(0.1))
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden[-1], width))

    def forward(self, features: Float[Tensor, "T P C"]) -> Float[Tensor, "T N D"]:
        """Turn the patch features of each tile into its vision tokens."""
        return self.mlp(pixel_unshuffle(features, self.factor))


class Connectors(nn.Module):
    """The connectors of all ratios; runs only the chosen one on each tile."""

    def __init__(self, ratios: Sequence[int], *, vision_width: int, language_width: int) -> None:
        """Build one connector per ratio."""
        super().__init__()
        self.by_ratio = nn.ModuleDict(
            {str(r): Connector(r, vision_width=vision_width, language_width=language_width) for r in ratios}
        )

    def forward(
        self,
        features: Float[Tensor, "T P C"],
        ratios: Int64[Tensor, " T"],
        *,
        keys: Int64[Tensor, " T"] | None = None,
    ) -> tuple[Float[Tensor, "TN D"], Int64[Tensor, " T"]]:
        """Return the vision tokens of all tiles, flat and in their order, and how many each tile has.

        `keys` of the tiles decide the masks of dropout.
        """
        features = features.to(next(self.parameters()).dtype)  # of a frozen tower it may be another one
        counts = features.shape[1] // ratios
        starts = counts.cumsum(0) - counts
        pieces, places = [], []
        for name, connector in self.by_ratio.items():
            chosen = (ratios == int(name)).nonzero().squeeze(1)
            # In training all take part, so that no gradient is missing; without tiles too, for the width.
            if len(chosen) or self.training or not len(ratios):
                if self.training:  # there is no dropout otherwise
                    set_keys(connector, None if keys is None else keys[chosen])
                tokens = connector(features[chosen])
                pieces.append(tokens.flatten(0, 1))
                within = torch.arange(tokens.shape[1], device=ratios.device)
                places.append((starts[chosen, None] + within).flatten())
        return torch.cat(pieces)[torch.cat(places).argsort()], counts


class TileDropout(nn.Dropout):
    """Dropout of values (T, ...) whose masks follow from the tiles' keys; without keys, plain dropout."""

    keys: Tensor | None = None  # (T,)

    def forward(self, input: Tensor) -> Tensor:
        """Set a fraction `p` of each tile's values to 0 in training mode, and scale up the others."""
        if self.keys is None or not self.training or self.p == 0:
            return super().forward(input)
        elements = torch.arange(input.shape[1:].numel(), device=input.device)
        noise = _mix(self.keys[:, None] ^ _mix(elements)).view_as(input)  # uniform in 0 to 2**32 - 1
        return torch.where(noise < self.p * _MASK, 0.0, input / (1 - self.p))


def set_keys(module: nn.Module, keys: Int64[Tensor, " T"] | None) -> None:
    """Give the dropout layers of a module the keys of the tiles that it runs on next."""
    layers = [layer for layer in module.modules() if isinstance(layer, TileDropout)]
    for number, layer in enumerate(layers):
        layer.keys = None if keys is None else _mix(keys + number)


def tile_keys(batch: Batch, *, seed: int) -> Int64[Tensor, " T"]:
    """Return the key of each tile of a batch."""
    counts = [sum(tiles) for tiles in batch.tiles_per_image]
    numbers = np.concatenate([np.arange(count) for count in counts])
    keys = _mix(_mix(_mix(seed) ^ np.repeat(np.array(batch.positions), counts)) ^ numbers)
    return torch.from_numpy(keys).to(batch.tiles.device, non_blocking=True)


def _mix(numbers: Any) -> Any:
    """Hash whole numbers to 32 bits, each of which depends on all of theirs; no product overflows 64."""
    numbers = numbers & _MASK
    for factor in (0x7FEB352D, 0x45D9F3B):
        numbers ^= numbers >> 16
        numbers *= factor
        numbers &= _MASK
    numbers ^= numbers >> 15
    return numbers
