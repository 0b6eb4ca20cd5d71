"""What monitoring costs: the time within its functions during a real run of the demo's stage 1.

Runs with and without it differ by less than the noise of any machine, so each function is timed where it is
called: the callback of speed and memory, the sums per ratio and source, and what is logged every tenth step.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
from harness import Goal

from vico_pl.callbacks.dashboard import Dashboard
from vico_pl.callbacks.speed import Speed
from vico_pl.data.glyphs import GlyphsConfig
from vico_pl.data.shards.build import build_glyphs
from vico_pl.prepare import prepare_run
from vico_pl.stages import consistency
from vico_pl.stages.base import Stage
from vico_pl.stages.validation import Validation
from vico_pl.trainer import train

GOALS = {"monitoring_over_step": Goal(0.01), "validation_over_step": None}
RECIPE = harness.FOLDER.parent / "recipes" / "demo" / "consistency.yaml"
MONITORING = ("speed and memory", "logging, every tenth step", "loss per ratio")
STEPS, VALIDATE_EVERY = 60, 20
WATCHED = (  # name in the table, owner, function
    ("speed and memory", Speed, "on_train_batch_start"),
    ("speed and memory", Speed, "on_train_batch_end"),
    ("logging, every tenth step", Stage, "_log"),
    ("loss per ratio", consistency.ConsistencyStage, "_ratio_names"),
    ("loss per ratio", consistency, "grouped"),
    ("training step", Stage, "training_step"),
    ("validation, with pictures and answers", Stage, "validation_step"),
    ("validation, with pictures and answers", Validation, "on_validation_epoch_end"),
    ("validation, with pictures and answers", Dashboard, "on_validation_epoch_end"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Time a run and write the results."""
    parser = harness.parser("Measure what monitoring costs.")
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder), given.steps)
    details = {"steps": given.steps, "validations": -(-given.steps // VALIDATE_EVERY), "seconds": seconds}
    harness.publish(
        "monitoring",
        given,
        figures=figures(details),
        details=details,
        tables=tables,
        packages=["lightning"],
    )


def measure(folder: Path, steps: int) -> dict[str, float]:
    """Return the seconds that a run spent in each of `WATCHED`."""
    for part, count, seed in (("train", 400, 1), ("held-out", 64, 2)):
        build_glyphs(folder / part, GlyphsConfig(), num_samples=count, seed=seed, samples_per_shard=200)
    settings = {
        "run_dir": folder / "run",
        "data.sources.0.path": folder / "train",
        "data.validation.0.path": folder / "held-out",
        "model.path": harness.FOLDER.parent / "data" / "base",
        "trainer.accelerator": "cpu",
        "trainer.max_steps": steps,
        "trainer.validate_every": VALIDATE_EVERY,
    }
    config = prepare_run(RECIPE, [f"{key}={value}" for key, value in settings.items()])
    with timed() as seconds:
        train(config)
    return dict(seconds)


@contextmanager
def timed() -> Iterator[Counter[str]]:
    """Add up the time within each of `WATCHED`."""
    seconds: Counter[str] = Counter()
    originals = [(owner, name, getattr(owner, name)) for _, owner, name in WATCHED]

    def wrap(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **given: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **given)
            finally:
                seconds[label] += time.perf_counter() - start  # type: ignore[assignment]

        return call

    for label, owner, name in WATCHED:
        setattr(owner, name, wrap(label, getattr(owner, name)))
    try:
        yield seconds
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def figures(details: dict[str, Any]) -> harness.Figures:
    """Return each figure with its goal."""
    seconds = details["seconds"]
    step = seconds["training step"] / details["steps"]
    monitoring = sum(seconds[name] for name in seconds if name in MONITORING) / details["steps"]
    validation = seconds["validation, with pictures and answers"] / details["validations"]
    found = {"monitoring_over_step": monitoring / step, "validation_over_step": validation / step}
    return harness.figures_of(found, GOALS)


def tables(content: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    steps = content["steps"]
    rows = [f"| {name} | {1000 * taken / steps:.3f} |" for name, taken in content["seconds"].items()]
    lines = [
        *harness.heading(content),
        *harness.figure_table(content["figures"], GOALS),
        "| within | ms per step |",
        "|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
