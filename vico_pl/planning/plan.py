"""The plan of a recipe: memory, operations and hours, from configurations alone."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from vico_pl.config import RunConfig
from vico_pl.model.adapters import own_parameters
from vico_pl.model.flops import count_flops
from vico_pl.planning.memory import (
    GIB,
    RunMemory,
    Terms,
    measure_memory,
    per_gpu,
    shared_parameters,
    stage_on_meta,
    with_routing,
)
from vico_pl.planning.sources import (
    MicroBatch,
    ModelShape,
    SampleShape,
    find_model,
    largest_micro_batch,
    read_samples,
)
from vico_pl.stages.base import Stage
from vico_pl.stages.settings import PARTS

WORLDS = (1, 2, 4, 8)
MAX_WORLD = 64  # the largest number of GPUs that is tried
MFU = 0.4  # fraction of a GPU's peak that large runs reach
USABLE = 0.92  # fraction of a GPU's memory: the CUDA context, NCCL and fragmentation take the rest


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU by NVIDIA's data sheet, its speed without sparsity."""

    memory_gib: float  # as the driver reports it, a little less than the name says
    half_tflops: float  # bfloat16 and float16 on tensor cores
    full_tflops: float  # float32 without TF32

    def tflops(self, precision: str) -> float:
        """Return the peak at one of Lightning's precisions."""
        return self.full_tflops if precision.startswith("32") else self.half_tflops


GPUS = {
    "L40S": Gpu(memory_gib=44.4, half_tflops=362.0, full_tflops=91.6),
    "A100-80": Gpu(memory_gib=79.2, half_tflops=312.0, full_tflops=19.5),
    "H100-80": Gpu(memory_gib=79.1, half_tflops=989.0, full_tflops=67.0),
    "H200": Gpu(memory_gib=139.8, half_tflops=989.0, full_tflops=67.0),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The number of GPUs of a run, and whether FSDP shards the models."""

    world: int
    sharded: bool  # FSDP; otherwise DDP, or one GPU

    def __str__(self) -> str:
        if self.world == 1:
            return "1 GPU"
        return f"FSDP x{self.world}" if self.sharded else "DDP"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take."""

    config: RunConfig
    stage: type[Stage]
    shape: ModelShape
    parameters: dict[str, tuple[int, int]]  # part -> total, trained
    shared_parameters: int  # of the policy, used by the reference too
    sample: SampleShape
    micro_batch: MicroBatch
    memory: dict[bool, RunMemory]  # with and without activation checkpointing
    flops: dict[str, float]  # of a sample, by part
    vision_tokens: dict[str, float]  # of a sample, by model
    mfu: float
    world: int | None  # GPUs that the recipe names; None: it names none

    @property
    def own_memory(self) -> RunMemory:
        """Memory at the recipe's own setting of activation checkpointing."""
        return self.memory[self.config.trainer.activation_checkpointing]

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
    def epochs(self) -> float | None:
        """How often the run sees each sample; None: the number of samples is unknown."""
        return self.run_samples / self.sample.num_samples if self.sample.num_samples else None

    @property
    def sample_flops(self) -> float:
        """Operations of a sample."""
        return sum(self.flops.values())

    @property
    def run_flops(self) -> float:
        """Operations of the whole run."""
        return self.run_samples * self.sample_flops

    @property
    def disk_gib(self) -> float:
        """Size of the run folder: checkpoints with optimizer state, one being written, and the model."""
        memory = self.own_memory
        kept = self.config.trainer.keep_checkpoints + 1
        return (kept * (memory.gradients + memory.optimizer) + memory.weights["policy weights"]) / GIB


def build_plan(config: RunConfig, *, shape: str | None = None, mfu: float = MFU) -> Plan:
    """Plan a run.

    Raises:
        ValueError: the shape of its model is unknown, or does not fit the stage.
    """
    found, sample, world = find_model(config.model, shape), read_samples(config.data), _world(config)
    stage = stage_on_meta(config, found, checkpointing=False)
    flops = count_flops(with_routing(found.spec, config.model))
    cost = type(stage).cost(config, flops)
    tokens_per_tile = stage.trained_model().tokens_per_full_tile
    micro_batch = largest_micro_batch(config.data, sample, tokens_per_tile=tokens_per_tile, world=world or 1)
    return Plan(
        config=config,
        stage=type(stage),
        shape=found,
        parameters=_count_parts(stage),
        shared_parameters=sum(p.numel() for p in shared_parameters(stage)),
        sample=sample,
        micro_batch=micro_batch,
        memory={on: measure_memory(config, found, micro_batch, checkpointing=on) for on in (False, True)},
        flops=cost.expected_parts(sample.tiles, sample.text_tokens, sample.response_tokens),
        vision_tokens=cost.vision_tokens(sample.tiles),
        mfu=mfu,
        world=world,
    )


def fits(memory: RunMemory, layout: Layout, memory_gib: float) -> bool:
    """Return whether a run fits on GPUs of this size."""
    held = per_gpu(memory, sharded=layout.sharded, world=layout.world)
    return sum(held.values()) / GIB <= memory_gib * USABLE


def smallest_layout(memory: RunMemory, memory_gib: float) -> Layout | None:
    """Return the layout with the fewest GPUs that fits; None: none up to `MAX_WORLD` does."""
    layouts = [Layout(world=2**n, sharded=n > 0) for n in range(MAX_WORLD.bit_length())]
    return next((layout for layout in layouts if fits(memory, layout, memory_gib)), None)


def cheaper_settings(plan: Plan) -> Iterator[tuple[str, RunMemory]]:
    """Yield changes of the recipe that take less memory, and the memory they take."""
    config, micro_batch, trainable = plan.config, plan.micro_batch, plan.config.model.trainable
    on = config.trainer.activation_checkpointing
    if plan.stage.trains_parts:
        if not on:
            yield "trainer.activation_checkpointing=true", plan.memory[True]
        smaller = {
            "vision": [part for part in trainable if part != "vision"],
            "language": ["connectors", "lora"],
        }
        for parts in (smaller[name] for name in smaller if name in trainable):
            changed = replace(config, model=replace(config.model, trainable=parts))
            memory = measure_memory(changed, plan.shape, micro_batch, checkpointing=on)
            yield f"model.trainable=[{','.join(parts)}]", memory
    if micro_batch.num_samples > 1:
        half = replace(micro_batch, num_samples=micro_batch.num_samples // 2)
        memory = measure_memory(config, plan.shape, half, checkpointing=on)
        yield f"data.micro_batch.max_tiles={half.num_samples * half.tiles}", memory


def _world(config: RunConfig) -> int | None:
    devices = str(config.trainer.devices)
    return int(devices) * config.trainer.num_nodes if devices.isdigit() and int(devices) else None


def _count_parts(stage: Stage) -> dict[str, tuple[int, int]]:
    policy = stage.trained_model()
    own = {id(parameter) for parameter in own_parameters(policy).values()}
    parts = {name: list(getattr(policy, name).parameters()) for name in PARTS}
    counts = {name: _count(p for p in part if id(p) in own) for name, part in parts.items()}
    adapters = [p for p in parts["language"] if id(p) not in own]
    if adapters:
        counts["adapters (LoRA)"] = _count(adapters)
    if policy.router is not None:
        counts["router"] = _count(policy.router.parameters())
    return counts


def _count(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    pairs = [(p.numel(), p.numel() * p.requires_grad) for p in parameters]
    return sum(total for total, _ in pairs), sum(trained for _, trained in pairs)
