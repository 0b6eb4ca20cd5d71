"""Labels of stage 2: loss ratios of tiles, thresholds for them, and what the router should choose.

Loss ratios (T, J) have a column for each of the J ratios coarser than full tokens, the coarsest first. A
target is the column to choose, as of the router's logits: 0 is the coarsest ratio, J full tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vico_pl.errors import check_settings
from vico_pl.losses.consistency import consistency_kl
from vico_pl.model.branches import branch_states
from vico_pl.model.reference import FrozenReference
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.types import Batch

LABEL_RULES = ("percentile", "tolerance")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Settings of stage 2."""

    label_mode: str = "tile"  # compress one tile at a time, or all tiles of an image at once (the report)
    # A tile is to be compressed if its loss ratio is below a threshold: a percentile of recent loss ratios
    # (the report), or 1 + tolerance (HyperVL, arXiv 2512.14052).
    label_rule: str = "percentile"
    percentile: float = 50.0  # of recent loss ratios; tiles below it get the target 0, compress
    window: int = 4096  # number of recent loss ratios
    min_history: int = 256  # loss ratios needed before the first labels
    tolerance: float = 0.1  # of rule tolerance: how much compressing may raise the loss, relative to it
    # Above 0, targets are probabilities: P(keep) = sigmoid(log(loss ratio / threshold) / label_softness).
    label_softness: float = 0.0
    epsilon: float = 1e-3  # nats, added to both losses of a ratio

    def __post_init__(self) -> None:
        check_settings(
            "router",
            self,
            label_mode=(self.label_mode in ("image", "tile"), "image or tile"),
            label_rule=(self.label_rule in LABEL_RULES, f"one of {', '.join(LABEL_RULES)}"),
            percentile=(0 < self.percentile < 100, "between 0 and 100"),
            tolerance=(self.tolerance >= 0, "0 or more"),
            label_softness=(self.label_softness >= 0, "0 or more"),
            epsilon=(self.epsilon > 0, "more than 0"),
            min_history=(1 <= self.min_history <= self.window, f"1 to router.window ({self.window})"),
        )

    def thresholds(self, ratios: Float[Tensor, "n ..."]) -> list[float]:
        """Return the threshold of each column of these loss ratios."""
        if self.label_rule == "tolerance":
            return [1 + self.tolerance] * ratios[:1].numel()
        found: list[float] = torch.quantile(ratios, self.percentile / 100, dim=0).reshape(-1).tolist()
        return found


