"""Work on shards by several processes: one shard per process at a time, with a progress bar."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Thread
from typing import TypeVar

from tqdm import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")
_FEW_BYTES = 2**26  # other processes take longer to start than to read as much


def run_parallel(
    function: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int | None, title: str, done: int = 0
) -> Iterator[Result]:
    """Yield `function(job)` of each job in their order.

    `workers` is the number of processes, by default that of the CPU cores; 1: this process. `done` jobs were
    done before. The bar is for a terminal alone.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    hidden = True if len(jobs) < 2 else None
    with tqdm(total=done + len(jobs), initial=done, desc=title, unit="shard", disable=hidden) as bar:
        for result in map(function, jobs) if workers < 2 else _by_processes(function, jobs, workers):
            bar.update()
            yield result


def worth_processes(paths: Sequence[Path]) -> int | None:
    """Return how many processes shall read files: this one if they are small, else by default."""
    return 1 if sum(path.stat().st_size for path in paths) < _FEW_BYTES else None


def _by_processes(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    pool = ProcessPoolExecutor(workers, initializer=_end_with_parent, initargs=(os.getpid(),))
    try:
        yield from pool.map(function, jobs)
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent(parent: int) -> None:
    """Leave Ctrl-C to the parent process, and end when it was killed: nobody else would end its children."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
