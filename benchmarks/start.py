"""How long a rank takes to open a large set of shards and to assign the samples of its first step.

The set is made up: `index.json`, and links to a sparse tar and to its sidecar. Records are not read: that
takes as long in any set. Times are wall-clock, in a new process after its imports.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import Goal
from transformers import AutoTokenizer

from vico_pl.data.module import DataConfig, DataModule, RankBatches, SourceConfig
from vico_pl.data.shards.index import INDEX_NAME, ShardEntry, write_entries, write_sidecar

GOALS: harness.Goals = {
    "start_seconds_1e5_shards": Goal(10.0),
    "start_rss_gib_1e5_shards": Goal(1.0),
    "assign_seconds_1024_ranks": None,  # reported
}
SHARDS, SAMPLES, RECORD_BYTES = 100_000, 10_000, 100_000  # samples of a shard, bytes of a sample
WORLD, BATCH_SIZE, ROUNDS = 64, 1024, 3
MANY, SAMPLES_PER_RANK = 1024, 8  # ranks, for a step after the first
MAX_LINKS = 30_000  # to a file, of which file systems allow 65,000 and less
STEPS = {"opened": "open the set: `DataModule`", "assigned": "assign the samples of a step: `rank_positions`"}
BASE = harness.FOLDER.parent / "data" / "base"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in new processes and write the results; with --measure, measure in this one."""
    parser = harness.parser("Measure how long a rank takes to open a large set of shards.")
    parser.add_argument("--shards", type=int, default=SHARDS)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of a shard")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.measure is not None:
        sys.stdout.write(json.dumps(measure(given.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder), shards=given.shards, samples=given.samples)
        rounds = [harness.measure_apart(__file__, folder) for _ in range(given.rounds)]
    details = {"shards": given.shards, "samples": given.samples, "rounds": rounds}
    harness.publish(
        "start",
        given,
        figures=figures(rounds),
        details=details,
        tables=tables,
    )


def write_set(folder: Path, *, shards: int, samples: int) -> None:
    """Write a set whose tars are holes."""
    sizes = np.random.default_rng(0).integers(1, 2000, (samples + 1, 4))
    sizes[-1] = 0
    table = np.column_stack([np.arange(samples + 1) * RECORD_BYTES, sizes])
    names = [f"train-{number:06d}" for number in range(shards)]
    for number, name in enumerate(names):
        first = folder / names[number - number % MAX_LINKS]
        if first.name == name:
            write_sidecar(table, first.with_suffix(".tar"))
            with first.with_suffix(".tar").open("wb") as file:
                file.truncate(samples * RECORD_BYTES + 1024)
        else:
            for ending in (".tar", ".idx"):
                os.link(f"{first}{ending}", f"{folder / name}{ending}")
    size, digest = samples * RECORD_BYTES + 1024, "0" * 64
    entries = [ShardEntry(f"{name}.tar", samples, size, digest) for name in names]
    write_entries(entries, folder / INDEX_NAME, has_sizes=True)


def measure(folder: Path) -> dict[str, float]:
    """Open a set as one of many ranks; return seconds to the end of each of `STEPS`, and the peak memory.

    `of_many` are the seconds that a worker of one of `MANY` ranks takes for a step.
    """
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    config = DataConfig(sources=[SourceConfig(path=str(folder))], batch_size=BATCH_SIZE)
    start = time.perf_counter()
    data = DataModule(config, tokenizer=tokenizer, full_tokens_per_tile=256, seed=0)
    opened = time.perf_counter() - start
    batches = RankBatches(data, first_step=0, rank=0, world=WORLD)
    positions, _ = batches.rank_positions(0)
    assigned = time.perf_counter() - start
    if not positions:
        raise RuntimeError(f"rank 0 of {WORLD} got none of {BATCH_SIZE} samples")
    found = {"opened": opened, "assigned": assigned, "peak_gib": harness.peak_gib()}
    data.config = replace(config, batch_size=MANY * SAMPLES_PER_RANK)
    many = RankBatches(data, first_step=0, rank=0, world=MANY)
    many.rank_positions(0)
    start = time.perf_counter()
    many.rank_positions(1)
    return {**found, "of_many": time.perf_counter() - start}


def figures(rounds: Sequence[dict[str, float]]) -> harness.Figures:
    """Return each figure with its goal: the worst of the rounds."""
    worst = [max(found[name] for found in rounds) for name in ("assigned", "peak_gib", "of_many")]
    return harness.figures_of(dict(zip(GOALS, worst, strict=True)), GOALS)


def tables(content: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    num_samples = content["shards"] * content["samples"]
    columns = " | ".join(f"round {number}" for number in range(1, len(content["rounds"]) + 1))
    rows = [
        f"| {title}, s after the start | {' | '.join(f'{found[name]:.2f}' for found in content['rounds'])} |"
        for name, title in STEPS.items()
    ]
    many = " | ".join(f"{found['of_many']:.2f}" for found in content["rounds"])
    peaks = " | ".join(f"{found['peak_gib']:.2f}" for found in content["rounds"])
    lines = [
        f"{content['shards']:,} shards, {num_samples:,} samples; rank 0 of {WORLD}, {BATCH_SIZE} per step;",
        *harness.heading(content),
        *harness.figure_table(content["figures"], GOALS),
        f"| a new process | {columns} |",
        "|---" * (len(content["rounds"]) + 1) + "|",
        *rows,
        f"| a later step as one of {MANY:,} ranks, {SAMPLES_PER_RANK} samples each, s | {many} |",
        f"| peak memory of the process, GiB | {peaks} |",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
