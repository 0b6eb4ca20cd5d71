"""Interleaved timing of implementations, so that other load on the machine affects all alike."""

import ctypes
import time
from collections.abc import Callable, Mapping
from statistics import median

Round = dict[str, float]  # implementation -> seconds of processor time
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt
_MOST_BYTES = 32 * 2**20  # upper limit of the latter


def keep_freed_memory() -> None:
    """Keep freed memory in this process for the next measurement.

    Otherwise the C library sometimes returns large blocks to the system: the same decoder then takes 1.7 ms
    per image in one run and 3 ms in another.
    """
    library = ctypes.CDLL("libc.so.6")
    library.mallopt(_MMAP_THRESHOLD, _MOST_BYTES)
    library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def take_turns(runs: Mapping[str, Callable[[], object]], *, rounds: int) -> list[Round]:
    """Time all in turn, rotating the order; one unmeasured call of each comes first."""
    for run in runs.values():
        run()
    names = list(runs)
    measured = []
    for number in range(rounds):
        first = number % len(names)
        taken = {name: _processor_seconds(runs[name]) for name in [*names[first:], *names[:first]]}
        measured.append({name: taken[name] for name in names})
    return measured


def speedup(rounds: list[Round], over: str, *, of: str = "ours") -> float:
    """Return the median speedup of one over another within a round."""
    return median(round_[over] / round_[of] for round_ in rounds)


def time_rows(rounds: list[Round], titles: Mapping[str, str], *, repeats: int) -> list[str]:
    """Return a table row for each implementation: milliseconds of one of `repeats` repetitions."""
    rows = []
    for name in rounds[0]:
        times = [1000 * round_[name] / repeats for round_ in rounds]
        spread = f"{median(times):.3f} ({min(times):.3f} to {max(times):.3f})"
        rows.append(f"| {titles[name]} | {spread} | {1000 / median(times):.0f} |")
    return rows


def _processor_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
