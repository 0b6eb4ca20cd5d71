"""The Visual Resolution Router (ViR): chooses a compression ratio per tile from its patch features alone."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

RELEASED_HEADS = 16  # attention heads of the routers in released checkpoints


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """When a tile is compressed; part of a calibrated model."""

    threshold: float  # compress iff P(compress) is at least this
    # Released models also ask that it lies above this quantile of the sample's tiles; None: no such rule.
    relative_threshold: float | None = None


class ResolutionRouter(nn.Module):
    """Pools a tile's patch features with one learned query and classifies the result.

    Columns are ordered as in released checkpoints: column 0 is the logit of the *coarsest* ratio (compress),
    the last column that of full tokens. The structure and its quirk are those of InternVL3.5-Flash: four
    attention layers are stored, but the second one runs three times and the third and fourth never do.
    """

    def __init__(self, width: int, *, num_ratios: int = 2, num_heads: int = RELEASED_HEADS) -> None:
        """Build a router for patch features of `width` channels."""
        super().__init__()
        self.pooling_before_gating = AttentionPooling(width, num_heads=num_heads)
        self.gating = Gating(width, num_ratios=num_ratios)

    def forward(self, features: Float[Tensor, "T P C"]) -> Float[Tensor, "T K"]:
        """Return logits over ratios, coarsest first; patch features are not changed by the gradient."""
        dtype = self.pooling_before_gating.query_token.dtype  # float32 while it is trained
        return self.gating(self.pooling_before_gating(features.detach().to(dtype)))

    def requires_grad_(self, requires_grad: bool = True) -> "ResolutionRouter":  # noqa: FBT001, FBT002
        """Turn training on or off; the pooling keeps its unused layers off."""
        self.pooling_before_gating.requires_grad_(requires_grad)
        self.gating.requires_grad_(requires_grad)
        return self


class AttentionPooling(nn.Module):
    """One learned query that attends to the patches of a tile four times."""

    attn1: nn.MultiheadAttention
    attn2: nn.MultiheadAttention
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm

    def __init__(self, width: int, *, num_heads: int) -> None:
        """Build all four stored layers; see `forward` for which of them run."""
        super().__init__()
        self.query_token = nn.Parameter(torch.randn(1, width) * 0.02)
        for i in range(1, 5):
            setattr(self, f"attn{i}", nn.MultiheadAttention(width, num_heads, batch_first=True))
            setattr(self, f"norm{i}", nn.LayerNorm(width))
        self.requires_grad_()

    def forward(self, features: Float[Tensor, "T P C"]) -> Float[Tensor, "T C"]:
        """Return the pooled vector of each tile."""
        query = self.query_token.expand(len(features), 1, -1)  # T 1 C
        query = self.norm1(self.attn1(query, features, features, need_weights=False)[0])
        for _ in range(3):
            query = self.norm2(self.attn2(query, features, features, need_weights=False)[0])
        return query.squeeze(1)

    def requires_grad_(self, requires_grad: bool = True) -> "AttentionPooling":  # noqa: FBT001, FBT002
        """Turn training on or off; what never runs stays off, as DDP would wait for its gradients."""
        for name, parameter in self.named_parameters():
            runs = not name.startswith(("attn3", "norm3", "attn4", "norm4"))
            parameter.requires_grad_(requires_grad and runs)
        return self


class Gating(nn.Module):
    """Four residual MLP blocks and a linear classifier."""

    block1: nn.Sequential
    block2: nn.Sequential
    block3: nn.Sequential
    block4: nn.Sequential

    def __init__(self, width: int, *, num_ratios: int) -> None:
        """Build the blocks under the names of released checkpoints."""
        super().__init__()
        for i in range(1, 5):
            setattr(self, f"block{i}", _block(width))
        self.gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_ratios))

    def forward(self, pooled: Float[Tensor, "T C"]) -> Float[Tensor, "T K"]:
        """Classify pooled vectors."""
        for block in (self.block1, self.block2, self.block3, self.block4):
            pooled = pooled + block(pooled)
        return self.gate(pooled)


def _block(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, 4 * width),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(4 * width, width),
        nn.Dropout(0.1),
        nn.LayerNorm(width),
    )
