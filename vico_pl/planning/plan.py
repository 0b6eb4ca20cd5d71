"""The plan of a recipe: what it will take, from configurations alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from vico_pl.model.adapters import own_parameters
from vico_pl.model.flops import count_flops
from vico_pl.planning.hardware import GPUS, USABLE
from vico_pl.planning.memory import GIB, MicroBatch, RunMemory, Terms, measure_memory, per_gpu
from vico_pl.planning.models import ModelSource, RunModels, build_models, with_routing
from vico_pl.planning.sources import find_model
from vico_pl.planning.workload import SampleShape, SampleWork, count_work, micro_batch_of, read_samples
from vico_pl.recipe import RunConfig
from vico_pl.stages.settings import PARTS

WORLDS = (1, 2, 4, 8)
MAX_WORLD = 64  # up to which a number of GPUs that fits is looked for
MFU = 0.4  # share of a GPU's peak that large runs reach


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way to spread a run over GPUs."""

    world: int
    sharded: bool  # FSDP; otherwise DDP, or one GPU

    def __str__(self) -> str:
        if self.world == 1:
            return "1 GPU"
        return f"FSDP x{self.world}" if self.sharded else "DDP"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that can be told of a run before it begins."""

    config: RunConfig
    source: ModelSource
    parameters: dict[str, tuple[int, int]]  # part -> total, trained
    shared_parameters: int  # that the reference uses of the policy
    sample: SampleShape
    micro_batch: MicroBatch
    memory: dict[bool, RunMemory]  # with and without activation checkpointing
    work: SampleWork
    mfu: float
    world: int | None  # GPUs that the recipe names; none: it does not

    def per_gpu(self, layout: Layout, *, checkpointing: bool) -> Terms:
        """Return the bytes that each GPU holds."""
        return per_gpu(self.memory[checkpointing], sharded=layout.sharded, world=layout.world)

    def gib(self, layout: Layout, *, checkpointing: bool) -> float:
        """Return the sum of `per_gpu`."""
        return sum(self.per_gpu(layout, checkpointing=checkpointing).values()) / GIB

    def layouts(self) -> list[Layout]:
        """Return the layouts to show."""
        worlds = sorted({*WORLDS, *([self.world] if self.world else [])})
        sharded = [Layout(world=world, sharded=True) for world in worlds if world > 1]
        return [Layout(world=1, sharded=False), Layout(world=2, sharded=False), *sharded]

    def hours(self, gpu: str, world: int) -> float:
        """Return how long all steps take."""
        rate = GPUS[gpu].tflops(self.config.trainer.precision) * 1e12 * self.mfu * world
        return self.run_flops / rate / 3600

    @property
    def run_samples(self) -> int:
        """Samples of the whole run."""
        return self.config.trainer.max_steps * self.config.data.batch_size

    @property
    def run_flops(self) -> float:
        """Operations of the whole run."""
        return self.run_samples * self.work.total

    @property
    def disk_gib(self) -> float:
        """Room that the run folder takes: checkpoints with the optimizer, one under way, and the model."""
        memory = self.memory[self.config.trainer.activation_checkpointing]
        checkpoint = memory.gradients + memory.optimizer
        kept = self.config.trainer.keep_checkpoints + 1
        return (kept * checkpoint + memory.weights["policy weights"]) / GIB


def build_plan(config: RunConfig, *, shape: str | None = None, mfu: float = MFU) -> Plan:
    """Plan a run.

    Raises:
        ValueError: the shape of its model cannot be found, or is of no model that can be built.
    """
    source = find_model(config.model, shape)
    spec = with_routing(source.spec, config.model)
    _check(config, source)
    flops, sample, world = count_flops(spec), read_samples(config.data), _world(config)
    tokens_per_tile = flops.vision_tokens_per_tile[min(flops.vision_tokens_per_tile)]
    micro_batch = micro_batch_of(config.data, sample, tokens_per_tile=tokens_per_tile, world=world or 1)
    models = build_models(config, source)
    return Plan(
        config=config,
        source=source,
        parameters=_parameters(models),
        shared_parameters=sum(p.numel() for p in models.shared()),
        sample=sample,
        micro_batch=micro_batch,
        memory={on: measure_memory(config, source, micro_batch, checkpointing=on) for on in (False, True)},
        work=count_work(config, flops, sample),
        mfu=mfu,
        world=world,
    )


def smallest_layout(memory: RunMemory, memory_gib: float) -> Layout | None:
    """Return the layout with the fewest GPUs that fits; None: none up to `MAX_WORLD` does."""
    worlds = [2**n for n in range(MAX_WORLD.bit_length())]
    layouts = [Layout(world=world, sharded=world > 1) for world in worlds]
    return next((layout for layout in layouts if _fits(memory, layout, memory_gib)), None)


def cheaper_settings(plan: Plan) -> Iterator[tuple[str, RunMemory]]:
    """Yield changes of the recipe that take less memory, and what is left of it."""
    config, on = plan.config, plan.config.trainer.activation_checkpointing
    if config.stage != "router":
        if not on:
            yield "trainer.activation_checkpointing=true", plan.memory[True]
        trainable = config.model.trainable
        if "vision" in trainable:
            kept = [part for part in trainable if part != "vision"]
            yield f"model.trainable={_listed(kept)}", _changed(plan, kept)
        if "language" in trainable:
            kept = ["connectors", "lora"]
            yield f"model.trainable={_listed(kept)}", _changed(plan, kept)
    if plan.micro_batch.num_samples > 1:
        half = replace(plan.micro_batch, num_samples=plan.micro_batch.num_samples // 2)
        limit = half.num_samples * half.tiles
        yield (
            f"data.micro_batch.max_tiles={limit}",
            measure_memory(config, plan.source, half, checkpointing=on),
        )


def _changed(plan: Plan, trainable: list[str]) -> RunMemory:
    config = replace(plan.config, model=replace(plan.config.model, trainable=trainable))
    on = config.trainer.activation_checkpointing
    return measure_memory(config, plan.source, plan.micro_batch, checkpointing=on)


def _listed(parts: list[str]) -> str:
    return "[" + ",".join(parts) + "]"


def _fits(memory: RunMemory, layout: Layout, memory_gib: float) -> bool:
    held = per_gpu(memory, sharded=layout.sharded, world=layout.world)
    return sum(held.values()) / GIB <= memory_gib * USABLE


def _check(config: RunConfig, source: ModelSource) -> None:
    if config.stage == "router" and with_routing(source.spec, config.model).router_heads is None:
        raise ValueError("the model has no router; set model.router_heads")
    unknown = set(source.spec.ratios) - set(config.model.ratios)
    if unknown:
        raise ValueError(f"model.ratios is {config.model.ratios}, but the model has {source.spec.ratios}")


def _world(config: RunConfig) -> int | None:
    devices: Any = config.trainer.devices
    if not str(devices).isdigit() or int(devices) < 1:
        return None
    return int(devices) * config.trainer.num_nodes


def _parameters(models: RunModels) -> dict[str, tuple[int, int]]:
    policy = models.policy
    own = {id(parameter) for parameter in own_parameters(policy).values()}
    parts = {name: list(getattr(policy, name).parameters()) for name in PARTS}
    counts = {name: _count([p for p in part if id(p) in own]) for name, part in parts.items()}
    adapters = [p for p in parts["language"] if id(p) not in own]
    if adapters:
        counts["adapters (LoRA)"] = _count(adapters)
    if policy.router is not None:
        counts["router"] = _count(policy.router.parameters())
    return counts


def _count(parameters: Any) -> tuple[int, int]:
    pairs = [(p.numel(), p.numel() * p.requires_grad) for p in parameters]
    return sum(total for total, _ in pairs), sum(trained for _, trained in pairs)
