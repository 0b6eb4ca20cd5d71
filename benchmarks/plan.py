"""Accuracy of the memory that `vico plan` predicts, on steps of a small model.

Each measurement is a separate process that builds a stage with weights, runs a micro-batch and an optimizer
step and reports its peak memory. `vico_pl.planning` predicts the same from the recipe alone. The model has
0.16 billion float32 parameters, far more than the overhead of a process.
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

# Freed memory goes back at once: without this, glibc keeps half a gigabyte in pieces.
os.environ.update(MALLOC_MMAP_THRESHOLD_="262144", MALLOC_TRIM_THRESHOLD_="262144")

import harness
import torch
from harness import Goal

from vico_pl.config import RunConfig, parse_config
from vico_pl.model.vlm import ModelSpec, VisionLanguageModel
from vico_pl.optim import build_optimizer
from vico_pl.planning.memory import ready, trained_parameters
from vico_pl.planning.plan import GIB, Layout, measure_memory
from vico_pl.planning.sources import MicroBatch, ModelShape, draw_batch
from vico_pl.stages import build_stage
from vico_pl.stages.settings import ModelConfig

GOALS = {"plan_memory_error": Goal(0.10)}
SPEC = ModelSpec(
    vision={
        "model_type": "internvl_vision",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "attention_bias": True,
        "image_size": 224,
        "patch_size": 14,
    },
    language={
        "model_type": "qwen3",
        "hidden_size": 768,
        "intermediate_size": 2304,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "head_dim": 64,
        "vocab_size": 32_000,
        "tie_word_embeddings": False,
    },
    ratios=[4, 16],
    router_heads=8,
    placeholder_id=5,
)
SHAPE = ModelShape(name="this benchmark", spec=SPEC, dtype=torch.float32)
CASES: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": "consistency"},
    "stage 1, activation checkpointing": {"stage": "consistency", "checkpointing": True, "num_samples": 12},
    "stage 1, vision frozen": {"stage": "consistency", "trainable": ["connectors", "language"]},
    "stage 1, connectors alone": {"stage": "consistency", "trainable": ["connectors"]},
    "stage 2, a label per tile": {"stage": "router", "label_mode": "tile", "num_samples": 12},
    "stage 2, a label per image": {"stage": "router", "label_mode": "image"},
}
MICRO_BATCH = MicroBatch(num_samples=3, tiles=4, text_tokens=100, response_tokens=50)


def recipe(case: str) -> RunConfig:
    """Return the configuration of a case."""
    settings = {"trainable": ["vision", "connectors", "language"], "label_mode": "tile", **CASES[case]}
    model = {"path": "start", "reference": "other", "router_heads": 8, "trainable": settings["trainable"]}
    return parse_config(
        {
            "stage": settings["stage"],
            "run_dir": "unused",
            "model": model,
            "router": {"label_mode": settings["label_mode"], "min_history": 1},
            "consistency": {"ratio_draw": "full"},
            "data": {"sources": [{"path": "unused"}]},
            "trainer": {"activation_checkpointing": settings.get("checkpointing", False)},
        },
        name=case,
    )


def micro_batch_of(case: str) -> MicroBatch:
    """Return the micro-batch of a case: larger where little of it stays in memory."""
    return replace(MICRO_BATCH, num_samples=CASES[case].get("num_samples", MICRO_BATCH.num_samples))


# --- Measurements -------------------------------------------------------------------------------------------


def measure(case: str) -> dict[str, float]:
    """Run a step in this process, after a tiny one that triggers lazy loading."""
    torch.set_num_threads(1)
    train(case, MicroBatch(num_samples=1, tiles=1, text_tokens=8, response_tokens=4))
    gc.collect()  # blocks that recompute refer to themselves
    return harness.measure(lambda: train(case, micro_batch_of(case)))


class RandomModels:
    """Gives a stage models with random weights, that of the reference its own."""

    same_weights = False

    def __init__(self, shape: ModelShape, config: ModelConfig) -> None:
        """Remember the shape of both; the policy has what the recipe adds."""
        self._shape, self._config = shape, config

    def policy(self) -> VisionLanguageModel:
        """Return the model to train."""
        heads = self._shape.spec.router_heads or self._config.router_heads
        return self._build(replace(self._shape.spec, ratios=self._config.ratios, router_heads=heads))

    def reference(self) -> VisionLanguageModel:
        """Return the reference model."""
        return self._build(self._shape.spec)

    def rule(self) -> None:
        """Route no tile."""

    def _build(self, spec: ModelSpec) -> VisionLanguageModel:
        model = VisionLanguageModel(spec).to(self._shape.dtype)
        if model.router is not None:
            model.router.float()  # as a randomly initialised one
        return model


def train(case: str, micro_batch: MicroBatch) -> None:
    """Build the stage of a case with weights and run a micro-batch as in the middle of a run."""
    build_step(recipe(case), SHAPE, micro_batch)()


def build_step(
    config: RunConfig, shape: ModelShape, micro_batch: MicroBatch, *, device: str = "cpu"
) -> Callable[[], None]:
    """Build a stage with random weights; returns what runs a micro-batch as in the middle of a run.

    The optimizer has its averages by then, and an earlier micro-batch of the same step left its gradients.
    """
    with torch.device(device):  # weights are drawn where they stay
        stage = ready(build_stage(config, RandomModels(shape, config.model))).to(device)
    trained = trained_parameters(stage)
    optimizer = build_optimizer(stage.named_parameters(), config.optim, num_steps=2)["optimizer"]
    for parameter in trained:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    drawn = draw_batch(stage.trained_model(), micro_batch)
    batch = replace(drawn, tiles=torch.zeros(drawn.tiles.shape, dtype=torch.uint8)).to(torch.device(device))
    lowered = config.trainer.precision == "bf16-mixed"

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=lowered):
            stage.step(batch).loss_sum.backward()  # inside, as Lightning runs both
        optimizer.step()

    return step


def predict(case: str, micro_batch: MicroBatch) -> dict[str, float]:
    """Return the prediction for a case, in MiB by term."""
    config = recipe(case)
    terms = measure_memory(config, SHAPE, micro_batch).per_gpu(Layout(), foreach=False)
    return {name: size / GIB * 1024 for name, size in terms.items()}


# --- Output -------------------------------------------------------------------------------------------------


def compare(cases: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Measure and predict each case."""
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        terms, peak = predict(case, micro_batch_of(case)), harness.measure_apart(__file__, case)["peak_mib"]
        found[case] = {"measured_mib": peak, "predicted_mib": sum(terms.values()), "terms_mib": terms}
        sys.stdout.write(f"{case}: measured {peak:.0f} MiB, predicted {sum(terms.values()):.0f} MiB\n")
        sys.stdout.flush()
    return found


