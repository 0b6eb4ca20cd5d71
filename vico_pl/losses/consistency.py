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
from functools import reduce
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from jaxtyping import Float, Int64
from packaging.version import Version
from torch import Tensor
from torch.autograd.function import once_differentiable

OLDEST_LIGER = "0.8.5"  # versions before it round logits, and hold a loss for each token and word


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
        settings, policy_states, policy_head, reference_states.detach(), reference_head.detach()
    )


def liger_kl_sum(
    policy_states: Float[Tensor, "R D"],
    policy_head: Float[Tensor, "V D"],
    reference_states: Float[Tensor, "R D2"],
    reference_head: Float[Tensor, "V D2"],
    *,
    temperature: float = 1.0,
    reverse: bool = False,
) -> Float[Tensor, ""]:
    """Return the sum of `consistency_kl` over the response tokens, to float32 rounding, by liger-kernel.

    How many tokens' logits exist at a time is the kernel's choice. Its gradients are those of one backward
    pass: a graph that is kept and used again gives wrong ones. Of the package's losses only this one makes
    float32 logits from bfloat16 operands. At beta 0 the Jensen-Shannon divergence is KL(reference || policy),
    at beta 1 the reverse.
    """
    num_tokens = len(policy_states)
    if num_tokens == 0:  # the kernel divides by it
        return consistency_kl(policy_states, policy_head, reference_states, reference_head).sum()
    fused = import_module("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD(
        jsd_beta=float(reverse), temperature=temperature, accum_dtype=torch.float32
    )
    policy = _operands(policy_states, policy_head, torch.float32)
    reference = _operands(reference_states.detach(), reference_head.detach(), torch.float32)
    with torch.autocast(policy_states.device.type, enabled=False):
        mean: Tensor = fused(*policy, *reference, None)
    return mean * num_tokens


def check_liger(device: torch.device) -> None:
    """Check that kernel `liger` can run on a device.

    Raises:
        ValueError: it cannot; the message says what to do.
    """
    on_gpu = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if on_gpu else (0, 0)
    try:
        installed = version("liger-kernel")
    except PackageNotFoundError:
        installed = None
    if not on_gpu:
        problem = f"which runs on CUDA devices, but this run is on {device.type};"
    elif capability < (8, 0):
        found = ".".join(map(str, capability))
        problem = f"which rounds logits on GPUs of compute capability {found}; use one of 8.0 or more, or"
    elif installed is None or Version(installed) < Version(OLDEST_LIGER):
        wanted = f"liger-kernel>={OLDEST_LIGER}"
        problem = f"which needs {wanted}, but {installed or 'none'} is installed; pip install '{wanted}', or"
    else:
        return
    raise ValueError(f"consistency.kernel is 'liger', {problem} set consistency.kernel=native")


@dataclass(frozen=True, kw_only=True)
class _Settings:
    temperature: float  # divides the logits of both sides
    reverse: bool
    chunk_size: int  # tokens whose logits exist at a time
    reference_rows: Tensor | None  # (R,): what each token is held against; none: the row of its own number


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
    def forward(ctx: Any, settings: _Settings, *inputs: Tensor) -> Tensor:
        states, head = ctx.needs_input_grad[1:3]
        kl, to_states, ctx.head_gradient = _sweep(inputs, settings, with_states=states, with_head=head)
        ctx.save_for_backward(*inputs, to_states)
        ctx.settings = settings
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor | None, Tensor | None, None, None]:
        *inputs, to_states = ctx.saved_tensors
        by_logits = upstream / ctx.settings.temperature  # on through the division of the logits
        states, head = None, None
        if ctx.needs_input_grad[1]:
            states = (to_states * by_logits[:, None]).to(inputs[0].dtype)
        if ctx.needs_input_grad[2]:
            head, ctx.head_gradient = ctx.head_gradient, None  # scaled in place, and therefore once
            if head is None or not _is_uniform(upstream):
                head = _sweep(inputs, ctx.settings, with_head=True, row_weights=by_logits)[2]
            elif len(upstream):
                head.mul_(by_logits[0])
            assert head is not None
            head = head.to(inputs[1].dtype)
        return None, states, head, None, None


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
) -> tuple[Float[Tensor, " R"], Float[Tensor, "R D"] | None, Float[Tensor, "V D"] | None]:
    """Walk over the tokens in chunks; return the KL, and at temperature 1 the gradients that are wanted.

    Row r of the states' gradient is that of token r alone; the head's is summed over tokens, each multiplied
    by its row weight.
    """
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in inputs), torch.float32)
    policy, head = _operands(inputs[0], inputs[1], dtype)
    reference = _operands(inputs[2], inputs[3], dtype)
    kl = policy.new_empty(len(policy), dtype=dtype)
    to_states = torch.empty_like(policy, dtype=dtype) if with_states else None
    to_head = torch.zeros_like(head, dtype=dtype) if with_head else None
    # All the memory taken, except for the head's gradient.
    size = min(settings.chunk_size, len(policy)), len(head)
    buffers = [head.new_empty(size, dtype=dtype) for _ in range(3)]  # (n, V)
    divergence = _reverse_kl if settings.reverse else _forward_kl
    with torch.autocast(policy.device.type, enabled=False):
        for start in range(0, len(policy), settings.chunk_size):
            rows = slice(start, start + settings.chunk_size)
            log_p, log_q, scratch = (buffer[: len(kl[rows])] for buffer in buffers)
            _reference_log_p(reference, rows, settings, spare=(log_q, scratch), out=log_p)
            _log_probabilities(policy[rows], head, settings, scratch, out=log_q)
            kl[rows], slope = divergence(log_p, log_q, scratch, with_slope=with_states or with_head)
            if to_states is not None:
                _multiply(slope.to(head.dtype), head, out=to_states[rows])
            if to_head is not None:
                slope = slope if row_weights is None else slope.mul_(row_weights[rows, None])
                _add_product(slope.to(policy.dtype).T, policy[rows], to=to_head)
    return kl, to_states, to_head


def _operands(states: Tensor, head: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
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


def _reference_log_p(
    reference: tuple[Tensor, Tensor],
    rows: slice,
    settings: _Settings,
    *,
    spare: tuple[Tensor, Tensor],
    out: Tensor,
) -> None:
    """Write log p of a chunk, made once for all neighbours that share a row of the reference."""
    states, head = reference
    if settings.reference_rows is None:
        _log_probabilities(states[rows], head, settings, spare[1], out=out)
        return
    distinct, shared = settings.reference_rows[rows].unique_consecutive(return_inverse=True)
    few, scratch = (buffer[: len(distinct)] for buffer in spare)
    _log_probabilities(states[distinct], head, settings, scratch, out=few)
    torch.index_select(few, 0, shared, out=out)


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
