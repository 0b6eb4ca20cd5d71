"""The consistency loss: KL(reference || policy) per response token (InternVL3.5 report, equation 7).

The two output layers are part of the loss, so that their logits, (R, V) and by far the largest tensors of a
training step, never exist whole. `_sweep` walks over the tokens, n at a time:

    logits of the policy     (n, V) = states (n, D) @ head.T     -> log q
    logits of the reference  (n, V) = states (n, D2) @ head.T    -> log p
    KL (n,) and its slope by the policy's logits (n, V): q - p
    gradient of the states   (n, D) = slope @ head
    gradient of the head     (V, D) += slope.T @ states

With V large everything but the four matrix products is small; `make bench` measures how small.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable


def consistency_kl(
    policy_states: Float[Tensor, "R D"],
    policy_head: Float[Tensor, "V D"],
    reference_states: Float[Tensor, "Q D2"],
    reference_head: Float[Tensor, "V D2"],
    *,
    reference_rows: Int64[Tensor, " R"] | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
    chunk_size: int = 256,
) -> Float[Tensor, " R"]:
    """Return the divergence of each response token in nats; `reverse` gives KL(policy || reference).

    Logits exist for `chunk_size` tokens at a time: no (R, V) tensor is ever held. They are produced in
    float32 whatever the type of the states (float64 stays): rounded to bfloat16 they make a KL of 1e-3 nats
    useless. Gradients reach the policy only and are computed with the values; the backward pass scales them.

    Row r of both sides belongs together, or with `reference_rows` row `reference_rows[r]` of the reference,
    whose logits are made once for all neighbours in a chunk that share it.

    Raises:
        ValueError: If the two sides have different numbers of tokens or words, or `chunk_size` is below 1.
    """
    partners = reference_states if reference_rows is None else reference_rows
    _check(policy_states, policy_head, partners, reference_head, chunk_size=chunk_size)
    if not torch.is_grad_enabled():  # autograd.Function still sees `requires_grad` there
        policy_states, policy_head = policy_states.detach(), policy_head.detach()
    settings = _Settings(
        temperature=temperature, reverse=reverse, chunk_size=chunk_size, reference_rows=reference_rows
    )
    return _ConsistencyKL.apply(
        policy_states, policy_head, reference_states.detach(), reference_head.detach(), settings
    )


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """How the divergence is computed."""

    temperature: float  # divides the logits of both sides
    reverse: bool
    chunk_size: int  # tokens whose logits exist at a time
    reference_rows: Tensor | None  # (R,): what each token is held against; none: the row of its own number


@dataclass(frozen=True, kw_only=True)
class _Swept:
    """What one walk over the tokens leaves; gradients are those at temperature 1, None where not wanted."""

    kl: Tensor  # (R,)
    states_gradient: Tensor | None  # (R, D): row r is the gradient of token r alone
    head_gradient: Tensor | None  # (V, D): summed over tokens


def _check(
    policy: Tensor, policy_head: Tensor, reference: Tensor, reference_head: Tensor, *, chunk_size: int
) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected 1 or more tokens")
    sides = [(len(policy), len(policy_head)), (len(reference), len(reference_head))]
    if sides[0] != sides[1]:
        raise ValueError(f"policy and reference have {sides} tokens and words; expected the same of both")


class _ConsistencyKL(torch.autograd.Function):
    """The divergence with gradients made in the forward pass: 4 matrix products, where recomputation takes 6.

    What the backward pass will multiply them with is not known yet. The states' gradient is kept per token,
    so any upstream gradient scales it exactly. The head's is a sum over tokens, which only a gradient that is
    the same for all tokens can scale, as that of `kl.sum()` times a number is; for any other, and when a
    retained graph is used again, the backward pass recomputes it from the inputs. Correct in every case, and
    without extra cost in the one that training uses.
    """

    @staticmethod
    def forward(
        ctx: Any,
        policy: Tensor,
        policy_head: Tensor,
        reference: Tensor,
        reference_head: Tensor,
        settings: _Settings,
    ) -> Tensor:
        inputs = (policy, policy_head, reference, reference_head)
        states, head = ctx.needs_input_grad[:2]
        swept = _sweep(inputs, settings, with_states=states, with_head=head)
        ctx.save_for_backward(*inputs, swept.states_gradient)
        ctx.head_gradient, ctx.settings = swept.head_gradient, settings
        return swept.kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        *inputs, states_gradient = ctx.saved_tensors
        states = head = None
        if ctx.needs_input_grad[0]:
            states = (states_gradient * _by_logits(ctx, upstream)[:, None]).to(inputs[0].dtype)
        if ctx.needs_input_grad[1]:
            head = _head_gradient(ctx, inputs, upstream).to(inputs[1].dtype)
        return states, head, None, None, None


def _head_gradient(ctx: Any, inputs: list[Tensor], upstream: Tensor) -> Tensor:
    """Scale the gradient made in forward, in place and therefore once; or recompute it."""
    made, ctx.head_gradient = ctx.head_gradient, None
    if made is not None and _is_uniform(upstream):
        return made.mul_(_by_logits(ctx, upstream[0])) if len(upstream) else made
    weights = _by_logits(ctx, upstream)
    made = _sweep(inputs, ctx.settings, with_head=True, row_weights=weights).head_gradient
    assert made is not None
    return made


def _by_logits(ctx: Any, upstream: Tensor) -> Tensor:
    """Pass a gradient on through the division of logits by the temperature."""
    return upstream / ctx.settings.temperature


def _is_uniform(values: Tensor) -> bool:
    """Say whether all values are the same. A sum's gradient is one number expanded: no look at the device."""
    return len(values) < 2 or values.stride(0) == 0 or bool((values == values[0]).all())


