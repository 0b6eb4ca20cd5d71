"""Writing sets of shards: several processes, whole shards or none; an interrupted set is continued."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from threading import Thread

from tqdm import tqdm

from vico_pl.data.glyphs import GlyphsConfig, draw_records
from vico_pl.data.shards import INDEX_NAME, ShardIndex, read_index, side_index_path, write_index, write_shard


def build_glyphs(
    folder: Path, config: GlyphsConfig, *, num_samples: int, seed: int, samples_per_shard: int
) -> ShardIndex:
    """Draw GlyphDocs shards."""
    write = partial(_write_glyph_shard, config=config, seed=seed)
    return build_set(folder, write, num_samples=num_samples, samples_per_shard=samples_per_shard)


def build_set(
    folder: Path, write: Callable[[Path, int, int], None], *, num_samples: int, samples_per_shard: int
) -> ShardIndex:
    """Write a set of shards with `write(path, first sample, count)`; shards that are already whole are kept.

    Raises:
        ValueError: the folder already holds a whole set of another size.
    """
    if (folder / INDEX_NAME).exists():
        index = read_index(folder)
        if index.num_samples != num_samples:
            raise ValueError(
                f"{folder}: already holds {index.num_samples} samples, not {num_samples}; remove it"
            )
        return index
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.partial"):  # of a process that was killed
        leftover.unlink()
    starts = range(0, num_samples, samples_per_shard)
    jobs = [(folder / f"{folder.name}-{i:06d}.tar", start) for i, start in enumerate(starts)]
    todo = [(path, start) for path, start in jobs if not (path.exists() and side_index_path(path).exists())]
    counts = [min(samples_per_shard, num_samples - start) for _, start in todo]
    pool = ProcessPoolExecutor(os.cpu_count(), initializer=_end_with_parent, initargs=(os.getpid(),))
    with tqdm(total=len(jobs), desc=str(folder), unit="shard") as bar:
        bar.update(len(jobs) - len(todo))
        try:
            for _ in pool.map(write, [path for path, _ in todo], [start for _, start in todo], counts):
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    return write_index(folder)


def _end_with_parent(parent: int) -> None:
    """Leave Ctrl-C to the parent process, and end when it was killed: nobody else would end its children."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _write_glyph_shard(path: Path, start: int, count: int, *, config: GlyphsConfig, seed: int) -> None:
    write_shard(path, draw_records(config, seed=seed, start=start, count=count))
