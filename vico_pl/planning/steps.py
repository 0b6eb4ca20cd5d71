"""The step of each stage over one pack, on tensors without memory, told part by part to a meter."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vico_pl.model.branches import branch_states
from vico_pl.planning.meter import MemoryMeter
from vico_pl.planning.models import RunModels
from vico_pl.recipe import RunConfig
from vico_pl.types import Batch

Step = Callable[[RunConfig, RunModels, Batch, MemoryMeter], Tensor]


def pretrain_step(config: RunConfig, models: RunModels, batch: Batch, meter: MemoryMeter) -> Tensor:
    """Cross-entropy at full tokens, with all logits at once."""
    states = _policy_states(models, batch, meter)
    with meter.part("loss"):
        logits = states.float() @ models.policy.head.float().T
        return cross_entropy(logits, batch.input_ids[batch.response_mask], reduction="sum")


def consistency_step(config: RunConfig, models: RunModels, batch: Batch, meter: MemoryMeter) -> Tensor:
    """Compare policy and reference; every tile at full tokens, as a draw of ratios may have it."""
    states = _policy_states(models, batch, meter)
    target = _target(models, batch, meter)
    with meter.part("loss"):
        return _divergence(states, target, models, chunk_size=config.consistency.chunk_size).sum()


def router_step(config: RunConfig, models: RunModels, batch: Batch, meter: MemoryMeter) -> Tensor:
    """Make labels from the frozen models and train the router on them."""
    policy, ratio = models.policy, models.policy.ratios[-1]
    assert policy.router is not None  # the recipe has been checked
    with torch.no_grad():
        with meter.part("patch features"):
            features = policy.encode_tiles(batch.tiles)
        target = _target(models, batch, meter)
        if config.router.label_mode == "tile":
            with meter.part("labels"):
                made = branch_states(policy, batch, features, ratio=ratio)
            pairs = [(made.full, target), (made.branches, target[made.response_origin])]
        else:
            with meter.part("labels"):
                states = policy.response_states(batch, features, policy.full_ratios(batch))
            pairs = [(states, target)]  # compressed tokens are fewer
        with meter.part("loss"):
            for states, wanted in pairs:
                _divergence(states, wanted, models, chunk_size=256)
    with meter.part("router"):
        return policy.router(features).sum()


STEPS: dict[str, Step] = {
    "pretrain": pretrain_step,
    "consistency": consistency_step,
    "router": router_step,
}


def _policy_states(models: RunModels, batch: Batch, meter: MemoryMeter) -> Tensor:
    with meter.part("vision activations"):
        features = models.policy.encode_tiles(batch.tiles)
    with meter.part("language activations"):
        return models.policy.response_states(batch, features, models.policy.full_ratios(batch))


def _target(models: RunModels, batch: Batch, meter: MemoryMeter) -> Tensor:
    assert models.reference is not None  # of the stages that compare
    with meter.part("reference pass"):
        return models.reference.response_states(batch)


def _divergence(states: Tensor, target: Tensor, models: RunModels, *, chunk_size: int) -> Tensor:
    assert models.reference is not None
    heads = models.policy.head, models.reference.head
    return _DivergenceMemory.apply(states, heads[0], target, heads[1], chunk_size)


class _DivergenceMemory(torch.autograd.Function):
    """Takes the memory of `consistency_kl`, which turns autocast off and therefore cannot run on `meta`."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: Tensor, target: Tensor, other_head: Tensor, chunk_size: int
    ) -> Tensor:
        exact_product = states.dtype == head.dtype == torch.bfloat16  # into float32, on CUDA
        pairs = ((states, head), (target, other_head))
        operands = [t if exact_product else t.float() for pair in pairs for t in pair]
        chunk = min(chunk_size, len(states))
        buffers = [states.new_empty(chunk, len(head), dtype=torch.float32) for _ in range(3)]
        wanted = zip(ctx.needs_input_grad[:2], (states, head), strict=True)
        ctx.gradients = [torch.empty_like(t, dtype=torch.float32) if needed else None for needed, t in wanted]
        ctx.types = states.dtype, head.dtype
        del operands, buffers
        return states.new_empty(len(states), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        to_states, to_head = ctx.gradients
        ctx.gradients = [None, None]
        if to_states is not None:
            to_states = (to_states * upstream[:, None]).to(ctx.types[0])
        return to_states, None if to_head is None else to_head.to(ctx.types[1]), None, None, None
