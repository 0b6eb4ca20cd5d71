"""Run `vico` with a router of a tenth of the weights in place of the usual one: a variant of the study.

    python benchmarks/small_router.py train recipes/free/router.yaml run_dir=RUN model.path=MODEL
    python benchmarks/small_router.py calibrate RUN/model --data SHARDS

Other commands refuse the weights of such a model, whose folder says nothing of it. docs/extending/router.md
shows how to add a router under a name of its own.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

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
        features = features.detach().to(self.query.dtype)
        query = self.query.expand(len(features), -1, -1)
        pooled, _ = self.attention(query, features, features, need_weights=False)
        return self.gate(pooled[:, 0])


if __name__ == "__main__":
    ROUTERS[DEFAULT_ROUTER] = SmallRouter
    main()
