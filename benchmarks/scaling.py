"""Weak scaling of stage 1 from one rank to two, under DDP and FSDP.

All runs are `vico train` with one thread per process on the same shards; times come from TensorBoard. A step
of two ranks takes the samples of two steps of one. Two independent runs of one rank show the limit of the
machine, whose caches and memory bandwidth two processes share. The second workload has samples of uneven cost
in several micro-batches per step, after each of which the ranks wait for each other under FSDP.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import harness
from harness import Goal
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vico_pl.data.glyphs import GlyphsConfig, draw_records
from vico_pl.data.shards.reader import write_index, write_shard

GOALS: harness.Goals = {
    "weak_scaling_2_ranks": Goal(1.7, at_least=True),
    "ddp_2_ranks_over_1": None,  # reported
    "fsdp_2_ranks_over_1": None,
}
SHAPE = {  # 15 million weights
    "ratios": [4],
    "vision": {"image_size": 64, "patch_size": 8, "width": 256, "layers": 4, "head_width": 64},
    "language": {
        "model_type": "qwen3",
        "hidden_size": 384,
        "intermediate_size": 1152,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "vocab_size": 512,
}
WARM_UP, TIMED = 1, 3  # steps of two ranks; one alone takes twice as many
ROUNDS = 2
TRAIN = [sys.executable, "-m", "vico_pl", "train"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the runs of a comparison train on."""

    max_tiles: int  # of an image, without the thumbnail
    micro_batch: int  # tiles, at most
    samples: int  # of each rank in a step
    sides: dict[str, list[str]]  # strategies of the runs that are started together; auto is one rank


WORKLOADS = {
    "even": Workload(
        max_tiles=2,
        micro_batch=48,
        samples=6,
        sides={"one rank": ["auto"], "two ranks": ["ddp"], "two runs": ["auto", "auto"]},
    ),
    "uneven": Workload(
        max_tiles=6,
        micro_batch=12,
        samples=8,
        sides={"one rank": ["auto"], "two ranks, DDP": ["ddp"], "two ranks, FSDP": ["fsdp"]},
    ),
}
TITLES = {"two runs": "two runs of one rank side by side, together"}
Round = dict[str, dict[str, float]]  # workload -> side -> seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Time one rank, two ranks and two runs of one rank in turn and write the results."""
    parser = harness.parser("Measure how training scales to two ranks.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each side")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        rounds = [measure(Path(folder), number) for number in range(given.rounds)]
    details = {"rounds": rounds}
    harness.publish(
        "scaling",
        given,
        figures=figures(rounds),
        details=details,
        tables=tables,
        packages=["lightning"],
    )


# --- Runs ---------------------------------------------------------------------------------------------------


def prepare(folder: Path, shape: dict[str, Any] = SHAPE) -> None:
    """Draw shards, train a new model for a step and write a recipe of stage 1 that starts from it."""
    tiling = {"tile_size": shape["vision"]["image_size"]}
    for name, workload in WORKLOADS.items():
        images = draw_records(GlyphsConfig(max_tiles=workload.max_tiles), seed=1, start=0, count=64)
        write_shard(folder / name / "a.tar", images)
        write_index(folder / name)
        data = {
            "sources": [{"path": str(folder / name)}],
            "tiling": tiling,
            "micro_batch": {"max_tiles": workload.micro_batch},
        }
        recipe = {
            "stage": "consistency",
            "run_dir": "",
            "data": data,
            "model": {"path": f"{folder}/base/model"},
        }
        # A checkpoint takes as long for any number of ranks, and would be timed.
        trainer = {"accelerator": "cpu", "log_every": 1, "checkpoint_every": 1000}
        OmegaConf.save({**recipe, "trainer": trainer}, folder / f"{name}.yaml")
    base = {"stage": "pretrain", "run_dir": str(folder / "base"), "data": data, "model": shape}
    OmegaConf.save({**base, "trainer": {"accelerator": "cpu", "max_steps": 1}}, folder / "base.yaml")
    finish([[*TRAIN, str(folder / "base.yaml")]])


