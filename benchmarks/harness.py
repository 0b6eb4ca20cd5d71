"""What all benchmarks share: measuring apart, the figures with their goals, and where they are written.

A benchmark is a script `benchmarks/NAME.py` with a section of its own in `benchmarks/README.md` that holds
the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->`. It measures, and ends with `write`, which makes

    results/NAME.json       its figures, and every single measurement
    results/summary.json    the figures of all benchmarks, from all results/NAME.json
    README.md               its tables, between its marks

Goals tell a figure's direction: most should not exceed them; `Goal(1.1, at_least=True)` is to be reached.
Other programs share the machine, so times are of the processor, and ratios are taken between neighbours:
`measure` in this process, `measure_apart` in a new one, `paired` for two functions that take turns.
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
SUMMARY = "summary.json"

Figures = dict[str, dict[str, float | None]]  # name -> {"measured", "goal"}; no goal: only reported
Goals = Mapping[str, "Goal | None"]


@dataclass(frozen=True)
class Goal:
    """What a figure should keep to."""

    value: float
    at_least: bool = False  # otherwise it should not exceed the value

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.value}"


# --- Measuring ----------------------------------------------------------------------------------------------


def measure(run: Callable[[], object]) -> dict[str, float]:
    """Call a function once; return seconds of processor time and by how many MiB memory rose at its peak.

    The peak is above what the process holds before the call. Memory that an earlier call freed may still be
    the process's, so for peaks that are compared, measure each in a process of its own.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = _memory_mib("VmRSS"), time.process_time()
    run()
    taken = time.process_time() - start
    return {"cpu_s": taken, "peak_mib": _memory_mib("VmHWM") - before}


def measure_apart(script: str | Path, name: str, *settings: str) -> dict[str, float]:
    """Run `python SCRIPT --measure NAME SETTINGS...` and return the JSON that it prints.

    Raises:
        RuntimeError: it failed; the message holds what it said.
    """
    command = [sys.executable, str(Path(script).resolve()), "--measure", name, *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring {name} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def paired(
    ours: Callable[[], object], other: Callable[[], object], *, rounds: int, warm_up: bool = True
) -> list[tuple[float, float]]:
    """Let two functions take turns in this process, each first in every second round.

    Returns the seconds of processor time of both, round by round; to warm up, an unmeasured call of each goes
    before.
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


# --- What is written ----------------------------------------------------------------------------------------


def figures_of(measured: Mapping[str, float], goals: Goals) -> Figures:
    """Return each measured figure with its goal."""
    values = {name: None if goal is None else goal.value for name, goal in goals.items()}
    return {name: {"measured": _rounded(value), "goal": values[name]} for name, value in measured.items()}


def write(
    name: str,
    *,
    figures: Figures,
    details: Mapping[str, Any],
    tables: Callable[[dict[str, Any]], str],
    command: str = ALL,
    packages: Sequence[str] = (),
    output: Path = FOLDER / "results",
    page: Path = FOLDER / "README.md",
) -> dict[str, Any]:
    """Write what a benchmark found; returns the content of results/NAME.json.

    `tables` makes Markdown of that content. `packages` are named with their versions beside torch and ours.
    """
    content = {**_origin(command, packages), "figures": figures, **details}
    output.mkdir(parents=True, exist_ok=True)
    _write_json(output / f"{name}.json", content)
    _write_json(output / SUMMARY, summarise(output))
    write_table(page, name, tables(content))
    return content


def summarise(folder: Path) -> dict[str, Any]:
    """Gather the figures of all benchmarks that have results in a folder."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.name != SUMMARY]
    newest = max(results, key=lambda result: result["date"])
    return {
        "machine": newest["machine"],
        "date": newest["date"],
        "command": "; ".join(dict.fromkeys(result["command"] for result in results)),
        "versions": {name: v for result in results for name, v in result["versions"].items()},
        "figures": {name: figure for result in results for name, figure in result["figures"].items()},
    }


def write_table(page: Path, name: str, table: str) -> None:
    """Put a table between the marks of a page.

    Raises:
        ValueError: the page has no such marks.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found, rest = page.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"{page}: no lines '{begin.strip()}' and '{end}'; add them where its tables belong")
    page.write_text(before + begin + table + end + after)


def heading(content: Mapping[str, Any]) -> list[str]:
    """Return the lines that say where, when and with what results were made."""
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
    """Return a command line with the options that all benchmarks have: where to write."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--output", type=Path, default=FOLDER / "results", help="folder for the JSON files")
    made.add_argument("--page", type=Path, default=FOLDER / "README.md", help="page that shows the tables")
    return made


def installed(package: str) -> str | None:
    """Return the version of a package, if it can be imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> str:
    """Describe the processor and memory."""
    found = re.search(r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = found[1].strip() if found else platform.machine()
    return f"{processor}, {os.cpu_count()} cores, {gib:.0f} GiB, one thread used, no GPU"


def _origin(command: str, packages: Sequence[str]) -> dict[str, Any]:
    known = {name: installed(name) for name in ("torch", "vico-pl", *packages)}
    versions = {"python": platform.python_version(), **{k: v for k, v in known.items() if v}}
    return {
        "machine": machine(),
        "date": datetime.now(tz=UTC).date().isoformat(),
        "command": command,
        "versions": versions,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
