"""Loss ratios, from which router targets are made: how compressing a tile changes the loss."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vico_pl.losses.consistency import consistency_kl
from vico_pl.losses.routing import loss_ratio
from vico_pl.model.branches import branch_states
from vico_pl.model.reference import FrozenReference
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.types import Batch


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
) -> Float[Tensor, " T"]:
    """Return, per tile, the factor by which compressing it raises its sample's loss.

    `mode` is `tile` (one tile at a time) or `image` (all at once); `epsilon`, in nats, is added to both
    losses. Vision encoder and reference run once per sample. The policy's language model runs once at full
    tokens and then, for each tile, over what follows it, in groups of tiles (see `branch_states`).
    """
    target, ratio = reference.response_states(batch), policy.ratios[-1]
    same = torch.arange(len(target), device=target.device)
    if mode == "image":
        full_ratios = policy.full_ratios(batch)
        both = [
            policy.response_states(batch, features, ratios)
            for ratios in (full_ratios, torch.full_like(full_ratios, ratio))
        ]
        kl = _divergence(policy, reference, torch.cat(both), target, origin=torch.cat([same, same]))
        full, compressed = (mean_per_sample(part, batch) for part in kl.chunk(2))
        return loss_ratio(compressed, full, epsilon=epsilon)[batch.tile_to_sample]
    found = branch_states(policy, batch, features, ratio=ratio, num_groups=num_groups)
    origin = torch.cat([same, found.response_origin])
    kl = _divergence(policy, reference, torch.cat([found.full, found.branches]), target, origin=origin)
    full = mean_per_sample(kl[: len(same)], batch)[batch.tile_to_sample]
    compressed = _mean_by(found.response_branch, kl[len(same) :], count=batch.num_tiles)
    return loss_ratio(compressed, full, epsilon=epsilon)


def _divergence(
    policy: VisionLanguageModel,
    reference: FrozenReference,
    states: Float[Tensor, "A D"],
    target: Float[Tensor, "R D2"],
    *,
    origin: Int64[Tensor, " A"],
) -> Float[Tensor, " A"]:
    """Compare states with row `origin` of the target; several may belong to one response token.

    Rows are sorted by token, so that the reference's logits are computed once for each.
    """
    order = origin.argsort(stable=True)
    kl = consistency_kl(states[order], policy.head, target, reference.head, reference_rows=origin[order])
    return torch.empty_like(kl).index_copy_(0, order, kl)


def mean_per_sample(per_token: Float[Tensor, " R"], batch: Batch) -> Float[Tensor, " B"]:
    """Average a value of response tokens over each sample; 0 for a sample without response."""
    samples = torch.arange(batch.num_samples, device=per_token.device)
    owner = samples.repeat_interleave(batch.sample_lengths)[batch.response_mask]
    return _mean_by(owner, per_token, count=batch.num_samples)


def _mean_by(owner: Int64[Tensor, " R"], values: Float[Tensor, " R"], *, count: int) -> Float[Tensor, " _"]:
    total = values.new_zeros(count).index_add_(0, owner, values)
    return total / torch.bincount(owner, minlength=count).clamp(min=1)
