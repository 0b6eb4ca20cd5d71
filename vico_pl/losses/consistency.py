"""The consistency loss: KL(reference || policy) per response token (InternVL3.5 report, equation 7).

The two output layers are part of the loss, so that their logits, (R, V) and by far the largest tensors of a
training step, never exist whole. `_sweep` walks over the tokens, n at a time:

    logits of the policy     (n, V) = states (n, D) @ head.T     -> log q
    logits of the reference  (n, V) = states (n, D2) @ head.T    -> log p
    KL (n,) and its slope by the policy's logits (n, V): q - p
    gradient of the states   (n, D) = slope @ head
    gradient of the head     (V, D) += slope.T @ states
"""

from collections.abc import Sequence
from functools import reduce
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from packaging.version import Version
from torch import Tensor
from torch.autograd.function import once_differentiable

WIDENING = ("cuda", "meta")  # give products of bfloat16 in float32; `meta` stands for a device that does
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

    Logits exist for `chunk_size` tokens at a time, in float32 whatever the type of the states (float64
    stays): rounded to bfloat16 they make a KL of 1e-3 nats useless. Gradients reach the policy only.

    Row r of both sides belongs together, or with `reference_rows` row `reference_rows[r]` of the reference,
    whose logits are made once for all neighbours in a chunk that share it.

    Raises:
        ValueError: the two sides have different numbers of tokens or words.
    """
    num_partners = len(reference_states if reference_rows is None else reference_rows)
    sides = [(len(policy_states), len(policy_head)), (num_partners, len(reference_head))]
    if sides[0] != sides[1]:
        raise ValueError(f"policy and reference have {sides} tokens and words; expected the same of both")
    if not torch.is_grad_enabled():  # autograd.Function still sees `requires_grad` there
        policy_states, policy_head = policy_states.detach(), policy_head.detach()
    settings = _Settings(temperature, reverse, chunk_size, reference_rows)
    return _ConsistencyKL.apply(
        settings, policy_states, policy_head, reference_states.detach(), reference_head.detach()
    )


def liger_kl_sum(
    *sides: Float[Tensor, "_ _"], temperature: float = 1.0, reverse: bool = False
) -> Float[Tensor, ""]:
    """Return the sum of `consistency_kl`, of the same four tensors, to float32 rounding, by liger-kernel.

    Of the package's losses only this one makes float32 logits from bfloat16 operands. It chooses how many
    exist at a time. Its gradients are those of one backward pass: a graph used again gives wrong ones.
    """
    policy, policy_head, reference, reference_head = sides
    if len(policy) == 0:  # the kernel divides by it
        return consistency_kl(policy, policy_head, reference, reference_head).sum()
    fused = import_module("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD(
        # At 0 the Jensen-Shannon divergence is KL(reference || policy), at 1 the reverse.
        jsd_beta=float(reverse),
        temperature=temperature,
        accum_dtype=torch.float32,
    )
    ours = _operands(policy, policy_head, torch.float32)
    theirs = _operands(reference.detach(), reference_head.detach(), torch.float32)
    with torch.autocast(policy.device.type, enabled=False):
        mean: Tensor = fused(*ours, *theirs, None)
    return mean * len(policy)


def check_liger(device: torch.device) -> None:
    """Check that kernel `liger` can run on a device.

    Raises:
        ValueError: it cannot; the message says what to do.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    try:
        installed = version("liger-kernel")
    except PackageNotFoundError:
        installed = None
    if capability is None:
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


class _Settings(NamedTuple):
    temperature: float  # divides the logits of both sides
    reverse: bool
    chunk_size: int  # tokens whose logits exist at a time
    reference_rows: Tensor | None  # (R,): what each token is held against; none: the row of its own number


class _ConsistencyKL(torch.autograd.Function):
    """The divergence with gradients made in the forward pass: 4 matrix products, where recomputation takes 6.

    The states' gradient is kept per token, so any upstream gradient scales it exactly. The head's is a sum
    over tokens, which only a gradient that is the same for all tokens can scale, as that of `kl.sum()` times
    a number is; for any other, and when a retained graph is used again, it is recomputed from the inputs.
    """

    @staticmethod
    def forward(ctx: Any, settings: _Settings, *inputs: Tensor) -> Tensor:
        kl, to_states, ctx.head_gradient = _sweep(inputs, settings, needs=ctx.needs_input_grad[1:3])
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
                head = _sweep(inputs, ctx.settings, needs=(False, True), row_weights=by_logits)[2]
            elif len(upstream):
                head.mul_(by_logits[0])
            assert head is not None
            head = head.to(inputs[1].dtype)
        return None, states, head, None, None