def error(result: dict[str, Any]) -> float:
    """Return the relative error of a prediction."""
    return result["predicted_mib"] / result["measured_mib"] - 1


def tables(content: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    lines = [
        *harness.heading(content),
        *harness.figure_table(content["figures"], GOALS),
        "| case | measured, MiB | predicted, MiB | off by | largest terms of the prediction, MiB |",
        "|---|---|---|---|---|",
        *(_row(case, result) for case, result in content["cases"].items()),
    ]
    return "\n".join(lines) + "\n"


def _row(case: str, result: dict[str, Any]) -> str:
    largest = sorted(result["terms_mib"].items(), key=lambda term: -term[1])[:4]
    listed = ", ".join(f"{name} {size:.0f}" for name, size in largest)
    sizes = f"{result['measured_mib']:.0f} | {result['predicted_mib']:.0f} | {100 * error(result):+.1f} %"
    return f"| {case} | {sizes} | {listed} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one measurement, or all and write the results."""
    parser = harness.parser("Compare the memory that `vico plan` predicts with memory that was measured.")
    parser.add_argument("--measure", choices=CASES, help="one measurement in this process, as JSON")
    given = parser.parse_args(arguments)
    if given.measure:
        sys.stdout.write(json.dumps(measure(given.measure)))
        return
    cases = compare(list(CASES))
    measured = {"plan_memory_error": max(abs(error(result)) for result in cases.values())}
    figures = harness.figures_of(measured, GOALS)
    harness.publish(
        "plan",
        given,
        figures=figures,
        details={"cases": cases},
        tables=tables,
        command="python benchmarks/plan.py",
    )


if __name__ == "__main__":
    main()
