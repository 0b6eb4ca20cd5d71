"""Shuffling quality: distinct shards per batch, for our loader and public tools on the same samples.

Each loader reads the same numbered samples, in its own format if it has one, in a separate process:
`python benchmarks/data_shuffle.py --measure NAME FOLDER` prints the distinct shards per batch.
The table names tools that are not installed.
"""

import json
import os
import random
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import harness
import numpy as np
import webdataset as wds

from vico_pl.data.order import SampleOrder, SourceShape
from vico_pl.data.shards.reader import write_index, write_shard

SHARDS, SAMPLES, BATCH = 64, 200, 32  # samples of a shard, and of a batch
MDS_BYTES = 2576  # of a file of mosaicml-streaming with so many numbers
TOTAL = SHARDS * SAMPLES
IDEAL = SHARDS * (1 - (1 - 1 / SHARDS) ** BATCH)  # distinct shards among draws with replacement: 25.3
WINDOW = 8  # shards
TITLES = {
    "ours": "`SampleOrder`, the whole set permuted",
    "ours_window": f"`SampleOrder`, {WINDOW} shards at a time, for shards that are fetched whole",
    "webdataset": "webdataset, shards shuffled, `shuffle(1000)`",
    "energon": "Megatron Energon, shuffle buffer of 1000, one worker",
    "litdata": "litdata, `shuffle=True`, one worker",
    "mosaicml": "mosaicml-streaming, `shuffle=True` (py1e), one worker",
}
MODULES = {"energon": "megatron.energon", "litdata": "litdata", "mosaicml": "streaming"}
PACKAGES = ("megatron-energon", "litdata", "mosaicml-streaming")
SCRIPT = Path(__file__)


def measure_shuffle(names: Sequence[str] = tuple(TITLES)) -> dict[str, float | None]:
    """Return distinct shards per batch over an epoch, by loader; None if not installed."""
    measured: dict[str, float | None] = {}
    for name in names:
        with TemporaryDirectory() as folder:
            apart = partial(harness.measure_apart, SCRIPT, name, folder)
            measured[name] = apart()["distinct_shards"] if is_installed(name) else None
    return measured


def shuffle_figures(measured: dict[str, float | None]) -> dict[str, float]:
    """Return ours over the ideal."""
    ours = measured["ours"]
    assert ours is not None  # it needs no tool
    return {"shuffle_distinct_shards_over_ideal": ours / IDEAL}


def shuffle_table(measured: dict[str, float | None]) -> list[str]:
    """Return the table of loaders."""
    return [
        f"| {SHARDS} shards of {SAMPLES} samples, batches of {BATCH} | distinct shards | of the ideal |",
        "|---|---|---|",
        f"| drawing at random | {IDEAL:.1f} | 100 % |",
        *(_row(TITLES[name], distinct) for name, distinct in measured.items()),
        "",
    ]


