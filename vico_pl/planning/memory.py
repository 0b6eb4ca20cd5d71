"""The memory that a run takes on each GPU, term by term.

Weights, gradients and optimizer state are counted from parameters, the tensors of a micro-batch while the
stage's own step runs on `meta`. Those tensors are freed before the optimizer steps, which needs temporaries:
the larger of the two counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vico_pl.config import RunConfig
from vico_pl.data.collate import collate
from vico_pl.model.blocks import split_units
from vico_pl.model.flops import build_without_weights
from vico_pl.model.vlm import ModelSpec, VisionLanguageModel
from vico_pl.planning.meter import METERED_ATTENTION, DeviceRules, MemoryMeter, autocast_on_meta
from vico_pl.planning.sources import MicroBatch, ModelShape
from vico_pl.stages import build_stage
from vico_pl.stages.base import Stage
from vico_pl.stages.figures import Ranks
from vico_pl.stages.settings import DTYPES, ModelConfig
from vico_pl.types import Batch, EncodedSample

GIB = 2**30
Terms = dict[str, float]  # bytes by what takes them


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The number of GPUs of a run, and whether FSDP shards the models."""

    world: int = 1
    sharded: bool = False  # FSDP; otherwise DDP, or one GPU

    def __str__(self) -> str:
        if self.world == 1:
            return "1 GPU"
        return f"FSDP x{self.world}" if self.sharded else "DDP"


@dataclass(frozen=True, kw_only=True)
class RunMemory:
    """The memory of a run in bytes, before a strategy divides it among GPUs."""

    weights: Terms  # policy and reference
    shared: float  # weights of the policy that the reference uses too, unless they are sharded
    gradients: float
    optimizer: float
    largest: float  # the largest trained weight
    micro_batch: Terms  # alive at the peak of a micro-batch's step
    unit: float  # the largest unit (block, router) that FSDP gathers
    root: float  # what is in no unit: embeddings, head, connectors

    def per_gpu(self, layout: Layout, *, foreach: bool = True) -> Terms:
        """Return what each GPU holds.

        DDP copies all gradients into buckets that it sends. FSDP keeps 1/world of weights, gradients and
        optimizer state, but gathers what computes: the running block and the next one; the gradients of the
        running block; and what is in no block, for the whole micro-batch.
        """
        fraction = 1 / layout.world if layout.sharded else 1.0
        terms = {name: size * fraction for name, size in self.weights.items()}
        if layout.sharded and self.shared:  # a part can be sharded for one model only
            terms["reference weights"] += self.shared * fraction
        terms |= {"gradients": self.gradients * fraction, "optimizer": self.optimizer * fraction}
        if layout.world > 1 and layout.sharded:
            terms["gathered by FSDP"] = (2 * self.unit + self.root) * (1 - fraction) + self.unit
        elif layout.world > 1:
            terms["buckets of DDP"] = self.gradients
        # On GPUs AdamW takes the roots of all second averages at once; on the CPU one's, and a quotient.
        temporaries = self.gradients * fraction if foreach else 2 * self.largest
        if temporaries > sum(self.micro_batch.values()):
            return {**terms, "optimizer's temporaries": temporaries}
        return {**terms, **self.micro_batch}

    def gib(self, layout: Layout) -> float:
        """Return the sum of what each GPU holds, in GiB."""
        return sum(self.per_gpu(layout).values()) / GIB


@dataclass(frozen=True, kw_only=True)
class _ModelsOnMeta:
    """Gives a stage its models as `FolderModels` does, but on `meta`."""

    config: ModelConfig
    shape: ModelShape

    @property
    def same_weights(self) -> bool:
        return self.config.reference in (None, self.config.path)

    def policy(self) -> VisionLanguageModel:
        spec, ratios = self.shape.spec, self.config.ratios
        if not set(spec.ratios) <= set(ratios):
            raise ValueError(f"model.ratios is {ratios}, but the model has {spec.ratios}")
        heads = spec.router_heads or self.config.router_heads
        model = self._build(replace(spec, ratios=ratios, router_heads=heads))
        model.set_dropout(self.config.dropout)
        return model

    def reference(self) -> VisionLanguageModel:
        return self._build(self.shape.spec)

    def _build(self, spec: ModelSpec) -> VisionLanguageModel:
        model = build_without_weights(spec).to(DTYPES[self.config.frozen_dtype] or self.shape.dtype).eval()
        if model.router is not None:
            model.router.float()  # as a randomly initialised one
        return model


def stage_on_meta(config: RunConfig, shape: ModelShape) -> Stage:
    """Build the stage of a recipe as the trainer does, without weights and with all tiles at full tokens.

    PyTorch's kernels replace those that need a GPU, and models are not sharded: `RunMemory` does that.

    Raises:
        ValueError: the model lacks what the stage needs.
    """
    consistency = replace(config.consistency, ratio_draw="full", kernel="native")
    trainer = replace(config.trainer, compile=False, strategy="auto")
    run = replace(config, consistency=consistency, trainer=trainer)
    with torch.device("meta"), autocast_on_meta():  # adapters of experts run while they are built
        stage = build_stage(run, _ModelsOnMeta(config=config.model, shape=shape))
    for model in stage.sharded_models():
        model.language.packed_attention = METERED_ATTENTION  # type: ignore[assignment]  # nn.Module: or a tensor
    return ready(stage)


