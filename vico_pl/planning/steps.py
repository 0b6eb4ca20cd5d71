"""The step of each stage over one micro-batch, on tensors without memory, told part by part to a meter."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vico_pl.losses.consistency import consistency_kl
from vico_pl.model.branches import branch_states
from vico_pl.model.reference import FrozenReference
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
    reference = _reference(models)
    with meter.part("reference pass"):
        target = reference.response_states(batch)
    with meter.part("loss"):
        chunk_size = config.consistency.chunk_size
        kl = consistency_kl(states, models.policy.head, target, reference.head, chunk_size=chunk_size)
        return kl.sum()


def router_step(config: RunConfig, models: RunModels, batch: Batch, meter: MemoryMeter) -> Tensor:
    """Make labels from the frozen models and train the router on them."""
    policy = models.policy
    assert policy.router is not None  # the recipe has been checked
    with torch.no_grad():
        with meter.part("patch features"):
            features = policy.encode_tiles(batch.tiles)
        with meter.part("labels"):
            _label(config, models, batch, features)
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


def _reference(models: RunModels) -> FrozenReference:
    assert models.reference is not None  # of the stages that compare
    return models.reference


def _label(config: RunConfig, models: RunModels, batch: Batch, features: Tensor) -> None:
    """Take the memory of `tile_loss_ratios`, which looks for equal neighbours among values not known here."""
    policy, reference = models.policy, _reference(models)
    target, ratio = reference.response_states(batch), policy.ratios[-1]
    if config.router.label_mode == "tile":
        found = branch_states(policy, batch, features, ratio=ratio)
        states, wanted = torch.cat([found.full, found.branches]), target[found.response_origin]
    else:
        ratios = policy.full_ratios(batch)
        both = [policy.response_states(batch, features, r) for r in (ratios, torch.full_like(ratios, ratio))]
        states, wanted = torch.cat(both), target
    consistency_kl(states, policy.head, torch.cat([target, wanted]), reference.head)
