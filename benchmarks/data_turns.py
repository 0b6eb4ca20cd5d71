"""Implementations that take turns, so that the load of others falls on each alike, and what came of it."""

import ctypes
import time
from collections.abc import Callable, Mapping
from statistics import median

Round = dict[str, float]  # implementation -> seconds of processor time
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names that mallopt gives its settings
_MOST_BYTES = 32 * 2**20  # that it takes for the latter


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for whoever is measured next.

    Otherwise the C library gives large pieces back to the system and fetches them anew, or does not, by what
    lies where in memory: the same decoder then takes 1.7 ms an image in one run and 3 ms in another.
    """
    library = ctypes.CDLL("libc.so.6")
    library.mallopt(_MMAP_THRESHOLD, _MOST_BYTES)
    library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def take_turns(runs: Mapping[str, Callable[[], object]], *, rounds: int) -> list[Round]:
    """Call each in turn, each first once in a while; one unmeasured call of each goes before."""
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
    """Return how many times as fast one is as another: the median of the ratio within a round."""
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