def ready(stage: Stage) -> Stage:
    """Put a stage into the state that Lightning gives it before the first step."""
    stage.ranks = Ranks(1)
    return stage.train()


def measure_memory(config: RunConfig, shape: ModelShape, micro_batch: MicroBatch) -> RunMemory:
    """Measure the memory of a run by running the step of one micro-batch on `meta`."""
    stage = stage_on_meta(config, shape)
    policy, networks, trained = stage.trained_model(), stage.sharded_models(), trained_parameters(stage)
    whole = num_bytes({id(p): p for network in networks for p in network.parameters()}.values())
    of_policy, gradients = num_bytes(policy.parameters()), num_bytes(trained)
    units = [unit for network in networks for unit in split_units(network)]
    sizes = {id(unit): num_bytes(unit.parameters()) for unit in units}  # models may share a unit
    return RunMemory(
        weights={"policy weights": of_policy, "reference weights": whole - of_policy},
        shared=num_bytes(shared_parameters(stage)),
        gradients=gradients,
        optimizer=2 * gradients,  # AdamW keeps two averages of each gradient, in the dtype of the weight
        largest=max(num_bytes([parameter]) for parameter in trained),
        micro_batch=step_terms(stage, micro_batch, precision=config.trainer.precision),
        unit=max(sizes.values()),
        root=whole - sum(sizes.values()),
    )


def step_terms(stage: Stage, micro_batch: MicroBatch, *, precision: str) -> Terms:
    """Run the step of a micro-batch on `meta`; returns the bytes alive at its peak.

    Gradients exist already: those of earlier micro-batches of the same step.
    """
    policy, networks = stage.trained_model(), stage.sharded_models()
    gradients = [torch.empty_like(parameter) for parameter in trained_parameters(stage)]
    for parameter, gradient in zip(trained_parameters(stage), gradients, strict=True):
        parameter.grad = gradient
    batch = draw_batch(policy, micro_batch)
    weights = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    meter = MemoryMeter([*weights, *stage.buffers(), *gradients, batch.tiles])
    _name_parts(stage, meter)
    lowered = torch.bfloat16 if precision == "bf16-mixed" else None
    rules = DeviceRules(lowered, meter)
    rules.hold_in_recomputed(policy.vision)
    rules.hold_in_recomputed(policy.language)
    with autocast_on_meta(lowered), meter, rules:
        loss = stage.step(batch).loss_sum
        with meter.part("backward pass"):
            loss.backward()
    return {name: float(size) for name, size in meter.at_peak.items() if size}


def _name_parts(stage: Stage, meter: MemoryMeter) -> None:
    """Name what the policy and the reference run; all else belongs to the loss."""
    policy, *others = stage.sharded_models()
    meter.watch(policy, "encode_tiles", part="vision activations")
    meter.watch(policy, "response_states", "splice_batch", part="language activations")
    meter.watch(policy.connectors, "forward", part="language activations")
    meter.watch(policy.language.base_model, "forward", part="language activations")
    for model in others:
        meter.watch(model, "encode_tiles", "response_states", part="reference pass")
    if policy.router is not None:
        meter.watch(policy.router, "forward", part="router")


def trained_parameters(stage: Stage) -> list[Tensor]:
    """Return the parameters that get gradients."""
    return [parameter for parameter in stage.trained_model().parameters() if parameter.requires_grad]


def shared_parameters(stage: Stage) -> list[Tensor]:
    """Return the frozen parameters that the policy and another model share."""
    policy, *others = stage.sharded_models()
    frozen = {id(parameter) for parameter in policy.parameters() if not parameter.requires_grad}
    return [p for model in others for p in model.parameters() if id(p) in frozen]


def num_bytes(tensors: Iterable[Tensor]) -> float:
    """Return the size of tensors."""
    return float(sum(tensor.nbytes for tensor in tensors))


def draw_batch(model: VisionLanguageModel, micro_batch: MicroBatch) -> Batch:
    """Return a batch of identical samples with tiles on `meta`."""
    size = model.vision.tile_size
    text = torch.zeros(micro_batch.text_tokens, dtype=torch.int64) + (model.spec.placeholder_id == 0)
    tiles = torch.full((micro_batch.tiles,), model.spec.placeholder_id)
    length = micro_batch.tiles + micro_batch.text_tokens
    sample = EncodedSample(
        id="drawn",
        tiles=torch.empty(micro_batch.tiles, 3, size, size, dtype=torch.uint8, device="meta"),
        tiles_per_image=[micro_batch.tiles],
        input_ids=torch.cat([text[:1], tiles, text[1:]]),
        response_mask=torch.arange(length) >= length - micro_batch.response_tokens,
    )
    return collate([sample] * micro_batch.num_samples)