def distinct_shards(samples: Iterable[int]) -> float:
    """Return the mean number of distinct shards per full batch of an epoch.

    Raises:
        RuntimeError: a sample is missing or comes twice.
    """
    order = np.fromiter(samples, dtype=np.int64)
    if sorted(order.tolist()) != list(range(TOTAL)):
        raise RuntimeError(
            f"an epoch of {len(order)} samples, {len(set(order.tolist()))} of {TOTAL} distinct"
        )
    batches = (order // SAMPLES)[: TOTAL // BATCH * BATCH].reshape(-1, BATCH)
    return float(np.mean([len(set(batch)) for batch in batches.tolist()]))


def is_installed(name: str) -> bool:
    """Return whether a loader is installed."""
    try:
        return name not in MODULES or find_spec(MODULES[name]) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _row(title: str, distinct: float | None) -> str:
    if distinct is None:
        return f"| {title} | not installed here | |"
    return f"| {title} | {distinct:.1f} | {100 * distinct / IDEAL:.0f} % |"


# --- Loaders: each yields the numbers of an epoch's samples in the order it gives them ----------------------


def ours(_: Path, *, window: int | None = None) -> Iterator[int]:
    """Our order; sample i is the i-th of the set."""
    shape = SourceShape(shard_sizes=(SAMPLES,) * SHARDS, window=window)
    order = SampleOrder(sources=[shape], source_ends=[None], seed=0)
    return (order(position).sample for position in range(TOTAL))


def webdataset(folder: Path) -> Iterator[int]:
    """Webdataset as its documentation proposes for training."""
    samples = wds.WebDataset(write_tars(folder), shardshuffle=SHARDS, seed=0)
    samples = samples.shuffle(1000, rng=random.Random(0))
    return (int(sample["txt"]) for sample in samples)


def energon(folder: Path) -> Iterator[int]:
    """Megatron Energon on the same tars."""
    from megatron import energon as me
    from megatron.energon.cli.main import main as cli
    from megatron.energon.task_encoder.base import stateless

    write_tars(folder)
    prepare = "--non-interactive --split-ratio 1,0,0 --sample-type CrudeWebdataset --num-workers 1"
    cli(["prepare", str(folder), *prepare.split()], standalone_mode=False)

    class Numbers(me.DefaultTaskEncoder):
        decoder = None
        cookers = (me.Cooker(stateless(lambda sample: sample)),)

        @stateless
        def encode_sample(self, sample: dict[str, bytes]) -> int:
            return int(sample["txt"])

        def batch(self, samples: list[int]) -> list[int]:
            return samples

    worker = me.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = me.get_train_dataset(
        folder,
        batch_size=BATCH,
        shuffle_buffer_size=1000,
        max_samples_per_sequence=100,
        worker_config=worker,
        task_encoder=Numbers(),
        repeat=False,
    )
    return (number for batch in me.get_loader(dataset) for number in batch)


def litdata(folder: Path) -> Iterator[int]:
    """Lightning's litdata; one chunk holds what a shard does."""
    from litdata import StreamingDataset
    from litdata.streaming import Cache

    cache = Cache(str(folder), chunk_size=SAMPLES)
    for number in range(TOTAL):
        cache[number] = {"number": number}
    cache.done()
    cache.merge()
    return (int(sample["number"]) for sample in StreamingDataset(str(folder), shuffle=True, seed=0))


def mosaicml(folder: Path) -> Iterator[int]:
    """MosaicML's streaming; a file holds what a shard does."""
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    with MDSWriter(out=str(folder), columns={"number": "int"}, size_limit=MDS_BYTES) as writer:
        for number in range(TOTAL):
            writer.write({"number": number})
    shards = json.loads((folder / "index.json").read_text())["shards"]
    if [shard["samples"] for shard in shards] != [SAMPLES] * SHARDS:
        raise RuntimeError(f"{len(shards)} shards, the first of {shards[0]['samples']} samples")
    dataset = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=0, batch_size=BATCH)
    return (int(sample["number"]) for sample in dataset)


def write_tars(folder: Path) -> list[str]:
    """Write the samples as tars and return their paths."""
    for shard in range(SHARDS):
        numbers = range(shard * SAMPLES, (shard + 1) * SAMPLES)
        records = ((f"{number:07d}", {"txt": str(number).encode()}) for number in numbers)
        write_shard(folder / f"numbers-{shard:06d}.tar", records)
    write_index(folder)
    return sorted(str(path) for path in folder.glob("*.tar"))


LOADERS: dict[str, Callable[[Path], Iterator[int]]] = {
    "ours": ours,
    "ours_window": partial(ours, window=WINDOW),
    "webdataset": webdataset,
    "energon": energon,
    "litdata": litdata,
    "mosaicml": mosaicml,
}


def main() -> None:
    """Run one loader and print its distinct shards per batch."""
    parser = ArgumentParser(description="Measure how well one loader mixes.")
    parser.add_argument("--measure", choices=LOADERS, required=True)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    printed = os.dup(1)
    os.dup2(2, 1)  # what tools print goes where errors go
    distinct = distinct_shards(LOADERS[given.measure](given.folder))
    os.write(printed, json.dumps({"distinct_shards": distinct}).encode())
    sys.stderr.flush()


if __name__ == "__main__":
    main()
