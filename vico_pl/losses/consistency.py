"""The consistency loss: KL(reference || policy) per response token (InternVL3.5 report, equation 7)."""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint


def consistency_kl(
    policy_states: Float[Tensor, "R D"],
    policy_head: Float[Tensor, "V D"],
    reference_states: Float[Tensor, "R D2"],
    reference_head: Float[Tensor, "V D2"],
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    chunk_size: int = 256,
) -> Float[Tensor, " R"]:
    """Return the divergence of each response token in nats.

    Logits exist for `chunk_size` tokens at a time and are made again in the backward pass: no (R, V) tensor
    is ever held. They are produced in float32 whatever the type of the states: rounded to bfloat16 they make
    a KL of 1e-3 nats useless. `reverse` gives KL(policy || reference).
    """
    chunk_kl = partial(_chunk_kl, temperature=temperature, reverse=reverse)
    chunks = zip(policy_states.split(chunk_size), reference_states.split(chunk_size), strict=True)
    pieces = [
        checkpoint(chunk_kl, policy, policy_head, reference, reference_head, use_reentrant=False)
        for policy, reference in chunks
    ]
    return torch.cat(pieces)


def _chunk_kl(
    policy: Tensor,
    policy_head: Tensor,
    reference: Tensor,
    reference_head: Tensor,
    *,
    temperature: float,
    reverse: bool,
) -> Tensor:
    with torch.autocast(policy.device.type, enabled=False):
        log_q = log_softmax(_logits(policy, policy_head) / temperature, dim=-1)
        log_p = log_softmax(_logits(reference, reference_head) / temperature, dim=-1)
    if reverse:
        log_p, log_q = log_q, log_p
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _logits(states: Tensor, head: Tensor) -> Tensor:
    dtype = torch.promote_types(states.dtype, torch.float32)
    return states.to(dtype) @ head.to(dtype).T
