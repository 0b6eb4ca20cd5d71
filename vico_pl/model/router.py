"""The Visual Resolution Router (ViR): chooses a compression ratio per tile from its patch features alone.

From its logits to a ratio leads our rule, or that of released models.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from vico_pl.model.dropout import TileDropout

DEFAULT_ROUTER = "vir"
NEVER = 1.1  # a threshold above every probability: every tile keeps full tokens
RELEASED_HEADS = 16  # attention heads of the routers in released checkpoints
MAX_FUSED_WIDTH = 256  # above it multiplications, not the number of operations, are what a router costs


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """When a tile is compressed; part of a calibrated model."""

    threshold: float  # compress iff P(compress) is at least this
    # Released models also ask that it lies above this quantile of the sample's tiles; None: no such rule.
    relative_threshold: float | None = None


class ResolutionRouter(nn.Module):
    """Pools a tile's patch features with one learned query and classifies the result.

    Columns are ordered as in released checkpoints: column 0 is the logit of the *coarsest* ratio (compress),
    the last column that of full tokens. Names, structure and quirk are those of InternVL3.5-Flash: four
    attention layers are stored, but the second one runs three times and the third and fourth never do.
    """

    def __init__(self, width: int, *, num_ratios: int = 2, num_heads: int = RELEASED_HEADS) -> None:
        """Build a router for patch features of `width` channels."""
        super().__init__()
        self.pooling_before_gating: Any = nn.ModuleDict()
        self.pooling_before_gating.query_token = nn.Parameter(torch.randn(1, width) * 0.02)
        for i in range(1, 5):
            attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
            self.pooling_before_gating.update({f"attn{i}": attention, f"norm{i}": nn.LayerNorm(width)})
        self.gating = nn.ModuleDict({f"block{i}": _block(width) for i in range(1, 5)})
        self.gating["gate"] = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_ratios))
        self._fused: tuple[_Fused, _Fused] | None = None  # of the two attention layers that run
        self.requires_grad_()

    def forward(self, features: Float[Tensor, "T P C"]) -> Float[Tensor, "T K"]:
        """Return logits over ratios, coarsest first; patch features are not changed by the gradient."""
        pooling = self.pooling_before_gating
        features = features.detach().to(pooling.query_token.dtype)  # float32 while it is trained
        state = pooling.query_token.expand(len(features), -1)  # T C
        fused = None if torch.is_grad_enabled() else self._fused
        for i in (1, 2, 2, 2):
            if fused is None:
                attended = _attend(pooling[f"attn{i}"], state, features)
            else:
                attended = _attend_fused(fused[i - 1], state, features)
            state = pooling[f"norm{i}"](attended)
        for i in range(1, 5):
            state = state + self.gating[f"block{i}"](state)
        return self.gating["gate"](state)

    def fuse(self) -> None:
        """Prepare inference: multiply matrices of attention that only ever follow each other.

        The logits are equal but for rounding, from half as many operations. The weights of attention must not
        change afterwards. Routers wider than `MAX_FUSED_WIDTH` stay as they are.
        """
        pooling = self.pooling_before_gating
        if pooling.query_token.shape[1] <= MAX_FUSED_WIDTH:
            self._fused = _fuse(pooling["attn1"]), _fuse(pooling["attn2"])

    def requires_grad_(self, requires_grad: bool = True) -> "ResolutionRouter":  # noqa: FBT001, FBT002
        """Turn training on or off; what never runs stays off, as DDP would wait for its gradients."""
        super().requires_grad_(requires_grad)
        for name in ("attn3", "norm3", "attn4", "norm4"):
            self.pooling_before_gating[name].requires_grad_(requires_grad=False)
        return self


def _attend(
    layer: nn.MultiheadAttention, query: Float[Tensor, "T C"], features: Float[Tensor, "T P C"]
) -> Float[Tensor, "T C"]:
    """Return what the layer gives for one query per tile, without keys and values of the patches.

    For a single query it takes far less to bring the query to the patches than the patches to the query:
    q . (K x + b) = (q K) . x + a constant that softmax ignores, and the weighted mean of V x is V times that
    of x. At 1024 patches and channels this saves 98 % of the layer's operations.
    """
    shape = (layer.num_heads, -1, layer.embed_dim)  # H heads of C/H rows
    (wq, wk, wv), (bq, _, bv) = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    heads = linear(query, wq, bq).unflatten(1, shape[:2])
    probes = torch.einsum("thd,hdc->thc", heads, wk.view(shape))
    pooled = scaled_dot_product_attention(probes, features, features, scale=heads.shape[-1] ** -0.5)  # T H C
    return layer.out_proj(torch.einsum("thc,hdc->thd", pooled, wv.view(shape)).flatten(1) + bv)


class _Fused(NamedTuple):
    """An attention layer for single queries as two matrices: before and after the features are weighted."""

    to_probes: Float[Tensor, "HC C"]  # with the scale of the softmax
    probes_bias: Float[Tensor, " HC"]
    to_output: Float[Tensor, "C HC"]
    output_bias: Float[Tensor, " C"]


@torch.no_grad()
def _fuse(layer: nn.MultiheadAttention) -> _Fused:
    shape, out = (layer.num_heads, -1, layer.embed_dim), layer.out_proj
    wq, wk, wv = (weight.view(shape) for weight in layer.in_proj_weight.chunk(3))  # H d C
    bq, _, bv = layer.in_proj_bias.chunk(3)
    scale = wq.shape[1] ** -0.5
    return _Fused(
        torch.einsum("hdc,hdk->hkc", wq, wk).flatten(0, 1) * scale,
        torch.einsum("hd,hdk->hk", bq.view(shape[:2]), wk).flatten() * scale,
        torch.einsum("ohd,hdc->ohc", out.weight.unflatten(1, shape[:2]), wv).flatten(1),
        linear(bv, out.weight, out.bias),
    )


def _attend_fused(
    layer: _Fused, query: Float[Tensor, "T C"], features: Float[Tensor, "T P C"]
) -> Float[Tensor, "T C"]:
    """Return what `_attend` gives, but for rounding."""
    probes = linear(query, layer.to_probes, layer.probes_bias).unflatten(1, (-1, query.shape[1]))  # T H C
    pooled = torch.bmm(torch.bmm(probes, features.mT).softmax(-1), features)
    return linear(pooled.flatten(1), layer.to_output, layer.output_bias)


def _block(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, 4 * width),
        nn.GELU(),
        TileDropout(0.1),
        nn.Linear(4 * width, width),
        TileDropout(0.1),
        nn.LayerNorm(width),
    )


# Builders by the name that a `ModelSpec` gives its router: (vision width, num_ratios, num_heads) -> module
# with patch features (T, P, C) -> logits (T, K), coarsest ratio first. A new architecture is one line here.
ROUTERS: dict[str, Callable[..., nn.Module]] = {DEFAULT_ROUTER: ResolutionRouter}


def build_router(name: str, width: int, *, num_ratios: int, num_heads: int) -> nn.Module:
    """Build a randomly initialised router.

    Raises:
        ValueError: there is no router of this name.
    """
    if name not in ROUTERS:
        raise ValueError(f"router is '{name}'; expected one of {', '.join(ROUTERS)}")
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"router_heads is {num_heads}; expected a divisor of the vision width {width}")
    return ROUTERS[name](width, num_ratios=num_ratios, num_heads=num_heads)


def compress_probability(logits: Float[Tensor, "T K"]) -> Float[Tensor, " T"]:
    """Return P(compress): the probability of any ratio coarser than full tokens."""
    return routing_scores(logits)[:, -1]


def routing_scores(logits: Float[Tensor, "T K"], rule: RoutingRule | None = None) -> Float[Tensor, "T K-1"]:
    """Return for each ratio except full tokens, coarsest first, the probability of it or a coarser one.

    Under the rule of released models a tile must also lie above a quantile of the tiles, those of one sample,
    or its score is -1: a single tile equals its quantile and is never compressed.
    """
    scores = logits.softmax(-1).cumsum(-1)[:, :-1]
    if rule is None or rule.relative_threshold is None or not len(scores):
        return scores
    # In float32 and strictly above, as released code compares.
    is_above = scores > torch.quantile(scores.float(), rule.relative_threshold, dim=0)
    return torch.where(is_above, scores, -1.0)


def choose_ratios(
    logits: Float[Tensor, "T K"], *, ratios: list[int], rule: RoutingRule
) -> Int64[Tensor, " T"]:
    """Choose for each tile of one sample the coarsest ratio whose cumulative probability passes the rule.

    With two ratios: compress iff P(compress) >= threshold. Our own rule looks at each tile alone, so other
    tiles never change a choice, and one-tile images are routed like any other.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])  # P(compress) is 0.88 and 0.12
    >>> choose_ratios(logits, ratios=[4, 16], rule=RoutingRule(threshold=0.1))
    tensor([16, 16])
    >>> choose_ratios(logits, ratios=[4, 16], rule=RoutingRule(threshold=0.1, relative_threshold=0.5))
    tensor([16,  4])
    """
    return at_thresholds([routing_scores(logits, rule)], [rule.threshold], ratios=ratios)[0]


def at_thresholds(
    scores: Sequence[Float[Tensor, "_ ..."]], thresholds: Sequence[float], *, ratios: list[int]
) -> list[Int64[Tensor, " _"]]:
    """Give each tile the coarsest ratio whose score reaches its threshold, else full tokens.

    Tiles have a score per coarser ratio, coarsest first, or one for all; so have ratios their thresholds.

    >>> at_thresholds([torch.tensor([0.2, 0.6, 0.9])], [0.8, 0.5], ratios=[4, 16, 64])
    [tensor([ 4, 16, 64])]
    """
    found = []
    for of_sample in scores:
        columns = of_sample if of_sample.ndim > 1 else of_sample[:, None]
        passed = (columns >= columns.new_tensor(thresholds)).expand(-1, len(ratios) - 1)
        found.append(torch.tensor(ratios, device=columns.device)[passed.sum(-1)])  # 0 passed: full tokens
    return found


def threshold_for(
    scores: Sequence[Float[Tensor, "_ ..."]], *, compressed_fraction: float, halfway: bool = False
) -> float:
    """Return the threshold that this fraction of all scores reaches: the lowest score among them.

    With `halfway` it lies between that score and the next lower one, or is 0 if every tile reaches it.

    >>> threshold_for([torch.tensor([0.1, 0.9]), torch.tensor([0.4, 0.6])], compressed_fraction=0.5)
    0.6000000238418579
    """
    ranked = torch.cat(list(scores)).flatten().sort(descending=True).values
    count = round(compressed_fraction * len(ranked))
    if count == 0:
        return math.inf
    if not halfway:
        return float(ranked[count - 1])
    return 0.0 if count == len(ranked) else float(ranked[count - 1] + ranked[count]) / 2


def vision_tokens(ratios: Sequence[Int64[Tensor, " _"]], *, num_patches: int) -> list[int]:
    """Return the vision tokens of each sample."""
    return [int((num_patches // of_sample).sum()) for of_sample in ratios]
