"""Shared by all benchmarks: measurement, figures with goals, and output files.

A benchmark is a script `benchmarks/NAME.py`; its section in `benchmarks/README.md` has the lines
`<!-- NAME: begin -->` and `<!-- NAME: end -->`. It ends with `write`, which writes

    results/NAME.json       its figures and all measurements
    results/summary.json    the figures of all benchmarks, from all results/NAME.json
    README.md               its tables, between its marks

A goal is an upper limit, or a lower one with `Goal(1.1, at_least=True)`; figures without a goal are only
reported. As other programs use the machine, times are processor times, and ratios are taken within a round:
`measure` in this process, `measure_apart` in a new one, `paired` for two alternating functions.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

FOLDER = Path(__file__).parent
ALL = "make bench"  # the command behind figures at the usual settings
SUMMARY, STUDY = "summary.json", "study.json"  # all other results are of one benchmark each
ONE_THREAD = "one thread used, no GPU"

Figures = dict[str, dict[str, float | None]]  # name -> {"measured", "goal"}; no goal: only reported
Goals = Mapping[str, "Goal | None"]


@dataclass(frozen=True)
class Goal:
    """Limit of a figure."""

    value: float
    at_least: bool = False  # otherwise: at most

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.value}"


# --- Measuring ----------------------------------------------------------------------------------------------


def measure(run: Callable[[], object]) -> dict[str, float]:
    """Call a function once; return its processor seconds and peak memory in MiB.

    The peak is relative to before the call. Memory freed earlier may still belong to the process, so measure
    peaks that you compare in separate processes.
    """
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, start = _memory_mib("VmRSS"), time.process_time()
    run()
    taken = time.process_time() - start
    return {"cpu_s": taken, "peak_mib": _memory_mib("VmHWM") - before}


def measure_apart(script: str | Path, name: str, *settings: str) -> dict[str, float]:
    """Run `python SCRIPT --measure NAME SETTINGS...` and return the JSON that it prints.

    Raises:
        RuntimeError: it failed; the message contains its standard error.
    """
    command = [sys.executable, str(Path(script).resolve()), "--measure", name, *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring {name} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def paired(
    ours: Callable[[], object], other: Callable[[], object], *, rounds: int, warm_up: bool = True
) -> list[tuple[float, float]]:
    """Alternate two functions in this process; each is first in every second round.

    Returns both processor times per round. Unmeasured warm-up calls come first.
    """
    for run in (ours, other) if warm_up else ():
        run()
    times = []
    for number in range(rounds):
        order = (ours, other) if number % 2 == 0 else (other, ours)
        taken = {run: _processor_seconds(run) for run in order}
        times.append((taken[ours], taken[other]))
    return times


def median_ratio(times: Sequence[tuple[float, float]]) -> float:
    """Return the median of the ratio within a round, first over second."""
    return median(first / second for first, second in times)


def peak_gib() -> float:
    """Return the peak memory of this process since it began, or since `measure`."""
    return _memory_mib("VmHWM") / 1024


def _rounded(value: float) -> float:
    return round(value, 4) if abs(value) >= 0.001 else float(f"{value:.2g}")


def _processor_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _memory_mib(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"/proc/self/status names no {field}; this benchmark needs Linux")
    return int(found[1]) / 1024


# --- Output -------------------------------------------------------------------------------------------------


def figures_of(measured: Mapping[str, float], goals: Goals) -> Figures:
    """Return each measured figure with its goal."""
    values = {name: None if goal is None else goal.value for name, goal in goals.items()}
    return {name: {"measured": _rounded(value), "goal": values[name]} for name, value in measured.items()}


def publish(
    name: str,
    given: argparse.Namespace,
    *,
    figures: Figures,
    details: Mapping[str, Any],
    tables: Callable[[dict[str, Any]], str],
    command: str = ALL,
    packages: Sequence[str] = (),
    used: str = ONE_THREAD,
) -> None:
    """Write results/NAME.json, its part of the summary and its tables on the page, and print the tables.

    `given` are the arguments of `parser`. `tables` formats the content of the file as Markdown. Versions of
    `packages` are recorded too, and what was `used` of the machine.
    """
    content = {**_origin(command, packages, used), "figures": figures, **details}
    given.output.mkdir(parents=True, exist_ok=True)
    _write_json(given.output / f"{name}.json", content)
    _write_json(given.output / SUMMARY, summarise(given.output))
    table = tables(content)
    write_table(given.page, name, table)
    sys.stdout.write(table)


def summarise(folder: Path) -> dict[str, Any]:
    """Gather the figures of all benchmarks that have results in a folder."""
    results = [
        json.loads(path.read_text())
        for path in sorted(folder.glob("*.json"))
        if path.name not in (SUMMARY, STUDY)
    ]
    return {
        "machine": "; ".join(dict.fromkeys(result["machine"] for result in results)),
        "date": max(result["date"] for result in results),
        "command": "; ".join(dict.fromkeys(result["command"] for result in results)),
        "versions": {name: v for result in results for name, v in result["versions"].items()},
        "figures": {name: figure for result in results for name, figure in result["figures"].items()},
    }


def write_table(page: Path, name: str, table: str) -> None:
    """Write a table between the marks of a page.

    Raises:
        ValueError: the page has no such marks.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found, rest = page.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"{page}: no lines '{begin.strip()}' and '{end}'; add them where its tables go")
    page.write_text(before + begin + table + end + after)


def heading(content: Mapping[str, Any]) -> list[str]:
    """Return the lines with command, date, machine and versions."""
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    return [f"`{content['command']}`, {content['date']}; {content['machine']}; {versions}.", ""]


def figure_table(figures: Figures, goals: Goals) -> list[str]:
    """Return the lines of a table of figures and goals."""
    rows = [
        f"| `{name}` | {figure['measured']} | {goals[name] or 'reported'} |"
        for name, figure in figures.items()
    ]
    return ["| figure | measured | goal |", "|---|---|---|", *rows, ""]


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the output options of all benchmarks."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--output", type=Path, default=FOLDER / "results", help="folder for the JSON files")
    made.add_argument("--page", type=Path, default=FOLDER / "README.md", help="page that shows the tables")
    return made


def installed(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(used: str = ONE_THREAD) -> str:
    """Describe the processor and memory, and what is used of the machine."""
    found = re.search(r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = found[1].strip() if found else platform.machine()
    return f"{processor}, {os.cpu_count()} cores, {gib:.0f} GiB, {used}"


def _origin(command: str, packages: Sequence[str], used: str) -> dict[str, Any]:
    known = {name: installed(name) for name in ("torch", "vico-pl", *packages)}
    versions = {"python": platform.python_version(), **{k: v for k, v in known.items() if v}}
    return {
        "machine": machine(used),
        "date": datetime.now(tz=UTC).date().isoformat(),
        "command": command,
        "versions": versions,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
