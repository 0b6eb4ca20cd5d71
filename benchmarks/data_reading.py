"""Reading raw records from tars in the page cache: ours by index, webdataset and bare reads."""

import itertools
import os
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from data_turns import Round, speedup, take_turns, time_rows

from vico_pl.data.order import SampleOrder, SourceShape
from vico_pl.data.shards.reader import RecordReader, read_index, write_index, write_shard

IMAGE_BYTES = 160_000  # about a JPEG of one megapixel
TEXT = b'{"conversations": [' + b" " * 1000 + b"]}"
BUFFER_BYTES = 2**20
TITLES = {
    "ours": "`RecordReader`, shuffled",
    "ours_in_order": "the same, with `SampleOrder` to say which record is next",
    "webdataset": "webdataset, as the records lie",
    "webdataset_shuffled": "the same, `shuffle(1000)`",
    "pread": "bare `pread()` of each record's bytes, shuffled",
    "read": "`read()` of the same bytes into one buffer of 1 MiB",
}


def measure_reading(folder: Path, *, shards: int, samples: int, rounds: int) -> list[Round]:
    """Write a set into a folder and return rounds of seconds for all its records."""
    write_set(folder, shards=shards, samples=samples)
    return take_turns(runs_of(folder), rounds=rounds)


def reading_figures(rounds: list[Round]) -> dict[str, float]:
    """Return our speed over that of webdataset and of bare reads."""
    return {
        "raw_over_webdataset": speedup(rounds, "webdataset"),
        "raw_over_read": speedup(rounds, "read"),
    }


def reading_table(rounds: list[Round], *, records: int) -> list[str]:
    """Return the table of times."""
    title = f"raw records of {(IMAGE_BYTES + len(TEXT)) / 1000:.0f} kB"
    return [
        f"| {title} | ms (lowest to highest) | records/s |",
        "|---|---|---|",
        *time_rows(rounds, TITLES, repeats=records),
        "",
    ]


def write_set(folder: Path, *, shards: int, samples: int) -> None:
    """Write shards of records with a noise image and a text."""
    generator = np.random.default_rng(0)
    for number in range(shards):
        names = (f"{number:03d}-{sample:06d}" for sample in range(samples))
        files = ({"jpg": generator.bytes(IMAGE_BYTES), "json": TEXT} for _ in range(samples))
        write_shard(folder / f"raw-{number:06d}.tar", zip(names, files, strict=True))
    write_index(folder)


def runs_of(folder: Path) -> dict[str, Callable[[], object]]:
    """Return the implementations by name."""
    paths = sorted(str(path) for path in folder.glob("*.tar"))
    index = read_index(folder)
    reader = RecordReader(index)
    shape = SourceShape(shard_sizes=tuple(index.shard_sizes))
    order = SampleOrder(sources=[shape], source_ends=[None], seed=0)
    shuffled = [order(position).sample for position in range(index.num_samples)]
    runs: dict[str, Callable[[], object]] = {
        "ours": partial(_read_ours, reader, shuffled),
        "ours_in_order": partial(_read_in_order, reader, order, len(shuffled)),
        "webdataset": partial(_read_webdataset, paths),
        "webdataset_shuffled": partial(_read_webdataset, paths, shuffle=1000),
        "pread": partial(_pread_bytes, _shuffled_ranges(paths)),
        "read": partial(_read_bytes, paths),
    }
    counts = {name: run() for name, run in runs.items() if "read" not in name}
    if set(counts.values()) != {len(shuffled) * (IMAGE_BYTES + len(TEXT))}:
        raise RuntimeError(f"not all gave the bytes of {len(shuffled)} records: {counts}")
    return runs


def _read_ours(reader: RecordReader, samples: list[int]) -> int:
    return sum(_num_bytes(reader(sample).files) for sample in samples)


def _read_in_order(reader: RecordReader, order: SampleOrder, count: int) -> int:
    places = map(order, range(count))
    return sum(_num_bytes(reader(place.sample).files) for place in places)


def _read_webdataset(paths: list[str], shuffle: int = 0) -> int:
    samples = wds.WebDataset(paths, shardshuffle=False, empty_check=False)
    if shuffle:
        samples = samples.shuffle(shuffle)
    return sum(_num_bytes(sample) for sample in samples)


def _num_bytes(files: Mapping[str, Any]) -> int:
    return len(files["jpg"]) + len(files["json"])


def _shuffled_ranges(paths: list[str]) -> list[tuple[str, int, int]]:
    """Return (path, first byte, number of bytes) of all records."""
    bounds = {path: np.load(Path(path).with_suffix(".idx"))[:, 0].tolist() for path in paths}
    ranges = [(path, a, b - a) for path in paths for a, b in itertools.pairwise(bounds[path])]
    random.Random(0).shuffle(ranges)
    return ranges


def _pread_bytes(ranges: list[tuple[str, int, int]]) -> int:
    files = {path: os.open(path, os.O_RDONLY) for path in {path for path, _, _ in ranges}}
    total = sum(len(os.pread(files[path], count, start)) for path, start, count in ranges)
    for descriptor in files.values():
        os.close(descriptor)
    return total


def _read_bytes(paths: list[str]) -> int:
    buffer, total = bytearray(BUFFER_BYTES), 0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        while count := os.readv(descriptor, [buffer]):
            total += count
        os.close(descriptor)
    return total