def _sweep(
    inputs: Sequence[Tensor],
    settings: _Settings,
    *,
    with_states: bool = False,
    with_head: bool = False,
    row_weights: Float[Tensor, " R"] | None = None,
) -> _Swept:
    """Walk over the tokens in chunks; `row_weights` multiply each token's part in the head's gradient."""
    dtype = _accumulating_type(inputs)
    policy, head = operands(inputs[0], inputs[1], dtype)
    reference = operands(inputs[2], inputs[3], dtype)
    kl = policy.new_empty(len(policy), dtype=dtype)
    to_states = torch.empty_like(policy, dtype=dtype) if with_states else None
    to_head = torch.zeros_like(head, dtype=dtype) if with_head else None
    buffers = _buffers(min(settings.chunk_size, len(policy)), head, dtype)
    with torch.autocast(policy.device.type, enabled=False):
        for start in range(0, len(policy), settings.chunk_size):
            rows = slice(start, start + settings.chunk_size)
            partners, shared = _partners(reference[0], rows, settings.reference_rows)
            chunk = policy[rows], head, partners, reference[1]
            kl[rows], slope = _divergence(
                chunk, settings, buffers, shared=shared, with_slope=with_states or with_head
            )
            if to_states is not None:
                _multiply(slope.to(head.dtype), head, out=to_states[rows])
            if to_head is not None:
                slope = slope if row_weights is None else slope.mul_(row_weights[rows, None])
                _add_product(slope.to(policy.dtype).T, policy[rows], to=to_head)
    return _Swept(kl=kl, states_gradient=to_states, head_gradient=to_head)


