"""Inject every fault into real runs and write the outcomes to docs/reliability.md.

    python benchmarks/reliability.py --rounds 200 --rounds-of-ranks 20

The faults are tests: tests/trainer/test_faults.py, tests/trainer/test_kill_rounds.py, and tests/slurm/ where
Slurm can be started (its Debian packages, and root). Each records its row of the table.
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import harness

ROOT = Path(__file__).parents[1]
TESTS = ("tests/trainer/test_faults.py", "tests/trainer/test_kill_rounds.py", "tests/slurm/test_jobs.py")
COMMAND = "`make reliability`"


class Row(NamedTuple):
    """A fault and the outcome of the run."""

    fault: str
    outcome: str
    lost_steps: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests, or read reports of them; returns the exit code: 0 if all passed."""
    options = _parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        reports = options.reports or [Path(folder) / "report.xml"]
        code = 0 if options.reports else inject(reports[0], options.rounds, options.rounds_of_ranks)
        rows = [row for report in reports for row in read_rows(report)]
    command = f"{COMMAND}, in {len(reports)} parts" if options.reports else COMMAND
    harness.write_table(options.page, "reliability", table(rows, command=command))
    return code


def inject(report: Path, rounds: int, rounds_of_ranks: int) -> int:
    """Run the tests; returns the exit code of pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-o", "junit_family=xunit1"]
    often = {"KILL_ROUNDS": str(rounds), "KILL_ROUNDS_OF_RANKS": str(rounds_of_ranks)}
    done = subprocess.run(
        [*command, f"--junitxml={report}", *TESTS], cwd=ROOT, env={**os.environ, **often}, check=False
    )
    return done.returncode


def read_rows(report: Path) -> Iterator[Row]:
    """Yield the row of each test of a JUnit report."""
    for case in ElementTree.parse(report).iter("testcase"):
        recorded = {entry.get("name"): str(entry.get("value")) for entry in case.iter("property")}
        name = f"`{case.get('name')}`"
        if case.find("failure") is not None or case.find("error") is not None:
            yield Row(recorded.get("fault", name), "**the test failed**", "")
        elif (skipped := case.find("skipped")) is not None:
            yield Row(name, f"not tested here: {skipped.get('message')}", "")
        else:
            yield Row(recorded["fault"], recorded["outcome"], recorded["lost_steps"])


def table(rows: Iterable[Row], *, command: str) -> str:
    """Return the table and where it is from."""
    today, python = datetime.now(tz=UTC).date(), sys.version.split()[0]
    origin = f"{command}, {today}; {harness.machine()}; python {python}, torch {harness.installed('torch')}"
    lines = [f"{origin}{_slurm_version()}.", "", "| fault | outcome | lost steps |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def _slurm_version() -> str:
    try:
        done = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f", {done.stdout.strip()}"


def _parse(arguments: Sequence[str] | None):  # noqa: ANN202 - a namespace
    parser = harness.parser(__doc__)
    parser.set_defaults(page=ROOT / "docs" / "reliability.md")
    parser.add_argument("--rounds", type=int, default=200, help="kills of a run of one process")
    parser.add_argument("--rounds-of-ranks", type=int, default=20, help="kills of a run of two ranks")
    parser.add_argument("--reports", type=Path, nargs="+", help="JUnit reports of these tests, run before")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
