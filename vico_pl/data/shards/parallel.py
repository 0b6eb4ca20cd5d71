"""Work on shards in several processes, with a progress bar."""

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
_FEW_BYTES = 2**26  # reading as much takes less time than starting processes


def run_parallel(
    function: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int | None, title: str, done: int = 0
) -> Iterator[Result]:
    """Yield `function(job)` of each job in order.

    `workers` is the number of processes, by default that of the CPU cores; 1: this process. `done` jobs were
    finished before. The bar is shown only in a terminal.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    hidden = True if len(jobs) < 2 else None
    with tqdm(total=done + len(jobs), initial=done, desc=title, unit="shard", disable=hidden) as bar:
        for result in map(function, jobs) if workers < 2 else _by_processes(function, jobs, workers):
            bar.update()
            yield result


def worth_processes(paths: Sequence[Path]) -> int | None:
    """Return the number of processes for reading files: 1 if they are small, else the default."""
    return 1 if sum(path.stat().st_size for path in paths) < _FEW_BYTES else None


def _by_processes(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    pool = ProcessPoolExecutor(workers, initializer=_end_with_parent, initargs=(os.getpid(),))
    try:
        yield from pool.map(function, jobs)
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent(parent: int) -> None:
    """Leave Ctrl-C to the parent process, and exit when it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