def _partners(reference: Tensor, rows: slice, reference_rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the reference's rows for a chunk and, where tokens share them, which one is each token's."""
    if reference_rows is None:
        return reference[rows], None
    distinct, shared = reference_rows[rows].unique_consecutive(return_inverse=True)
    return reference[distinct], shared


def _accumulating_type(inputs: Sequence[Tensor]) -> torch.dtype:
    """Return the type of logits and sums: float32, or float64 where an input has it."""
    dtype = torch.float32
    for tensor in inputs:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def operands(states: Tensor, head: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return states and head as the matrix products take them.

    CUDA multiplies bfloat16 into float32: under autocast, what is kept in float32 is rounded as it is for all
    other products. Elsewhere such a product is rounded to bfloat16, so both are converted to `dtype` first,
    once for all chunks. So is float16, whose range is too small for slopes below 6e-8.
    """
    if dtype == torch.float32 and widens_products(states.device):
        types = {states.dtype, head.dtype}
        if types == {torch.bfloat16} or autocast_type(states.device) == torch.bfloat16:
            return states.to(torch.bfloat16), head.to(torch.bfloat16)
    return states.to(dtype), head.to(dtype)


def widens_products(device: torch.device) -> bool:
    """Say whether a device gives products of bfloat16 in float32; `meta` stands for one that does."""
    return device.type in ("cuda", "meta")


def autocast_type(device: torch.device) -> torch.dtype | None:
    """Return the type that autocast computes in; None: it is off."""
    available = torch.amp.is_autocast_available(device.type)
    is_on = available and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


def _buffers(num_rows: int, head: Tensor, dtype: torch.dtype) -> list[Float[Tensor, "n V"]]:
    """Return the three work tensors of a chunk: all the memory taken, except for the head's gradient."""
    return [head.new_empty(num_rows, len(head), dtype=dtype) for _ in range(3)]


def _divergence(
    chunk: tuple[Tensor, Tensor, Tensor, Tensor],
    settings: _Settings,
    buffers: list[Float[Tensor, "m V"]],
    *,
    shared: Int64[Tensor, " n"] | None,
    with_slope: bool,
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n V"]]:
    """Return the divergence of each token of a chunk and, in one of the buffers, its slope by the logits."""
    policy, head, reference, reference_head = chunk
    log_p, log_q, scratch = (buffer[: len(policy)] for buffer in buffers)
    if shared is None:
        _log_probabilities(reference, reference_head, settings, scratch, out=log_p)
    else:
        few = slice(len(reference))  # log_q is still free
        _log_probabilities(reference, reference_head, settings, scratch[few], out=log_q[few])
        torch.index_select(log_q[few], 0, shared, out=log_p)
    _log_probabilities(policy, head, settings, scratch, out=log_q)
    divergence = _reverse_kl if settings.reverse else _forward_kl
    return divergence(log_p, log_q, scratch, with_slope=with_slope)


def _log_probabilities(
    states: Tensor, head: Tensor, settings: _Settings, logits: Tensor, *, out: Tensor
) -> None:
    _multiply(states, head.T, out=logits)
    if settings.temperature != 1:
        logits.div_(settings.temperature)
    torch.log_softmax(logits, -1, out=out)


def _forward_kl(log_p: Tensor, log_q: Tensor, scratch: Tensor, *, with_slope: bool) -> tuple[Tensor, Tensor]:
    """Return sum p (log p - log q) and its derivative by the policy's logits, q - p; the buffers are used up.

    Not H(p, q) - H(p): the difference of two large sums loses a small divergence.
    """
    p = torch.exp(log_p, out=scratch)
    difference = log_p.sub_(log_q)
    slope = log_q.exp_().sub_(p) if with_slope else log_q
    return p.mul_(difference).sum(-1), slope


def _reverse_kl(log_p: Tensor, log_q: Tensor, scratch: Tensor, *, with_slope: bool) -> tuple[Tensor, Tensor]:
    """Return KL = sum q (log q - log p) and its derivative, q (log q - log p - KL), in the same way."""
    q = torch.exp(log_q, out=scratch)
    difference = log_q.sub_(log_p)
    kl = torch.mul(q, difference, out=log_p).sum(-1)
    slope = difference.sub_(kl[:, None]).mul_(q) if with_slope else difference
    return kl, slope


def _multiply(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """Write left @ right to `out`, without rounding to the operands' type on the way."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def _add_product(left: Tensor, right: Tensor, *, to: Tensor) -> None:
    """Add left @ right in place: no second tensor of that size."""
    if left.dtype == to.dtype:
        to.addmm_(left, right)
    else:
        torch.addmm(to, left, right, out_dtype=to.dtype, out=to)
