"""The whole path from shards to rank batches: resume time, padding and memory growth.

Resume times are wall-clock times. Memory is measured in a separate process:
`python benchmarks/data_pipeline.py --measure memory FOLDER --epochs N`.
"""

import ctypes
import gc
import json
import os
import re
import sys
import time
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import harness
import numpy as np
from data_images import draw_jpeg

from vico_pl.data.module import DataConfig, DataModule, RankBatches, SourceConfig
from vico_pl.data.shards.index import INDEX_NAME
from vico_pl.data.shards.reader import write_index, write_shard
from vico_pl.data.tiling import TilingConfig
from vico_pl.tokens import build_tokenizer
from vico_pl.types import Batch, RankBatch

POINTS = (0.01, 0.5, 0.99)  # of an epoch
WORLD, BATCH = 8, 64  # ranks, and samples of a global batch
TOKENS_PER_TILE = 256
SHAPES = ((800, 640), (640, 800), (900, 300), (300, 900), (500, 500), (1200, 400), (700, 500))  # px
SCRIPT = Path(__file__)


# --- Sets ---------------------------------------------------------------------------------------------------


def write_photos(folder: Path, *, samples: int, bad: int = 0) -> None:
    """Write a set with images of several shapes; every tenth sample is text-only, the last `bad` are bad."""
    images = [draw_jpeg(seed, width=width, height=height) for seed, (width, height) in enumerate(SHAPES)]
    records = [_record(number, images) for number in range(samples)]
    for key, files in records[len(records) - bad :]:
        records[int(key)] = (key, {**files, "json": b"{"})
    for start in range(0, samples, 32):
        write_shard(folder / f"photos-{start:06d}.tar", records[start : start + 32])
    write_index(folder)


def write_many(folder: Path, *, shards: int, samples: int) -> None:
    """Write a text-only set with many samples; all shards are links to one tar."""
    first = folder / "first"
    write_shard(first / "many-000000.tar", (_record(number, []) for number in range(samples)))
    write_index(first)
    index = json.loads((first / INDEX_NAME).read_text())
    (entry,), files = index["shards"], [path for path in first.iterdir() if path.name != INDEX_NAME]
    index["shards"] = []
    for shard in range(shards):
        for path in files:
            os.link(path, folder / f"many-{shard:06d}{path.suffix}")
        index["shards"].append({**entry, "name": f"many-{shard:06d}.tar"})
    (folder / INDEX_NAME).write_text(json.dumps(index))


def _record(number: int, images: list[bytes]) -> tuple[str, dict[str, bytes]]:
    has_image = bool(images) and number % 10 != 0
    words = int(np.random.default_rng(number).lognormal(np.log(40), 0.9))
    turns = [
        {"from": "human", "value": f"{'<image>' * has_image} What is it?"},
        {"from": "gpt", "value": "a thing " * words},
    ]
    files = {"jpg": images[number % len(images)]} if has_image else {}
    return f"{number:06d}", {**files, "json": json.dumps({"conversations": turns}).encode()}


def open_module(folder: Path, *, tile_size: int = 448) -> DataModule:
    """Open a set as the trainer does."""
    config = DataConfig(
        sources=[SourceConfig(path=str(folder))],
        batch_size=BATCH,
        num_workers=0,
        tiling=TilingConfig(tile_size=tile_size),
    )
    tokenizer = build_tokenizer(["What is it? a thing"], vocab_size=300)
    return DataModule(config, tokenizer=tokenizer, full_tokens_per_tile=TOKENS_PER_TILE, seed=0)


# --- Resuming -----------------------------------------------------------------------------------------------


def measure_resume(folder: Path, *, samples: int, repeats: int = 3) -> dict[str, float]:
    """Return seconds from opening a set to the first batch of rank 0 of 8, by position in the epoch."""
    places = {f"{point:.0%}": int(point * samples) // BATCH for point in POINTS}
    return {
        name: median(_seconds_to_resume(folder, first_step=step) for _ in range(repeats))
        for name, step in places.items()
    }


def _seconds_to_resume(folder: Path, *, first_step: int) -> float:
    start = time.perf_counter()
    batch = next(iter(RankBatches(open_module(folder), first_step=first_step, rank=0, world=WORLD)))
    taken = time.perf_counter() - start
    if not batch.ids:
        raise RuntimeError(f"no sample in step {first_step}")
    return taken


# --- Padding ------------------------------------------------------------------------------------------------


def measure_padding(folder: Path, *, steps: int) -> dict[str, int]:
    """Count the tokens of all micro-batches of 8 ranks at full vision tokens, and those of no sample.

    Ranks run as many micro-batches as the one with most, with the dummy where they have none left.
    """
    module = open_module(folder, tile_size=32)  # the tile size does not matter here
    ranks = [iter(RankBatches(module, first_step=0, rank=rank, world=WORLD)) for rank in range(WORLD)]
    counts = {"tokens": 0, "wasted": 0, "micro_batches": 0}
    for _ in range(steps):
        for micro_batch in _micro_batches([next(rank) for rank in ranks]):
            tokens = _tokens(micro_batch)
            useful = sum(
                n for n, position in zip(tokens, micro_batch.positions, strict=True) if position >= 0
            )
            total = len(micro_batch.input_ids) + micro_batch.num_tiles * (TOKENS_PER_TILE - 1)
            counts["tokens"] += total
            counts["wasted"] += total - useful
            counts["micro_batches"] += 1
    return counts


def _micro_batches(batches: list[RankBatch]) -> Iterator[Batch]:
    longest = max(len(batch.micro_batches) for batch in batches)
    for batch in batches:
        yield from batch.padded(longest)


def _tokens(micro_batch: Batch) -> list[int]:
    """Return the tokens of each sample of a micro-batch at full vision tokens."""
    lengths = zip(micro_batch.sample_lengths.tolist(), micro_batch.tiles_per_image, strict=True)
    return [length + sum(tiles) * (TOKENS_PER_TILE - 1) for length, tiles in lengths]


# --- Memory -------------------------------------------------------------------------------------------------


def measure_memory(folder: Path, *, samples: int, epochs: int) -> list[float]:
    """Return the memory of a separate process after each epoch, in MiB."""
    settings = (str(folder), f"--samples={samples}", f"--epochs={epochs}")
    held: Any = harness.measure_apart(SCRIPT, "memory", *settings)["mib"]  # a list
    return held


def watch_memory(folder: Path, *, samples: int, epochs: int) -> list[float]:
    """Read a set repeatedly as one rank and return MiB held after each epoch."""
    batches = iter(RankBatches(open_module(folder), first_step=0, rank=0, world=1))
    held = []
    for _ in range(epochs):
        for _ in islice(batches, samples // BATCH):
            pass
        held.append(resident_mib())
    return held


def memory_growth(held: list[float]) -> float:
    """Return the maximum over later epochs minus the memory after the second."""
    return max(0.0, *(mib - held[1] for mib in held[2:]))


def resident_mib() -> float:
    """Return the resident memory of this process after freed memory is returned to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    (kib,) = re.findall(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kib) / 1024


def main() -> None:
    """Measure memory and print it."""
    parser = ArgumentParser(description="Measure the memory of a run over a set.")
    parser.add_argument("--measure", choices=["memory"], required=True)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    held = watch_memory(given.folder, samples=given.samples, epochs=given.epochs)
    sys.stdout.write(json.dumps({"mib": held}))


if __name__ == "__main__":
    main()
