"""Dropout whose masks depend on the tile alone, so that they are the same for any number of ranks.

A mask is not drawn from a generator, whose state would depend on what this rank computed before: it is a hash
of seed, position of the sample in the run, number of the tile in the sample, layer and element.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from vico_pl.types import Batch

_MASK = 2**32 - 1


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
