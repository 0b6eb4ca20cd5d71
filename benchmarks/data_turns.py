"""Implementations that take turns, so that the load of others falls on each alike, and what came of it."""

import time
from collections.abc import Callable, Mapping
from statistics import median

Round = dict[str, float]  # implementation -> seconds of processor time


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
