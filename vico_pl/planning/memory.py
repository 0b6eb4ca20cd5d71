"""How much memory a run takes on each GPU, term by term.

    weights, gradients, optimizer    counted from the parameters of the models
    a micro-batch's tensors                 counted while the step runs on tensors without memory (`meter`)
    what a strategy adds             see `per_gpu`

A micro-batch's tensors are freed before the optimizer steps, which needs temporaries of its own: the higher of the
two moments counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vico_pl.data.collate import collate
from vico_pl.model.blocks import checkpoint_blocks
from vico_pl.model.sharding import split_units
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.planning.meter import DeviceRules, MemoryMeter, autocast_on_meta
from vico_pl.planning.models import ModelSource, RunModels, build_models
from vico_pl.planning.steps import STEPS
from vico_pl.recipe import RunConfig
from vico_pl.types import Batch, EncodedSample

GIB = 2**30
Terms = dict[str, float]  # bytes by what takes them


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What goes through the model at a time: samples that are all alike."""

    num_samples: int
    tiles: int  # of a sample
    text_tokens: int  # of a sample, the response among them
    response_tokens: int  # of a sample


@dataclass(frozen=True, kw_only=True)
class RunMemory:
    """What takes memory in a run, before a strategy divides it among GPUs."""

    weights: Terms  # policy and reference
    shared: float  # bytes of the policy that serve the reference too, unless weights are split over GPUs
    gradients: float  # bytes
    optimizer: float  # bytes
    largest: float  # bytes of the largest trained weight
    micro_batch: Terms  # alive at the highest point of a micro-batch's step
    unit: float  # bytes of the largest unit of all (block, router), which FSDP gathers whole
    root: float  # bytes of what is in no unit: embeddings, head, connectors


def measure_memory(
    config: RunConfig, source: ModelSource, micro_batch: MicroBatch, *, checkpointing: bool
) -> RunMemory:
    """Find out what a run takes by running the step of one micro-batch without memory."""
    models = build_models(config, source)
    trained = models.trained()
    whole, policy = (num_bytes(p) for p in (models.parameters(), models.policy.parameters()))
    gradients = num_bytes(trained)
    units = [unit for network in _networks(models) for unit in split_units(network)]
    sizes = {id(unit): num_bytes(unit.parameters()) for unit in units}  # both models may share one
    return RunMemory(
        weights={
            "policy weights": policy,
            "reference weights": whole - policy,
        },
        shared=num_bytes(models.shared()),
        gradients=gradients,
        optimizer=2 * gradients,  # AdamW keeps two averages of each gradient, in the type of the weight
        largest=max(num_bytes([parameter]) for parameter in trained),
        micro_batch=micro_batch_terms(config, models, micro_batch, checkpointing=checkpointing),
        unit=max(sizes.values()),
        root=whole - sum(sizes.values()),
    )


def per_gpu(memory: RunMemory, *, sharded: bool, world: int, foreach: bool = True) -> Terms:
    """Return what each of `world` GPUs holds, under DDP or sharded by FSDP.

    DDP copies all gradients into buckets that it sends. FSDP keeps 1/world of weights, gradients and
    optimizer, but what computes is whole: the block at work and the next one, under way; the gradients of the
    block at work; and what is in no block, from a micro-batch's beginning to its end.
    """
    share = 1 / world if sharded else 1.0
    terms = {name: size * share for name, size in memory.weights.items()}
    if sharded and memory.shared:  # a part can be split for one model alone
        terms["reference weights"] += memory.shared * share
    terms |= {"gradients": memory.gradients * share, "optimizer": memory.optimizer * share}
    if sharded and world > 1:
        terms["gathered by FSDP"] = (2 * memory.unit + memory.root) * (1 - share) + memory.unit
    if not sharded and world > 1:
        terms["buckets of DDP"] = memory.gradients
    # On GPUs AdamW takes the roots of all second averages at once; on the CPU one weight's, and a quotient.
    temporaries = memory.gradients * share if foreach else 2 * memory.largest
    if temporaries > sum(memory.micro_batch.values()):
        return {**terms, "optimizer's temporaries": temporaries}
    return {**terms, **memory.micro_batch}


def num_bytes(tensors: Iterable[Tensor]) -> float:
    """Return the size of tensors."""
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def micro_batch_terms(
    config: RunConfig, models: RunModels, micro_batch: MicroBatch, *, checkpointing: bool
) -> Terms:
    """Run the step of a micro-batch without memory; returns what was alive at its highest point.

    Gradients exist before: those of the micro-batches before it in the same step.
    """
    trained = models.trained()
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    gradients = [p.grad for p in trained if p.grad is not None]
    batch = draw_batch(models.policy, micro_batch)
    meter = MemoryMeter([*models.parameters(), *gradients, *_buffers(models), batch.tiles])
    lowered = torch.bfloat16 if config.trainer.precision == "bf16-mixed" else None
    rules = DeviceRules(lowered, meter)
    if checkpointing:
        for part in (models.policy.vision, models.policy.language):
            rules.hold_within(part)
            checkpoint_blocks(part)
    with autocast_on_meta(lowered), meter, rules:
        loss = STEPS[config.stage](config, models, batch, meter)
        rules.forget_casts()
        with meter.part("backward pass"):
            loss.backward()
    return {name: float(size) for name, size in meter.at_peak.items() if size}


def draw_batch(model: VisionLanguageModel, micro_batch: MicroBatch) -> Batch:
    """Return a batch of samples that are all alike, its tiles without memory."""
    size = model.vision.tile_size
    text = torch.zeros(micro_batch.text_tokens, dtype=torch.int64) + (model.spec.placeholder_id == 0)
    question = micro_batch.text_tokens - micro_batch.response_tokens
    tiles = torch.full((micro_batch.tiles,), model.spec.placeholder_id)
    sample = EncodedSample(
        id="drawn",
        tiles=torch.empty(micro_batch.tiles, 3, size, size, dtype=torch.uint8, device="meta"),
        tiles_per_image=[micro_batch.tiles],
        input_ids=torch.cat([text[:1], tiles, text[1:]]),
        response_mask=torch.arange(micro_batch.tiles + micro_batch.text_tokens)
        >= micro_batch.tiles + question,
    )
    return collate([sample] * micro_batch.num_samples)


def _networks(models: RunModels) -> list[VisionLanguageModel]:
    return [models.policy] if models.reference is None else [models.policy, models.reference.model]


def _buffers(models: RunModels) -> list[Tensor]:
    return [buffer for network in _networks(models) for buffer in network.buffers()]
