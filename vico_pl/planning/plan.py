"""The plan of a recipe: memory, operations and hours, from configurations alone; as text and as JSON.

Weights, gradients and optimizer state are counted from parameters, the tensors of a micro-batch while the
stage's own step runs on `meta`. Those tensors are freed before the optimizer steps, which needs temporaries:
the larger of the two counts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vico_pl.config import RunConfig
from vico_pl.model.adapters import own_parameters
from vico_pl.model.blocks import split_units
from vico_pl.model.flops import count_flops
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.planning.memory import Terms, num_bytes, stage_on_meta, step_terms, trained_parameters
from vico_pl.planning.sources import (
    GPUS,
    Gpu,
    MicroBatch,
    ModelShape,
    find_model,
    largest_micro_batch,
    read_samples,
)
from vico_pl.stages import STAGES
from vico_pl.stages.base import Stage
from vico_pl.stages.settings import PARTS

GIB = 2**30
WORLDS = (2, 4, 8)  # numbers of GPUs that are shown under FSDP
MAX_WORLD = 64  # the largest number of GPUs that is tried
MFU = 0.4  # fraction of a GPU's peak that large runs reach
SMALL_GIB = 0.01  # terms that are smaller in every layout are left out of tables, not of sums
CHECKPOINTING = {False: "no_activation_checkpointing", True: "activation_checkpointing"}  # in figures


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


ONE_GPU, DDP = Layout(), Layout(world=2)  # under DDP each GPU holds the same, however many there are


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take."""

    config: RunConfig
    figures: dict[str, Any]  # as `vico plan --json` writes them
    shared_parameters: int  # of the policy, used by the reference too
    mfu: float

    @property
    def memory(self) -> dict[str, Terms]:
        """GiB on each GPU by layout and term, with activation checkpointing as the recipe has it."""
        return self.figures["memory_gib"][CHECKPOINTING[self.config.trainer.activation_checkpointing]]


def build_plan(config: RunConfig, *, shape: str | None = None, mfu: float = MFU) -> Plan:
    """Plan a run.

    Raises:
        ValueError: the shape of its model is unknown, or does not fit the stage.
    """
    found, sample, trainer = find_model(config.model, shape), read_samples(config.data), config.trainer
    stage = stage_on_meta(config, found)
    policy, world = stage.trained_model(), _num_gpus(config)
    micro_batch = largest_micro_batch(
        config.data, sample, tokens_per_tile=policy.tokens_per_full_tile, world=world or 1
    )
    memory = {on: measure_memory(_recomputing(config, on=on), found, micro_batch) for on in (False, True)}
    own = memory[trainer.activation_checkpointing]
    state = own.gradients + own.optimizer
    cost = type(stage).cost(config, count_flops(policy.spec))
    flops = cost.expected_parts(sample.tiles, sample.text_tokens, sample.response_tokens)
    num_samples = trainer.max_steps * config.data.batch_size
    run_flops = num_samples * sum(flops.values())
    figures = {
        "stage": stage.name,
        "model": found.name,
        "parameters": _count_parts(policy),
        "sample": vars(sample),
        "micro-batch": vars(micro_batch),
        "memory_gib": {CHECKPOINTING[on]: _by_layout(held, world) for on, held in memory.items()},
        "flops_per_sample": flops,
        "flops_per_step": sum(flops.values()) * config.data.batch_size,
        "flops": run_flops,
        "vision_tokens_per_sample": cost.vision_tokens(sample.tiles),
        "samples": num_samples,
        "epochs": num_samples / sample.num_samples if sample.num_samples else None,
        "gpu_hours": {
            name: run_flops / (gpu.tflops(trainer.precision) * 1e12 * mfu) / 3600
            for name, gpu in GPUS.items()
        },
        # Checkpoints with optimizer state, one being written, and the model.
        "run_dir_gib": ((trainer.keep_checkpoints + 1) * state + own.weights["policy weights"]) / GIB,
        "advice": list(advice(config, found, micro_batch, own)),
    }
    shared = sum(p.numel() for p in shared_parameters(stage))
    return Plan(config=config, figures=figures, shared_parameters=shared, mfu=mfu)


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


def shared_parameters(stage: Stage) -> list[Tensor]:
    """Return the frozen parameters that the policy and another model share."""
    policy, *others = stage.sharded_models()
    frozen = {id(parameter) for parameter in policy.parameters() if not parameter.requires_grad}
    return [p for model in others for p in model.parameters() if id(p) in frozen]


