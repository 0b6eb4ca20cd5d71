"""Cross-entropy over response tokens, in chunks: the (R, V) logits never exist as a whole."""

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
    """Return the loss of each token in nats, and whether its most likely token is the target."""
    parts = [
        checkpoint(_chunk, rows, head, wanted, use_reentrant=False)
        for rows, wanted in zip(states.split(chunk_size), targets.split(chunk_size), strict=True)
    ]
    losses, hits = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(hits)


def _chunk(states: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = states.float() @ head.float().T
    return cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets
