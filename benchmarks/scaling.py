"""Weak scaling of stage 1 under DDP from one rank to two.

All runs are `vico train` with one thread per process on the same shards; times come from TensorBoard. A step
of two ranks takes the samples of two steps of one. Two independent runs of one rank show the limit of the
machine, whose caches and memory bandwidth two processes share.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any

import harness
from harness import Goal
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vico_pl.data.glyphs import GlyphsConfig, draw_records
from vico_pl.data.shards.reader import write_index, write_shard

GOALS = {"weak_scaling_2_ranks": Goal(1.7, at_least=True)}
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
SAMPLES = 6  # of each rank in a step
WARM_UP, TIMED = 1, 3  # steps of two ranks; one alone takes twice as many
ROUNDS = 2
TRAIN = [sys.executable, "-m", "vico_pl", "train"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Time one rank, two ranks and two runs of one rank in turn and write the results."""
    parser = harness.parser("Measure how training scales to two ranks.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each side")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        rounds = [measure(Path(folder), number) for number in range(given.rounds)]
    details = {"samples": 2 * SAMPLES * TIMED, "rounds": rounds}
    written = harness.write(
        "scaling",
        figures=figures(rounds),
        details=details,
        tables=tables,
        packages=["lightning"],
        output=given.output,
        page=given.page,
    )
    sys.stdout.write(tables(written))


# --- Runs ---------------------------------------------------------------------------------------------------


def prepare(folder: Path, shape: dict[str, Any] = SHAPE) -> None:
    """Draw shards, train a new model for a step and write a recipe of stage 1 that starts from it."""
    write_shard(
        folder / "shards" / "a.tar", draw_records(GlyphsConfig(max_tiles=2), seed=1, start=0, count=64)
    )
    write_index(folder / "shards")
    tiling = {"tile_size": shape["vision"]["image_size"]}
    data = {"sources": [{"path": str(folder / "shards")}], "batch_size": SAMPLES, "tiling": tiling}
    base = {"stage": "pretrain", "run_dir": str(folder / "base"), "data": data, "model": shape}
    OmegaConf.save({**base, "trainer": {"accelerator": "cpu", "max_steps": 1}}, folder / "base.yaml")
    finish([[*TRAIN, str(folder / "base.yaml")]])
    recipe = {"stage": "consistency", "run_dir": "", "data": data, "model": {"path": f"{folder}/base/model"}}
    # A checkpoint takes as long for any number of ranks, and would be timed.
    trainer = {"accelerator": "cpu", "log_every": 1, "checkpoint_every": 1000}
    OmegaConf.save({**recipe, "trainer": trainer}, folder / "recipe.yaml")


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


def measure(folder: Path, number: int) -> dict[str, float]:
    """Return the seconds that each side took for the same samples."""
    sides = {"one rank": {"alone": 1}, "two ranks": {"both": 2}, "two runs": {"left": 1, "right": 1}}
    order = list(sides) if number % 2 == 0 else list(sides)[::-1]
    taken = {side: seconds(folder, number, sides[side]) for side in order}
    return {side: taken[side] for side in sides}


def seconds(folder: Path, number: int, ranks: dict[str, int]) -> float:
    """Start runs together; returns the mean of the seconds that they took for the timed samples."""
    run_dirs = {folder / f"{name}-{number}": num_ranks for name, num_ranks in ranks.items()}
    finish([command(folder, run_dir, num_ranks) for run_dir, num_ranks in run_dirs.items()])
    return mean(recorded(run_dir, num_ranks) for run_dir, num_ranks in run_dirs.items())


def command(folder: Path, run_dir: Path, num_ranks: int) -> list[str]:
    """Return the command of a run over the samples common to all."""
    steps = (WARM_UP + TIMED) * 2 // num_ranks
    settings = {
        "run_dir": run_dir,
        "data.batch_size": SAMPLES * num_ranks,
        "trainer.devices": num_ranks,
        "trainer.strategy": "ddp" if num_ranks > 1 else "auto",
        "trainer.max_steps": steps,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return [*TRAIN, str(folder / "recipe.yaml"), *overrides]


def recorded(run_dir: Path, num_ranks: int) -> float:
    """Return the seconds between the records of the last warm-up step and of the last step."""
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    times = {event.step: event.wall_time for event in events.Scalars("consistency/loss")}
    return times[(WARM_UP + TIMED) * 2 // num_ranks - 1] - times[WARM_UP * 2 // num_ranks - 1]


# --- What they gave -----------------------------------------------------------------------------------------


def figures(rounds: Sequence[dict[str, float]]) -> harness.Figures:
    """Return each figure with its goal."""
    scaling = median(taken["one rank"] / taken["two ranks"] for taken in rounds)
    return harness.figures_of({"weak_scaling_2_ranks": scaling}, GOALS)


def over_ceiling(rounds: Sequence[dict[str, float]]) -> float:
    """Return the samples per second of two ranks over those of two runs side by side."""
    return median(taken["two runs"] / (2 * taken["two ranks"]) for taken in rounds)


def tables(content: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    rows = [
        f"| {name} | {' | '.join(f'{num_samples / taken[side]:.2f}' for taken in content['rounds'])} |"
        for name, side, num_samples in (
            ("one rank", "one rank", content["samples"]),
            ("two ranks", "two ranks", content["samples"]),
            ("two runs of one rank side by side, together", "two runs", 2 * content["samples"]),
        )
    ]
    numbers = range(1, len(content["rounds"]) + 1)
    lines = [
        *harness.heading(content),
        *harness.figure_table(content["figures"], GOALS),
        f"| samples per second | {' | '.join(f'round {number}' for number in numbers)} |",
        f"|---|{'---|' * len(content['rounds'])}",
        *rows,
        "",
        f"Two ranks reach {over_ceiling(content['rounds']):.2f} of what two runs side by side do.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