def _num_gpus(config: RunConfig) -> int | None:
    """Return the number of GPUs that a recipe names; None: it names none."""
    devices = config.trainer.devices
    return None if devices == "auto" else int(devices) * config.trainer.num_nodes


def _recomputing(config: RunConfig, *, on: bool) -> RunConfig:
    return replace(config, trainer=replace(config.trainer, activation_checkpointing=on))


def _count_parts(policy: VisionLanguageModel) -> dict[str, dict[str, int]]:
    own = {id(parameter) for parameter in own_parameters(policy).values()}
    counts = {part: {"total": 0, "trained": 0} for part in PARTS}
    for name, parameter in policy.named_parameters():
        part = name.partition(".")[0] if id(parameter) in own else "adapters (LoRA)"
        count = counts.setdefault(part, {"total": 0, "trained": 0})
        count["total"] += parameter.numel()
        count["trained"] += parameter.numel() * parameter.requires_grad
    return counts


def _by_layout(memory: RunMemory, world: int | None) -> dict[str, Terms]:
    worlds = sorted({*WORLDS, world or 1} - {1})
    layouts = [ONE_GPU, DDP, *(Layout(world=world, sharded=True) for world in worlds)]
    return {
        str(layout): {name: size / GIB for name, size in memory.per_gpu(layout).items()} for layout in layouts
    }


def advice(config: RunConfig, shape: ModelShape, micro_batch: MicroBatch, memory: RunMemory) -> Iterator[str]:
    """Say what fits where, and what would make it fit."""
    layouts = {name: smallest_layout(memory, gpu) for name, gpu in GPUS.items()}
    for name, layout in layouts.items():
        usable = GPUS[name].usable_gib
        if layout is None:
            verdict = f"does not fit, not even sharded by FSDP over {MAX_WORLD} GPUs"
        elif layout.sharded:
            verdict = f"needs FSDP over {layout.world} GPUs or more"
        elif memory.gib(DDP) <= usable:
            verdict = "fits on each GPU; several can run under DDP"
        else:
            verdict = "fits on each GPU; not under DDP, whose buckets do not fit"
        yield f"{name} ({usable:.0f} GiB usable): {verdict}."
    if any(layout != ONE_GPU for layout in layouts.values()):
        yield "Settings that take less on each GPU without FSDP:"
        for setting, run, drawn in cheaper_settings(config, micro_batch):
            held = measure_memory(run, shape, drawn).gib(ONE_GPU)
            fitting = ", ".join(name for name, gpu in GPUS.items() if held <= gpu.usable_gib)
            yield f"  {setting}: {held:.1f} GiB, fits {fitting or 'none of these GPUs'}"


def smallest_layout(memory: RunMemory, gpu: Gpu) -> Layout | None:
    """Return the layout with the fewest GPUs that fits; None: none up to `MAX_WORLD` does."""
    layouts = [Layout(world=2**n, sharded=n > 0) for n in range(MAX_WORLD.bit_length())]
    return next((layout for layout in layouts if memory.gib(layout) <= gpu.usable_gib), None)