class SlidingWindow(nn.Module):
    """The last `window` loss ratios, from which thresholds are computed; part of checkpoints."""

    values: Tensor
    seen: Tensor

    def __init__(self, config: RouterConfig, *, num_coarser: int = 1) -> None:
        super().__init__()
        self._config = config
        # One coarser ratio: (window,), as in checkpoints from when there was no more.
        self.register_buffer("values", torch.zeros(config.window, num_coarser).squeeze(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def update(self, ratios: Float[Tensor, "n ..."]) -> None:
        """Add the loss ratios of tiles, the oldest ones fall out."""
        window, shape = len(self.values), self.values.shape[1:]
        recent = ratios.detach().to(self.values).reshape(-1, *shape)[-window:]
        self.values.copy_(torch.cat([self.values, recent])[-window:])
        self.seen += len(ratios)

    def thresholds(self) -> list[float] | None:
        """Return a threshold per coarser ratio, or None while there are fewer than `min_history` tiles."""
        count = min(int(self.seen), len(self.values))
        if self._config.label_rule == "percentile" and count < self._config.min_history:
            return None
        return self._config.thresholds(self.values[-count:].float())


@torch.no_grad()
def tile_loss_ratios(
    policy: VisionLanguageModel,
    reference: FrozenReference,
    batch: Batch,
    features: Float[Tensor, "T P C"],
    *,
    mode: str,
    epsilon: float,
    num_groups: Callable[[int], int] = int,
) -> Float[Tensor, "T J"]:
    """Return, per tile and coarser ratio, the factor by which compressing it raises its sample's loss.

    `mode` is `tile` (one tile at a time) or `image` (all at once); `epsilon`, in nats, is added to both
    losses. Vision encoder and reference run once per sample. The policy's language model runs once at full
    tokens and then, for each tile and ratio, over what follows it, in groups (see `branch_states`).
    """
    target, coarser = reference.response_states(batch), policy.ratios[:0:-1]
    tokens = torch.arange(len(target), device=target.device)
    if mode == "image":
        full_ratios = policy.full_ratios(batch)
        full, *compressed = (
            policy.response_states(batch, features, torch.full_like(full_ratios, ratio))
            for ratio in (policy.ratios[0], *coarser)
        )
        origin = tokens.repeat(1 + len(coarser))
    else:
        found = branch_states(policy, batch, features, ratios=coarser, num_groups=num_groups)
        full, compressed = found.full, [found.branches]
        origin = torch.cat([tokens, found.response_origin])
    order = origin.argsort(stable=True)  # by token: the reference's logits are computed once for each
    states = torch.cat([full, *compressed])[order]
    kl = consistency_kl(states, policy.head, target, reference.head, reference_rows=origin[order])
    kl = torch.empty_like(kl).index_copy_(0, order, kl)
    before, after = kl[: len(tokens)], kl[len(tokens) :]
    if mode == "image":
        samples = [mean_per_sample(of_ratio, batch) for of_ratio in after.view(len(coarser), -1)]
        losses = torch.stack(samples)[:, batch.tile_to_sample]
    else:
        count = batch.num_tiles * len(coarser)
        losses = _mean_by(found.response_branch, after, count=count).view(len(coarser), -1)
    return loss_ratio(losses, mean_per_sample(before, batch)[batch.tile_to_sample], epsilon=epsilon).T


def mean_per_sample(per_token: Float[Tensor, " R"], batch: Batch) -> Float[Tensor, " B"]:
    """Average a value of response tokens over each sample; 0 for a sample without response."""
    samples = torch.arange(batch.num_samples, device=per_token.device)
    owner = samples.repeat_interleave(batch.sample_lengths)[batch.response_mask]
    return _mean_by(owner, per_token, count=batch.num_samples)


def _mean_by(owner: Int64[Tensor, " R"], values: Float[Tensor, " R"], *, count: int) -> Float[Tensor, " _"]:
    total = values.new_zeros(count).index_add_(0, owner, values)
    return total / torch.bincount(owner, minlength=count).clamp(min=1)


def loss_ratio(
    compressed: Float[Tensor, "..."], full: Float[Tensor, "..."], *, epsilon: float
) -> Float[Tensor, "..."]:
    """Return the factor of the loss under compression: (compressed + epsilon) / (full + epsilon), in nats.

    >>> loss_ratio(torch.tensor(0.3), torch.tensor(0.1), epsilon=0.1)
    tensor(2.)
    """
    return (compressed + epsilon) / (full + epsilon)


def router_targets(ratios: Float[Tensor, "T J"], thresholds: Sequence[float]) -> Int64[Tensor, " T"]:
    """Return the column of the coarsest ratio whose loss ratio is below its threshold, else the last: keep.

    >>> router_targets(torch.tensor([[1.1, 0.9], [0.8, 0.9], [1.1, 1.2]]), [1.0, 1.0])
    tensor([1, 0, 2])
    """
    is_too_coarse = ratios >= ratios.new_tensor(thresholds)
    return is_too_coarse.cumprod(1).sum(1)


def soft_targets(
    ratios: Float[Tensor, "T J"], thresholds: Sequence[float], *, softness: float
) -> Float[Tensor, "T K"]:
    """Return probabilities of the columns, of which the most probable one becomes certain as softness falls.

    Each ratio, the coarsest first, is too coarse with probability sigmoid(log(loss ratio / threshold) /
    softness); the first that is not is taken.

    >>> soft_targets(torch.tensor([[1.0], [2.0]]), [1.0], softness=1.0)
    tensor([[0.5000, 0.5000],
            [0.3333, 0.6667]])
    """
    too_coarse = torch.sigmoid((ratios / ratios.new_tensor(thresholds)).log() / softness)
    reached = torch.cat([torch.ones_like(ratios[:, :1]), too_coarse.cumprod(1)], 1)  # T K
    return torch.cat([reached[:, :-1] * (1 - too_coarse), reached[:, -1:]], 1)
