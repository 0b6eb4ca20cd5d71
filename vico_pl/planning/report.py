"""A plan as text and as JSON."""

from collections.abc import Iterator, Sequence
from typing import Any

from vico_pl.planning.memory import GIB, per_gpu
from vico_pl.planning.plan import (
    GPUS,
    MAX_WORLD,
    USABLE,
    Layout,
    Plan,
    cheaper_settings,
    fits,
    smallest_layout,
)

_SMALL_GIB = 0.01  # terms that are smaller in every layout are left out of tables, not of sums


def format_plan(plan: Plan) -> str:
    """Return the plan as tables and sentences."""
    config, on = plan.config, plan.config.trainer.activation_checkpointing
    memory_title = (
        f"{_memory_title(on=on)}; micro-batches of {plan.micro_batch.num_samples} samples "
        f"({plan.micro_batch.tiles} tiles, {plan.micro_batch.text_tokens} text tokens each), "
        "every tile at full tokens"
    )
    sections = [
        f"Stage {plan.stage.name}, model of {plan.shape.name}; precision {config.trainer.precision}, "
        f"{config.trainer.max_steps} steps of {config.data.batch_size} samples",
        _table(_parameter_rows(plan)),
        memory_title,
        _table(_memory_rows(plan, on=on)),
    ]
    if plan.stage.trains_parts:  # otherwise nothing is recomputed
        sections += [_memory_title(on=not on), _table(_memory_rows(plan, on=not on))]
    sections += [
        "Work",
        _table(_work_rows(plan)),
        f"Hours for {config.trainer.max_steps} steps at {plan.mfu:.0%} of a GPU's peak",
        _table(_hour_rows(plan)),
        "What fits",
        "\n".join(f"  {sentence}" for sentence in advice(plan)),
    ]
    return "\n\n".join(sections)


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON."""
    return {
        "stage": plan.stage.name,
        "model": plan.shape.name,
        "parameters": {k: {"total": n, "trained": t} for k, (n, t) in plan.parameters.items()},
        "sample": vars(plan.sample),
        "micro-batch": vars(plan.micro_batch),
        "memory_gib": {
            "activation_checkpointing" if on else "no_activation_checkpointing": {
                str(layout): {k: v / GIB for k, v in plan.per_gpu(layout, checkpointing=on).items()}
                for layout in plan.layouts()
            }
            for on in (False, True)
        },
        "flops_per_sample": plan.flops,
        "flops_per_step": plan.sample_flops * plan.config.data.batch_size,
        "flops": plan.run_flops,
        "vision_tokens_per_sample": plan.vision_tokens,
        "samples": plan.run_samples,
        "epochs": plan.epochs,
        "gpu_hours": {gpu: plan.hours(gpu, 1) for gpu in GPUS},
        "run_dir_gib": plan.disk_gib,
        "advice": list(advice(plan)),
    }


def advice(plan: Plan) -> Iterator[str]:
    """Say what fits where, and what would make it fit."""
    too_small = False
    single, ddp = Layout(world=1, sharded=False), Layout(world=2, sharded=False)
    for name, gpu in GPUS.items():
        layout = smallest_layout(plan.own_memory, gpu.memory_gib)
        usable = f"{gpu.memory_gib * USABLE:.0f} GiB usable"
        if layout is None:
            yield f"{name} ({usable}): does not fit, not even sharded by FSDP over {MAX_WORLD} GPUs."
        elif layout.world == 1:
            several = fits(plan.own_memory, ddp, gpu.memory_gib)
            under_ddp = "several can run under DDP" if several else "not under DDP, whose buckets do not fit"
            yield f"{name} ({usable}): fits on each GPU; {under_ddp}."
        else:
            yield f"{name} ({usable}): needs FSDP over {layout.world} GPUs or more."
        too_small |= layout is None or layout.world > 1
    if too_small:
        yield "Settings that take less on each GPU without FSDP:"
        for setting, changed in cheaper_settings(plan):
            held = sum(per_gpu(changed, sharded=False, world=1).values()) / GIB
            fitting = [name for name, gpu in GPUS.items() if fits(changed, single, gpu.memory_gib)]
            yield f"  {setting}: {held:.1f} GiB, fits {', '.join(fitting) or 'none of these GPUs'}"


def _parameter_rows(plan: Plan) -> list[list[str]]:
    counts = list(plan.parameters.values())
    policy = sum(total for total, _ in counts), sum(trained for _, trained in counts)
    rows = [["parameters", "total", "trained", "frozen"]]
    for part, (total, trained) in {**plan.parameters, "policy": policy}.items():
        rows.append([part, *map(_number, (total, trained, total - trained))])
    if plan.shared_parameters:
        rows.append(["shared with the reference", _number(plan.shared_parameters), "", ""])
    return rows


def _memory_title(*, on: bool) -> str:
    return f"Memory per GPU, GiB, {'with' if on else 'without'} activation checkpointing"


def _memory_rows(plan: Plan, *, on: bool) -> list[list[str]]:
    layouts = plan.layouts()
    held = [plan.per_gpu(layout, checkpointing=on) for layout in layouts]
    rows = [["", *map(str, layouts)]]
    for name in dict.fromkeys(name for terms in held for name in terms):
        sizes = [terms.get(name, 0.0) / GIB for terms in held]
        if max(sizes) >= _SMALL_GIB:
            rows.append([name, *(_gib(size) if size else "-" for size in sizes)])
    rows.append(["sum", *(_gib(sum(terms.values()) / GIB) for terms in held)])
    return rows


def _work_rows(plan: Plan) -> list[list[str]]:
    batch, samples = plan.config.data.batch_size, plan.run_samples
    per_sample = {
        **{f"FLOPs, {name}": count for name, count in plan.flops.items()},
        "FLOPs": plan.sample_flops,
        "tiles": plan.sample.tiles,
        **{f"vision tokens, {name}": count for name, count in plan.vision_tokens.items()},
        "text tokens": plan.sample.text_tokens,
        "samples": 1,
    }
    rows = [["", "per sample", "per step", "run"]]
    rows += [[name, *map(_number, (n, n * batch, n * samples))] for name, n in per_sample.items()]
    if plan.epochs is not None:
        rows.append(["epochs", "", "", f"{plan.epochs:.2f}"])
    return [*rows, [f"(tiles and text: {plan.sample.origin})"]]


def _hour_rows(plan: Plan) -> list[list[str]]:
    worlds = sorted({1, 8, *([plan.world] if plan.world else [])})
    rows = [["", *(f"{world} GPU{'s' if world > 1 else ''}" for world in worlds)]]
    return rows + [[gpu, *(_hours(plan.hours(gpu, world)) for world in worlds)] for gpu in GPUS]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Align the first column to the left and the others to the right; a row of one cell is a remark."""
    full = [row for row in rows if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=False))]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size:.2f}" if size < 10 else f"{size:.1f}"


def _hours(hours: float) -> str:
    return "< 0.1" if hours < 0.1 else f"{hours:.1f}"


def _number(count: int | float) -> str:
    """Write a number with three digits and a prefix.

    >>> _number(7), _number(1490), _number(3.62e12)
    ('7', '1.49 k', '3.62 T')
    """
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if count >= 0.9995 * 10**power:
            return f"{count / 10**power:.3g} {prefix}"
    return f"{count:.3g}"
