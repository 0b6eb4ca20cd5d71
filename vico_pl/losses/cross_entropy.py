"""Cross-entropy of response tokens: the loss of stage 0, and for ablations a part of that of stage 1."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint


def response_cross_entropy(
    states: Float[Tensor, "R D"],
    head: Float[Tensor, "V D"],
    targets: Int64[Tensor, " R"],
    *,
    chunk_size: int = 256,
) -> tuple[Float[Tensor, " R"], Bool[Tensor, " R"]]:
    """Return the loss of each token in nats and whether its most probable word is the target.

    Logits, in float32 or float64, exist for `chunk_size` tokens at a time and are made again going backward.
    """
    results = [
        checkpoint(_chunk, *chunk, head, use_reentrant=False, preserve_rng_state=False)
        # Without tokens there is one empty chunk, so that every parameter takes part on every rank.
        for chunk in zip(states.split(chunk_size), targets.split(chunk_size), strict=True)
    ]
    losses, hits = zip(*results, strict=True)
    return torch.cat(losses), torch.cat(hits)


def _chunk(states: Tensor, targets: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(states.dtype, head.dtype), torch.float32)
    with torch.autocast(states.device.type, enabled=False):
        logits = states.to(dtype) @ head.to(dtype).T
        return cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1) == targets
