"""Patch features -> vision tokens: one small MLP per compression ratio."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vico_pl.model.dropout import TileDropout, set_keys

FULL_RATIO = 4  # patches per vision token of the reference; the first entry of every list of ratios
STARTS = ("mean", "random")  # weights of a connector that is added to a model


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

    @torch.no_grad()
    def start_as_mean(self, full: "Connector") -> None:
        """Set the weights so that each token is about the mean of the full tokens that it takes the place of.

        The two halves of the first layer hold the mean, before its GELU, of what the first layer of `full`
        gives for the upper and for the lower ones of these tokens; the second layer is the identity, the last
        one averages. It is not exact: a second GELU follows, and one LayerNorm sees the patches of them all.
        """
        norm, first, _, last = cast(tuple[nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear], tuple(full.mlp))
        rows = torch.arange(self.factor // full.factor)  # of full tokens; there are as many columns
        halves = torch.stack([rows < len(rows) / 2, rows >= len(rows) / 2]).float()  # 2, rows
        per_token = (first.weight * norm.weight).float().unflatten(1, (full.factor, full.factor, -1))
        means = halves / halves.sum(1, keepdim=True), torch.ones(len(rows)) / len(rows)
        by_patch = torch.einsum("hr,s,dijc->hdrisjc", *means, per_token)
        first_bias, width = first.bias.float() + first.weight.float() @ norm.bias.float(), first.out_features
        shares = halves.mean(1).repeat_interleave(width)
        new = [
            (by_patch.flatten(0, 1).flatten(1), first_bias.repeat(2)),
            (torch.eye(2 * width), torch.zeros(2 * width)),
            (last.weight.repeat(1, 2) * shares, last.bias),
        ]
        linears = [layer for layer in self.mlp if isinstance(layer, nn.Linear)]
        for linear, (weight, bias) in zip(linears, new, strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)


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
