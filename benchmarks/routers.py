"""Run `vico` with another router in place of the usual one: variants of the study.

    python benchmarks/routers.py small train recipes/free/router.yaml run_dir=RUN model.path=MODEL
    python benchmarks/routers.py small calibrate RUN/model --data SHARDS

`small` has a tenth of the weights; `convolution` looks at the neighbours of each patch before it pools them.
Other commands refuse the weights of such a model, whose folder says nothing of it. docs/extending/router.md
shows how to add a router under a name of its own.
"""

import math
import sys

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from vico_pl.cli import main
from vico_pl.model.router import DEFAULT_ROUTER, ROUTERS


class SmallRouter(nn.Module):
    """One attention layer with a learned query, then a linear classifier."""

    def __init__(self, width: int, *, num_ratios: int = 2, num_heads: int = 1) -> None:
        """Build a router for patch features of `width` channels."""
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_ratios))

    def forward(self, features: Float[Tensor, "T P C"]) -> Float[Tensor, "T K"]:
        """Return logits over ratios, coarsest first; patch features are not changed by the gradient."""
        features = self.prepare(features.detach().to(self.query.dtype))
        query = self.query.expand(len(features), -1, -1)
        pooled, _ = self.attention(query, features, features, need_weights=False)
        return self.gate(pooled[:, 0])

    def prepare(self, features: Float[Tensor, "T P C"]) -> Float[Tensor, "T P C"]:
        """Return what is pooled."""
        return features


class ConvolutionRouter(SmallRouter):
    """The same behind two residual convolutions over the grid of patches."""

    def __init__(self, width: int, *, num_ratios: int = 2, num_heads: int = 1) -> None:
        """Build a router for patch features of `width` channels."""
        super().__init__(width, num_ratios=num_ratios, num_heads=num_heads)
        self.norm = nn.LayerNorm(width)
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def prepare(self, features: Float[Tensor, "T P C"]) -> Float[Tensor, "T P C"]:
        """Let each patch know its neighbours."""
        side = math.isqrt(features.shape[1])
        grid = self.norm(features).mT.unflatten(2, (side, side))  # T C side side
        for convolution in self.convolutions:
            grid = grid + gelu(convolution(grid))
        return grid.flatten(2).mT


if __name__ == "__main__":
    ROUTERS[DEFAULT_ROUTER] = {"small": SmallRouter, "convolution": ConvolutionRouter}[sys.argv.pop(1)]
    main()
