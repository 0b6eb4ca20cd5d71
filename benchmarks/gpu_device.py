"""Time and memory of a step of both stages and of the consistency loss on a device; `gpu.py` reports them."""

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import kl
import plan
import scaling
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from models import spec_of

from vico_pl.config import RunConfig, load_config
from vico_pl.losses.consistency import check_liger, consistency_kl, liger_kl_sum
from vico_pl.model.connector import FULL_RATIO
from vico_pl.model.flops import ModelFlops, count_flops
from vico_pl.model.language import check_flash_attention
from vico_pl.planning.plan import GIB, Layout, measure_memory
from vico_pl.planning.sources import (
    USABLE,
    MicroBatch,
    ModelShape,
    SampleShape,
    find_model,
    largest_micro_batch,
)
from vico_pl.stages import STAGES

ROOT = Path(__file__).parents[1]
FLASH, OURS = "stage 1, flash-attn", "ours, chunks of 256"
RECIPES = {1: "consistency", 2: "router"}  # of each stage
FULL_TOKENS = {1: ["consistency.ratio_draw=full"], 2: ["router.min_history=1"]}  # as `vico plan` counts
CASES: dict[str, tuple[int, list[str]]] = {  # stage and settings besides those of its recipe
    "stage 1": (1, ["trainer.activation_checkpointing=false"]),
    FLASH: (1, ["trainer.activation_checkpointing=false", "model.attention=flash"]),
    "stage 1, activation checkpointing": (1, []),
    "stage 2": (2, []),
}
SAMPLE = SampleShape(
    tiles=5.0, text_tokens=200.0, response_tokens=100.0, num_samples=None, origin="this benchmark"
)
WARM_UP, TIMED = 2, 5  # calls of a step or a loss
LOSSES = {  # chunk of each; 0: it has none
    OURS: 256,
    "ours, chunks of 1024": 1024,
    "naive": 0,
    "liger": 0,
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size of everything, and where it runs."""

    device: str
    shape: ModelShape
    loss: kl.Shape
    run_shape: dict[str, Any]  # of the model of the stopped run
    run_steps: int
    tests: str


def full_size() -> Size:
    """Return what `make gpu-check` measures."""
    return Size(
        device="cuda",
        shape=find_model(recipe("stage 1").model, "1b"),
        loss=kl.Shape(width=1024),
        run_shape=scaling.SHAPE,
        run_steps=60,
        tests="tests",
    )


def dry_size() -> Size:
    """Return sizes for seconds on a CPU."""
    language = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "heads": (2, 1)}
    spec = spec_of(
        tile_size=56, vision={"width": 64, "layers": 1}, language=language, vocab_size=64, head_dim=16
    )
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    changes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    return Size(
        device="cpu",
        shape=ModelShape(name="tiny", spec=replace(spec, router_heads=None), dtype=torch.bfloat16),
        loss=kl.Shape(tokens=8, vocab=64, width=16, chunk=4),
        run_shape={**scaling.SHAPE, "vision": vision, "language": {**scaling.SHAPE["language"], **changes}},
        run_steps=40,
        tests="tests/model/test_packed.py",
    )


# --- Steps of both stages -----------------------------------------------------------------------------------


def recipe(case: str) -> RunConfig:
    """Return the configuration of a case: the recipe for InternVL3.5-1B."""
    stage, settings = CASES[case]
    path = ROOT / "recipes" / "internvl3_5-1b" / f"{RECIPES[stage]}.yaml"
    return load_config(path, [*FULL_TOKENS[stage], *settings])


def measure_step(case: str, size: Size) -> dict[str, Any]:
    """Time the step of a micro-batch, and compare its peak memory with that of the plan.

    A step is the forward and the backward pass of a micro-batch and an update of the optimizer.
    """
    config = recipe(case)
    if config.model.attention == "flash" and (lacking := _lacking(check_flash_attention, size.device)):
        return {"skipped": lacking}
    micro_batch, terms = fitting(config, size)
    begun = _allocated(size.device)
    step = plan.build_step(config, size.shape, micro_batch, device=size.device)
    measured = measure(step, size.device, begun=begun)
    flops = _flops(config, size)
    per_sample = (
        STAGES[config.stage].cost(config, flops).expected_parts(*list(vars(micro_batch).values())[1:])
    )
    per_s = micro_batch.num_samples / measured["s"]
    tokens = micro_batch.tiles * flops.vision_tokens_per_tile[FULL_RATIO] + micro_batch.text_tokens
    peak = get_available_flops(torch.device(size.device), torch.bfloat16)
    return {
        **measured,
        "micro_batch": vars(micro_batch),
        "predicted_mib": sum(terms.values()) / 2**20,
        "terms_mib": {name: held / 2**20 for name, held in terms.items()},
        "tokens_per_s": per_s * tokens,
        "tflops": per_s * sum(per_sample.values()) / 1e12,
        "mfu": per_s * sum(per_sample.values()) / peak if peak else None,
    }


def fitting(config: RunConfig, size: Size) -> tuple[MicroBatch, dict[str, float]]:
    """Return the largest micro-batch whose predicted memory fits this GPU, and that memory in bytes."""
    tokens = _flops(config, size).vision_tokens_per_tile[FULL_RATIO]
    drawn = largest_micro_batch(config.data, SAMPLE, tokens_per_tile=tokens, world=1)
    while True:
        terms = measure_memory(config, size.shape, drawn).per_gpu(Layout(), foreach=size.device == "cuda")
        if drawn.num_samples == 1 or sum(terms.values()) < _memory(size.device) * USABLE:
            return drawn, terms
        drawn = replace(drawn, num_samples=drawn.num_samples // 2)


def _flops(config: RunConfig, size: Size) -> ModelFlops:
    heads = config.model.router_heads
    return count_flops(replace(size.shape.spec, ratios=config.model.ratios, router_heads=heads))


# --- The loss -----------------------------------------------------------------------------------------------


def measure_losses(size: Size) -> dict[str, Any]:
    """Time a forward and a backward pass of each implementation on bfloat16 states and heads."""
    drawn = kl.draw_inputs(size.loss)
    given = kl.Inputs(
        **{
            name: tensor.detach().to(size.device, torch.bfloat16).requires_grad_(tensor.requires_grad)
            for name, tensor in vars(drawn).items()
        }
    )
    del drawn

    def measure_loss(name: str) -> dict[str, Any]:
        if name == "liger" and (lacking := _lacking(check_liger, size.device)):
            return {"skipped": lacking}
        given.states.grad = given.head.grad = None
        run = _loss(name, given, replace(size.loss, chunk=LOSSES[name]))
        return measure(run, size.device, begun=_allocated(size.device))

    return {name: attempt(partial(measure_loss, name)) for name in LOSSES}


def _loss(name: str, given: kl.Inputs, shape: kl.Shape) -> Callable[[], object]:
    sides = [*vars(given).values()]
    return {
        "liger": lambda: liger_kl_sum(*sides).div(shape.tokens).backward(),
        "naive": lambda: kl.run_naive(given, shape),
    }.get(name, lambda: consistency_kl(*sides, chunk_size=shape.chunk).sum().div(shape.tokens).backward())


# --- Measuring on a device ----------------------------------------------------------------------------------


def measure(run: Callable[[], object], device: str, *, begun: float) -> dict[str, float]:
    """Return the seconds of a call and the peak of memory, in MiB above `begun` bytes."""
    if device == "cpu":
        peak = harness.measure(run)["peak_mib"]
    else:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP):
        run()
    start = _now(device)
    for _ in range(TIMED):
        run()
    seconds = (_now(device) - start) / TIMED
    if device == "cuda":
        peak = (torch.cuda.max_memory_allocated() - begun) / 2**20
    return {"s": seconds, "peak_mib": peak}


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _allocated(device: str) -> float:
    """Return the bytes of tensors that are alive, after freeing what earlier measurements left."""
    gc.collect()  # blocks that recompute refer to themselves
    return float(torch.cuda.memory_allocated()) if device == "cuda" else 0.0


def _memory(device: str) -> float:
    if device == "cuda":
        return float(torch.cuda.get_device_properties(0).total_memory)
    return 4.0 * GIB


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a function measures, or why it does not: whatever fails, all else is still measured."""
    try:
        return run()
    except Exception as error:  # of any library, on a device where this may never have run
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def _lacking(check: Callable[[torch.device], None], device: str) -> str | None:
    """Return what a kernel lacks on a device; None: it can run."""
    try:
        check(torch.device(device))
    except ValueError as error:
        return str(error)
    return None