def cheaper_settings(
    config: RunConfig, micro_batch: MicroBatch
) -> Iterator[tuple[str, RunConfig, MicroBatch]]:
    """Yield changes of a recipe that take less memory, with the recipe and the micro-batch that they give."""
    trainable = config.model.trainable
    if STAGES[config.stage].trains_parts:
        if not config.trainer.activation_checkpointing:
            yield "trainer.activation_checkpointing=true", _recomputing(config, on=True), micro_batch
        without_vision = [part for part in trainable if part != "vision"]
        for part, smaller in (("vision", without_vision), ("language", ["connectors", "lora"])):
            if part in trainable:
                model = replace(config.model, trainable=smaller)
                yield f"model.trainable=[{','.join(smaller)}]", replace(config, model=model), micro_batch
    if micro_batch.num_samples > 1:
        half = replace(micro_batch, num_samples=micro_batch.num_samples // 2)
        yield f"data.micro_batch.max_tiles={half.num_samples * half.tiles}", config, half


def format_plan(plan: Plan) -> str:
    """Return the plan as tables and sentences."""
    config, trainer, figures = plan.config, plan.config.trainer, plan.figures
    on, drawn = trainer.activation_checkpointing, figures["micro-batch"]
    title = "Memory per GPU, GiB, {} activation checkpointing".format
    sections = [
        f"Stage {figures['stage']}, model of {figures['model']}; precision {trainer.precision}, "
        f"{trainer.max_steps} steps of {config.data.batch_size} samples",
        _table(_parameter_rows(plan)),
        f"{title('with' if on else 'without')}; micro-batches of {drawn['num_samples']} samples "
        f"({drawn['tiles']} tiles, {drawn['text_tokens']} text tokens each), every tile at full tokens",
        _table(_memory_rows(plan.memory)),
    ]
    if STAGES[config.stage].trains_parts:  # otherwise nothing is recomputed
        others = _memory_rows(figures["memory_gib"][CHECKPOINTING[not on]])
        sections += [title("without" if on else "with"), _table(others)]
    sections += [
        "Work",
        f"{_table(_work_rows(plan))}\n  (tiles and text: {figures['sample']['origin']})",
        f"Hours for {trainer.max_steps} steps at {plan.mfu:.0%} of a GPU's peak",
        _table(_hour_rows(plan)),
        "What fits",
        "\n".join(f"  {sentence}" for sentence in figures["advice"]),
    ]
    return "\n\n".join(sections)


def _parameter_rows(plan: Plan) -> Iterator[list[str]]:
    yield ["parameters", "total", "trained", "frozen"]
    counts = {part: (count["total"], count["trained"]) for part, count in plan.figures["parameters"].items()}
    policy = [sum(column) for column in zip(*counts.values(), strict=True)]
    for part, (total, trained) in {**counts, "policy": policy}.items():
        yield [part, *map(_number, (total, trained, total - trained))]
    if plan.shared_parameters:
        yield ["shared with the reference", _number(plan.shared_parameters), "", ""]


def _memory_rows(held: Mapping[str, Terms]) -> Iterator[list[str]]:
    yield ["", *held]
    for name in dict.fromkeys(name for terms in held.values() for name in terms):
        sizes = [terms.get(name, 0.0) for terms in held.values()]
        if max(sizes) >= SMALL_GIB:
            yield [name, *(_gib(size) if size else "-" for size in sizes)]
    yield ["sum", *(_gib(sum(terms.values())) for terms in held.values())]


def _work_rows(plan: Plan) -> Iterator[list[str]]:
    yield ["", "per sample", "per step", "run"]
    figures, flops = plan.figures, plan.figures["flops_per_sample"]
    per_sample = {
        **{f"FLOPs, {name}": count for name, count in flops.items()},
        "FLOPs": sum(flops.values()),
        "tiles": figures["sample"]["tiles"],
        **{f"vision tokens, {name}": n for name, n in figures["vision_tokens_per_sample"].items()},
        "text tokens": figures["sample"]["text_tokens"],
        "samples": 1,
    }
    for name, count in per_sample.items():
        times = (1, plan.config.data.batch_size, figures["samples"])
        yield [name, *(_number(count * n) for n in times)]
    if figures["epochs"] is not None:
        yield ["epochs", "", "", f"{figures['epochs']:.2f}"]


def _hour_rows(plan: Plan) -> Iterator[list[str]]:
    worlds = sorted({1, 8, _num_gpus(plan.config) or 1})
    yield ["", *(f"{world} GPU{'s' if world > 1 else ''}" for world in worlds)]
    for gpu, hours in plan.figures["gpu_hours"].items():
        yield [gpu, *("< 0.1" if hours / world < 0.1 else f"{hours / world:.1f}" for world in worlds)]


def _table(rows: Iterator[list[str]]) -> str:
    """Indent rows; align the first column to the left and the others to the right."""
    lines = list(rows)
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = (["", label.ljust(first), *map(str.rjust, values, others)] for label, *values in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells)


def _gib(size: float) -> str:
    return f"{size:.2f}" if size < 10 else f"{size:.1f}"


def _number(count: int | float) -> str:
    """Write a number with three digits and a prefix.

    >>> _number(7), _number(1490), _number(3.62e12)
    ('7', '1.49 k', '3.62 T')
    """
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if count >= 0.9995 * 10**power:
            return f"{count / 10**power:.3g} {prefix}"
    return f"{count:.3g}"
