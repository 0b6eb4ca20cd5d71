"""What router labels are made from: how much worse the answer gets when a tile is compressed."""

import torch
from jaxtyping import Float
from torch import Tensor

from vico_pl.losses.consistency import consistency_kl
from vico_pl.losses.routing import loss_ratio
from vico_pl.model.branches import branch_per_tile
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
) -> Float[Tensor, " T"]:
    """Return for every tile how much compressing it multiplies the loss of its sample.

    `mode` is `tile` (only the tile in question is compressed) or `image` (all at once); `epsilon` in nats is
    added to both losses. The vision encoder and the reference run once per sample.
    """
    target = reference.response_states(batch)
    full_ratios = policy.full_ratios(batch)
    compressed_ratio = policy.ratios[-1]

    def sample_loss(states: Tensor, of: Batch, wanted: Tensor) -> Tensor:
        kl = consistency_kl(states, policy.head, wanted, reference.head)
        return mean_per_sample(kl, of)

    states = policy.response_states(batch, features, full_ratios)
    full = sample_loss(states, batch, target)[batch.tile_to_sample]
    if len(full) == 0:  # a batch of text alone
        return full
    if mode == "image":
        states = policy.response_states(batch, features, torch.full_like(full_ratios, compressed_ratio))
        compressed = sample_loss(states, batch, target)[batch.tile_to_sample]
    else:
        branches = branch_per_tile(batch)
        ratios = full_ratios[branches.tile_origin].masked_fill(branches.is_own_tile, compressed_ratio)
        states = policy.response_states(branches.batch, features[branches.tile_origin], ratios)
        wanted = target[branches.response_origin]
        compressed = sample_loss(states, branches.batch, wanted)
    return loss_ratio(compressed, full, epsilon=epsilon)


def mean_per_sample(per_token: Float[Tensor, " R"], batch: Batch) -> Float[Tensor, " B"]:
    """Average a value of response tokens over each sample; 0 for a sample without response."""
    samples = torch.arange(batch.num_samples, device=per_token.device)
    owner = samples.repeat_interleave(batch.sample_lengths)[batch.response_mask]
    total = per_token.new_zeros(batch.num_samples).index_add_(0, owner, per_token)
    return total / torch.bincount(owner, minlength=batch.num_samples).clamp(min=1)
