"""Data path against public tools: speed, shuffling, load balance, resume time, padding and memory.

`make bench` runs it in about two minutes; temporary data sets take 1 GiB of disk. The parts:

    data_images.py      JPEG to tiles, against InternVL's recipe and transformers' processor
    data_reading.py     raw records from tars, against webdataset and bare reads
    data_shuffle.py     distinct shards per batch, ours and four public loaders
    data_pipeline.py    resume time, padding and memory growth of the whole path
    data_batches.py     load balance of simulated ranks
"""

import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import data_batches as batches
import data_images as images
import data_pipeline as pipeline
import data_reading as reading
import data_shuffle as shuffle
import harness
import torch
from data_turns import keep_freed_memory
from harness import Figures, Goal

GOALS: harness.Goals = {
    "tiles_5_over_internvl": Goal(4.0, at_least=True),
    "tiles_5_over_transformers_fast": Goal(1.6, at_least=True),
    "tiles_5_over_sum_of_stages": Goal(0.75, at_least=True),
    "tiles_13_over_internvl": Goal(4.0, at_least=True),
    "tiles_13_over_transformers_fast": Goal(1.6, at_least=True),
    "tiles_13_over_sum_of_stages": Goal(0.75, at_least=True),
    "raw_over_webdataset": None,  # reported: decoding a record takes 200 times as long as reading it
    "raw_over_read": None,
    "shuffle_distinct_shards_over_ideal": Goal(0.95, at_least=True),
    "resume_seconds_worst": Goal(1.0),
    "padding_fraction": Goal(0.01),
    "parallel_efficiency_64_1b": Goal(0.97, at_least=True),
    "parallel_efficiency_64_8b": Goal(0.97, at_least=True),
    "parallel_efficiency_64_1b_in_step": Goal(0.97, at_least=True),
    "parallel_efficiency_64_8b_in_step": Goal(0.94, at_least=True),
    "memory_growth_20_epochs": Goal(8.0),
}
PACKAGES = ("torchvision", "pillow", "transformers", "webdataset", *shuffle.PACKAGES)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the measurements."""

    rounds: int = 9  # of each timed comparison
    images: int = 8
    raw_shards: int = 4  # of 161 kB records; together larger than the processor's caches
    raw_samples: int = 1000  # of each shard
    many_shards: int = 400  # of the large set for resuming
    many_samples: int = 5000  # of each shard
    photos: int = 640  # samples of the set for the whole path
    steps: int = 20  # of the simulated ranks; half as many when padding is counted
    watched: int = 64  # samples of an epoch while memory is watched
    epochs: int = 20
    loaders: int = len(shuffle.TITLES)  # number of loaders to run


# --- All of it ----------------------------------------------------------------------------------------------


def measure(size: Size) -> dict[str, Any]:
    """Measure everything in temporary folders."""
    return {
        "tiles": images.measure_tiles(images=size.images, rounds=size.rounds),
        "reading": _reading(size),
        "shuffle": shuffle.measure_shuffle(list(shuffle.TITLES)[: size.loaders]),
        "efficiency": batches.measure_efficiency(steps=size.steps),
        **_pipeline(size),
    }


def _reading(size: Size) -> list[dict[str, float]]:
    shape = {"shards": size.raw_shards, "samples": size.raw_samples}
    with TemporaryDirectory() as folder:
        return reading.measure_reading(Path(folder), rounds=size.rounds, **shape)


def _pipeline(size: Size) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        photos, many, watched = (Path(folder) / name for name in ("photos", "many", "watched"))
        pipeline.write_photos(photos, samples=size.photos)
        pipeline.write_many(many, shards=size.many_shards, samples=size.many_samples)
        pipeline.write_photos(watched, samples=size.watched, bad=2)
        num_many = size.many_shards * size.many_samples
        return {
            "resume": {
                f"{size.photos:,} photos": pipeline.measure_resume(photos, samples=size.photos),
                f"{num_many:,} texts": pipeline.measure_resume(many, samples=num_many),
            },
            "padding": pipeline.measure_padding(photos, steps=size.steps // 2),
            "memory_mib": pipeline.measure_memory(watched, samples=size.watched, epochs=size.epochs),
        }


def figures(measured: dict[str, Any]) -> Figures:
    """Return each figure with its goal."""
    padding = measured["padding"]
    return harness.figures_of(
        {
            **images.tile_figures(measured["tiles"]),
            **reading.reading_figures(measured["reading"]),
            **shuffle.shuffle_figures(measured["shuffle"]),
            "resume_seconds_worst": max(max(points.values()) for points in measured["resume"].values()),
            "padding_fraction": padding["wasted"] / padding["tokens"],
            **batches.efficiency_figures(measured["efficiency"]),
            "memory_growth_20_epochs": pipeline.memory_growth(measured["memory_mib"]),
        },
        GOALS,
    )


# --- Output -------------------------------------------------------------------------------------------------


def tables(content: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    size = content["size"]
    lines = [
        *harness.heading(content),
        *harness.figure_table(content["figures"], GOALS),
        *images.tile_table(content["tiles"], images=size["images"]),
        *reading.reading_table(content["reading"], records=size["raw_shards"] * size["raw_samples"]),
        *shuffle.shuffle_table(content["shuffle"]),
        *batches.efficiency_table(content["efficiency"]),
        *_resume_table(content["resume"]),
        _padding_sentence(content["padding"]),
        _memory_sentence(content["memory_mib"]),
    ]
    return "\n".join(lines) + "\n"


def _resume_table(resume: dict[str, dict[str, float]]) -> list[str]:
    points = list(next(iter(resume.values())))
    return [
        f"| seconds to the first batch, resumed at | {' | '.join(points)} |",
        "|---" * (1 + len(points)) + "|",
        *(f"| {name} | {' | '.join(map('{:.3f}'.format, ts.values()))} |" for name, ts in resume.items()),
        "",
    ]


def _padding_sentence(padding: dict[str, int]) -> str:
    wasted, tokens, count = padding["wasted"], padding["tokens"], padding["micro_batches"]
    return f"Padding: {wasted:,} of {tokens:,} tokens in {count} micro-batches belong to no sample."


def _memory_sentence(mib: list[float]) -> str:
    return (
        f"Memory of a process that reads a set {len(mib)} times: {mib[1]:.1f} MiB after the second, "
        f"{min(mib[2:]):.1f} to {max(mib[2:]):.1f} MiB after later ones."
    )


def command(size: Size) -> str:
    """Return the command that measures these sizes."""
    changed = [f"--{key}={value}" for key, value in asdict(size).items() if value != getattr(Size(), key)]
    return " ".join(["python benchmarks/data.py", *changed]) if changed else harness.ALL


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    """Read the command line."""
    parser = harness.parser("Measure the data path.")
    for key, value in asdict(Size()).items():
        parser.add_argument(f"--{key}", type=int, default=value, help=f"default {value}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and write the results."""
    given = parse(arguments)
    size = Size(**{key: getattr(given, key) for key in asdict(Size())})
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.simplefilter("ignore")
    measured = measure(size)
    harness.publish(
        "data",
        given,
        figures=figures(measured),
        details={"size": asdict(size), **measured},
        tables=tables,
        command=command(size),
        packages=PACKAGES,
    )


if __name__ == "__main__":
    main()