def _is_uniform(values: Tensor) -> bool:
    """Say whether all values are the same. A sum's gradient is one number expanded: no look at the device."""
    return len(values) < 2 or values.stride(0) == 0 or bool((values == values[0]).all())


def _sweep(
    inputs: Sequence[Tensor], settings: _Settings, *, needs: Sequence[bool], row_weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Walk over the tokens in chunks; return the KL, and at temperature 1 the gradients that it `needs`.

    That of the states (R, D) holds in row r the gradient of token r alone; that of the head (V, D) is the sum
    over tokens, each multiplied by its row weight.
    """
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in inputs), torch.float32)
    policy, head = _operands(inputs[0], inputs[1], dtype)
    reference = _operands(inputs[2], inputs[3], dtype)
    kl = policy.new_empty(len(policy), dtype=dtype)
    to_states = torch.empty_like(policy, dtype=dtype) if needs[0] else None
    to_head = torch.zeros_like(head, dtype=dtype) if needs[1] else None
    # All the memory taken, except for the head's gradient.
    size = min(settings.chunk_size, len(policy)), len(head)
    buffers = [head.new_empty(size, dtype=dtype) for _ in range(3)]  # (n, V)
    divergence = _reverse_kl if settings.reverse else _forward_kl
    with torch.autocast(policy.device.type, enabled=False):
        for start in range(0, len(policy), settings.chunk_size):
            rows = slice(start, start + settings.chunk_size)
            log_p, log_q, scratch = chunk = [buffer[: len(kl[rows])] for buffer in buffers]
            _log_p(reference, rows, settings, chunk)
            _log_softmax(policy[rows], head, settings.temperature, scratch, out=log_q)
            kl[rows], slope = divergence(log_p, log_q, scratch, with_slope=any(needs))
            if to_states is not None:
                _multiply(slope.to(head.dtype), head, out=to_states[rows])
            if to_head is not None:
                slope = slope if row_weights is None else slope.mul_(row_weights[rows, None])
                _multiply(slope.to(policy.dtype).T, policy[rows], out=to_head, add=True)
    return kl, to_states, to_head


def _operands(states: Tensor, head: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return states and head as the matrix products take them.

    Products that widen round float32 to bfloat16 under autocast, like all other products. Elsewhere both are
    converted to `dtype` first, once for all chunks; so is float16, whose range is too small for slopes.
    """
    if dtype == torch.float32 and states.device.type in WIDENING:
        types = {states.dtype, head.dtype}
        if types == {torch.bfloat16} or autocast_type(states.device) == torch.bfloat16:
            return states.to(torch.bfloat16), head.to(torch.bfloat16)
    return states.to(dtype), head.to(dtype)


def autocast_type(device: torch.device) -> torch.dtype | None:
    """Return the type that autocast computes in; None: it is off."""
    available = torch.amp.is_autocast_available(device.type)
    is_on = available and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


def _log_p(reference: tuple[Tensor, Tensor], rows: slice, settings: _Settings, buffers: list[Tensor]) -> None:
    """Fill the first buffer, with what neighbours share of the reference made once; the others are free."""
    (states, head), (log_p, few, scratch) = reference, buffers
    if settings.reference_rows is None:
        _log_softmax(states[rows], head, settings.temperature, scratch, out=log_p)
        return
    distinct, shared = settings.reference_rows[rows].unique_consecutive(return_inverse=True)
    few, scratch = few[: len(distinct)], scratch[: len(distinct)]
    _log_softmax(states[distinct], head, settings.temperature, scratch, out=few)
    torch.index_select(few, 0, shared, out=log_p)


def _log_softmax(states: Tensor, head: Tensor, temperature: float, logits: Tensor, *, out: Tensor) -> None:
    _multiply(states, head.T, out=logits)
    if temperature != 1:
        logits.div_(temperature)
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


def _multiply(left: Tensor, right: Tensor, *, out: Tensor, add: bool = False) -> None:
    """Write left @ right to `out`, or add it in place, without rounding to the operands' type on the way."""
    widened: Any = {} if left.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, left, right, out=out, **widened)
    else:
        torch.mm(left, right, out=out, **widened)
