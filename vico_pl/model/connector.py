"""Patch features -> vision tokens: one small MLP per compression ratio."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

FULL_RATIO = 4  # patches per vision token of the reference; the first entry of every list of ratios


def pixel_unshuffle(features: Float[Tensor, "T P C"], factor: int) -> Float[Tensor, "T N F"]:
    """Fold `factor` x `factor` patches of a square grid into one vector of `factor**2 * C` channels.

    Channels of a folded vector are ordered (row within the block, column within the block, C), and vectors
    row by row, as released InternVL weights expect, which call it pixel_shuffle (`ps_version: v2`).
    """
    num_tiles, num_patches, channels = features.shape
    side = round(num_patches**0.5)
    if side * side != num_patches or side % factor:
        raise ValueError(f"{num_patches} patches per tile do not fold by {factor} x {factor}")
    blocks = side // factor
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
        if self.factor**2 != ratio or ratio < FULL_RATIO:
            raise ValueError(f"compression ratio {ratio}: expected a square number from {FULL_RATIO} on")
        folded = ratio * vision_width
        make_mlp = _short_mlp if ratio == FULL_RATIO else _long_mlp
        self.mlp = make_mlp(folded, language_width)

    def forward(self, features: Float[Tensor, "T P C"]) -> Float[Tensor, "T N D"]:
        """Turn the patch features of each tile into its vision tokens."""
        return self.mlp(pixel_unshuffle(features, self.factor))


class Connectors(nn.Module):
    """The connectors of all ratios; runs only the chosen one on each tile."""

    def __init__(self, ratios: Sequence[int], *, vision_width: int, language_width: int) -> None:
        """Build one connector per ratio; the first ratio means full tokens."""
        super().__init__()
        if list(ratios) != sorted(set(ratios)) or not ratios or ratios[0] != FULL_RATIO:
            expected = f"rising square numbers that begin with {FULL_RATIO}"
            raise ValueError(f"ratios {list(ratios)}: expected {expected}")
        self.ratios, self.language_width = list(ratios), language_width
        self.by_ratio = nn.ModuleDict(
            {str(r): Connector(r, vision_width=vision_width, language_width=language_width) for r in ratios}
        )

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype

    def forward(
        self, features: Float[Tensor, "T P C"], ratios: Int64[Tensor, " T"]
    ) -> tuple[Float[Tensor, "TN D"], Int64[Tensor, " T"]]:
        """Return the vision tokens of all tiles, flat and in their order, and how many each tile has."""
        features = features.to(self.dtype)  # of a frozen tower it may be another one
        num_patches = features.shape[1]
        counts = num_patches // ratios
        starts = counts.cumsum(0) - counts
        pieces, places = [], []
        for ratio in self.ratios:
            chosen = (ratios == ratio).nonzero().squeeze(1)
            if len(chosen) == 0 and not self.training:
                continue
            tokens = self._run(ratio, features, chosen)
            pieces.append(tokens)
            places.append(starts[chosen, None] + torch.arange(num_patches // ratio, device=features.device))
        if not pieces:  # a batch of text alone
            return features.new_zeros(0, self.language_width), counts
        flat = torch.cat([piece.flatten(0, 1) for piece in pieces])
        place = torch.cat([p.flatten() for p in places])
        return flat[place.argsort()], counts

    def _run(self, ratio: int, features: Tensor, chosen: Tensor) -> Tensor:
        return self.by_ratio[str(ratio)](features[chosen])


def _short_mlp(folded: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(folded), nn.Linear(folded, width), nn.GELU(), nn.Linear(width, width))


def _long_mlp(folded: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(folded),
        nn.Linear(folded, 2 * width),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(2 * width, 2 * width),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(2 * width, width),
    )