def finish(commands: Sequence[list[str]]) -> None:
    """Run commands in parallel.

    Raises:
        RuntimeError: one failed; the message holds what it said.
    """
    with ExitStack() as logs:
        files = [logs.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        running = [
            subprocess.Popen(command, stdout=file, stderr=file)
            for command, file in zip(commands, files, strict=True)
        ]
        codes = [process.wait() for process in running]
        for command, file, code in zip(commands, files, codes, strict=True):
            if code != 0:
                file.seek(0)
                raise RuntimeError(f"{' '.join(command)} failed:\n{file.read()}")


def measure(folder: Path, number: int) -> Round:
    """Return the seconds that each side of each workload took for the same samples."""
    return {name: measure_sides(folder, name, number) for name in WORKLOADS}


def measure_sides(folder: Path, workload: str, number: int) -> dict[str, float]:
    """Return the seconds of each side; every second round begins with the last."""
    sides = WORKLOADS[workload].sides
    order = list(sides) if number % 2 == 0 else list(sides)[::-1]
    taken = {side: seconds(folder, workload, f"{side}-{number}", sides[side]) for side in order}
    return {side: taken[side] for side in sides}


def seconds(folder: Path, workload: str, name: str, strategies: Sequence[str]) -> float:
    """Start runs together; returns the mean of the seconds that they took for the timed samples."""
    run_dirs = [folder / "runs" / f"{workload}-{name}-{number}" for number in range(len(strategies))]
    runs = list(zip(run_dirs, strategies, strict=True))
    finish([command(folder, workload, run_dir, strategy) for run_dir, strategy in runs])
    return mean(recorded(run_dir, num_ranks(strategy)) for run_dir, strategy in runs)


def num_ranks(strategy: str) -> int:
    """Return the ranks of a run."""
    return 1 if strategy == "auto" else 2


def command(folder: Path, workload: str, run_dir: Path, strategy: str) -> list[str]:
    """Return the command of a run over the samples common to all."""
    ranks = num_ranks(strategy)
    settings = {
        "run_dir": f"'{run_dir}'",
        "data.batch_size": WORKLOADS[workload].samples * ranks,
        "trainer.devices": ranks,
        "trainer.strategy": strategy,
        "trainer.max_steps": (WARM_UP + TIMED) * 2 // ranks,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return [*TRAIN, str(folder / f"{workload}.yaml"), *overrides]


def recorded(run_dir: Path, ranks: int) -> float:
    """Return the seconds between the records of the last warm-up step and of the last step."""
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    times = {event.step: event.wall_time for event in events.Scalars("consistency/loss")}
    return times[(WARM_UP + TIMED) * 2 // ranks - 1] - times[WARM_UP * 2 // ranks - 1]


# --- What they gave -----------------------------------------------------------------------------------------


def figures(rounds: Sequence[Round]) -> harness.Figures:
    """Return each figure with its goal."""
    sides = (("even", "two ranks"), ("uneven", "two ranks, DDP"), ("uneven", "two ranks, FSDP"))
    over_one = [
        median(taken[name]["one rank"] / taken[name][side] for taken in rounds) for name, side in sides
    ]
    return harness.figures_of(dict(zip(GOALS, over_one, strict=True)), GOALS)


def over_ceiling(rounds: Sequence[Round]) -> float:
    """Return the samples per second of two ranks over those of two runs side by side."""
    return median(taken["even"]["two runs"] / (2 * taken["even"]["two ranks"]) for taken in rounds)


def tables(content: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    rounds = content["rounds"]
    lines = [
        *harness.heading(content),
        *harness.figure_table(content["figures"], GOALS),
        f"| samples per second | {' | '.join(f'round {number + 1}' for number in range(len(rounds)))} |",
        f"|---|{'---|' * len(rounds)}",
        *(
            f"| {name}: {TITLES.get(side, side)} | {' | '.join(f'{speed:.2f}' for speed in speeds)} |"
            for name, workload in WORKLOADS.items()
            for side, runs in workload.sides.items()
            for speeds in [[2 * workload.samples * TIMED * len(runs) / taken[name][side] for taken in rounds]]
        ),
        "",
        f"Two ranks reach {over_ceiling(rounds):.2f} of what two runs side by side do.",
        *content.get("remarks", []),  # on recorded measurements, if circumstances differed
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
