"""Check from its logs that a run used each sample once per epoch.

`SampleOrder` gives the samples that each step has to use, `samples-rank-R.jsonl` those that rank R used. A
restarted run has several attempts: each counts up to the step at which a later one resumed.
"""

import io
import json
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from vico_pl.data.module import DataConfig, build_order, open_sources
from vico_pl.data.order import SampleOrder
from vico_pl.data.shards.locations import without_secrets
from vico_pl.data.shards.reader import ShardIndex
from vico_pl.data.shards.tars import TAR_ERRORS, member_key
from vico_pl.types import BadRecord

COLUMNS = ("used", "bad", "missing", "twice")
_NAME_BYTES = 16_384  # of a tar that hold any member's name and headers


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The result of an audit."""

    sources: list[tuple[str, int]]  # path, number of samples
    num_steps: int
    num_attempts: int
    counts: dict[tuple[int, int], Counter[str]]  # by (source, epoch); keys: `COLUMNS`
    faults: list[BadRecord]  # sample or log line, and how it deviates from the order


class _Attempt(NamedTuple):
    number: int
    first_step: int
    world: int


class _Step(NamedTuple):
    step: int
    ids: Counter[str]
    bad: Counter[str]


_Lines = list[tuple[str, _Attempt | _Step]]  # (file and line number, content)


def audit_run(run_dir: Path, config: DataConfig, *, seed: int, completed_steps: int) -> Audit:
    """Compare a run's sample logs with its sample order.

    The audit covers the steps that all ranks logged, and at least `completed_steps`.

    Raises:
        ValueError: there is no sample log, or a source is missing or damaged.
    """
    faults: list[BadRecord] = []
    lines = _read_logs(run_dir, faults)
    attempts = [line for _, line in lines[0] if isinstance(line, _Attempt)]
    steps, num_logged = _merge_ranks(lines, attempts, faults)
    num_steps = max(completed_steps, num_logged)
    indexes = open_sources(config)
    ledger = _Ledger(build_order(config, indexes, seed=seed), indexes, config.batch_size, faults)
    for step in range(num_steps):
        attempt = next((a.number for a in reversed(attempts) if a.first_step <= step), None)
        ledger.check(steps.get((attempt, step)) or _Step(step, Counter(), Counter()))
    sizes = [index.num_samples for index in indexes]
    return Audit(
        sources=[(without_secrets(s.path), size) for s, size in zip(config.sources, sizes, strict=True)],
        num_steps=num_steps,
        num_attempts=len(attempts),
        counts=dict(ledger.counts),
        faults=faults,
    )


def format_table(audit: Audit) -> str:
    """Return a row per source and epoch; consecutive epochs with equal counts share a row."""
    rows: list[tuple[str, ...]] = [("source", "epoch", "samples", *COLUMNS)]
    cells = [(place, [str(count[c]) for c in COLUMNS]) for place, count in sorted(audit.counts.items())]
    for (source, values), group in groupby(cells, key=lambda cell: (cell[0][0], cell[1])):
        epochs = [epoch for (_, epoch), _ in group]
        span = str(epochs[0]) if len(epochs) == 1 else f"{epochs[0]}-{epochs[-1]}"
        path, size = audit.sources[source]
        rows.append((path, span, str(size), *values))
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows)


def format_verdict(audit: Audit) -> str:
    """Return the result as a sentence."""
    covered = f"{_count(audit.num_steps, 'step')} in {_count(audit.num_attempts, 'attempt')}"
    if audit.faults:
        return f"{covered}: {_count(len(audit.faults), 'fault')}"
    return f"{covered}: every sample of each source and epoch was used once, as the order says"


class SampleNames:
    """Names the samples of a source `shard/key`, reading one tar header per sample."""

    def __init__(self, index: ShardIndex) -> None:
        """Open nothing yet."""
        self._index = index
        self._known: dict[str, set[str | None]] = {}  # by shard

    def __call__(self, sample: int) -> str | None:
        """Return a sample's name, or None if its header is unreadable."""
        number, place = self._index.place(sample)
        shard = self._index.open(number)
        start, end = shard.span(place)
        try:
            content = os.pread(shard.descriptor, min(end - start, _NAME_BYTES), start)
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
                member = tar.next()
            key = None if member is None else member_key(member.name)
        except (*TAR_ERRORS, OSError):
            return None
        return None if key is None else f"{self._index.names[number]}/{key}"

    def __contains__(self, name: str) -> bool:
        """Return whether a sample has this name."""
        shard = name.partition("/")[0]
        if shard not in self._known and shard in self._index.names:
            number = self._index.names.index(shard)
            self._known[shard] = {self(i) for i in range(*self._index.starts[number : number + 2])}
        return name in self._known.get(shard, ())


class _Ledger:
    """Counts the samples that steps used, and adds deviations from the order to `faults`."""

    def __init__(
        self, order: SampleOrder, indexes: list[ShardIndex], batch_size: int, faults: list[BadRecord]
    ) -> None:
        self._order, self._batch_size, self._faults = order, batch_size, faults
        self._names = [SampleNames(index) for index in indexes]
        self._epochs = [0] * len(indexes)  # the current one of each source
        self.counts: defaultdict[tuple[int, int], Counter[str]] = defaultdict(Counter)

    def check(self, used: _Step) -> None:
        """Compare what all ranks used in a step; it does not matter which rank used what."""
        for position in range(used.step * self._batch_size, (used.step + 1) * self._batch_size):
            place = self._order(position)
            self._epochs[place.source] = place.epoch
            name = self._names[place.source](place.sample)
            number = f"source {place.source}, sample {place.sample}"  # logged where the key is unreadable
            count = self.counts[place.source, place.epoch]
            if _take(used.ids, name):
                count["used"] += 1
            elif _take(used.bad, name) or _take(used.bad, number):
                count["bad"] += 1
            else:
                count["missing"] += 1
                self._add(used, name or number, f"due but not used ({number})")
        for name in (used.ids + used.bad).elements():
            source = next((i for i, names in enumerate(self._names) if name in names), None)
            if source is None:
                self._add(used, name, "used but in no source of the run")
            else:
                self.counts[source, self._epochs[source]]["twice"] += 1
                self._add(used, name, f"used but not due (source {source})")

    def _add(self, used: _Step, name: str, reason: str) -> None:
        self._faults.append(BadRecord(id=name, reason=f"step {used.step}: {reason}"))


def _take(names: Counter[str], name: str | None) -> bool:
    """Remove one occurrence of a name; return whether there was one."""
    if name is None or not names[name]:
        return False
    names[name] -= 1
    return True


def _read_logs(run_dir: Path, faults: list[BadRecord]) -> dict[int, _Lines]:
    paths = {int(path.stem.split("-")[-1]): path for path in run_dir.glob("samples-rank-*.jsonl")}
    if 0 not in paths:
        raise ValueError(f"{run_dir}: no samples-rank-0.jsonl; training writes it from its first step on")
    return {rank: list(_whole_lines(path, faults)) for rank, path in sorted(paths.items())}


def _whole_lines(path: Path, faults: list[BadRecord]) -> Iterator[tuple[str, _Attempt | _Step]]:
    """Yield the lines of a log; only the last line of an attempt may be truncated."""
    truncated: list[BadRecord] = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        where = f"{path.name}, line {number}"
        line = _parse(raw)
        if line is None:
            truncated.append(BadRecord(id=where, reason="unreadable"))
            continue
        if isinstance(line, _Step):
            faults.extend(truncated)
        truncated.clear()
        yield where, line


def _parse(raw: bytes) -> _Attempt | _Step | None:
    try:
        line = json.loads(raw)
        if "attempt" in line:
            return _Attempt(int(line["attempt"]), int(line["from_step"]), max(int(line["world"]), 1))
        return _Step(int(line["step"]), Counter(line["ids"]), Counter(line.get("bad", [])))
    except (ValueError, TypeError, KeyError):
        return None


def _merge_ranks(
    lines: dict[int, _Lines], attempts: list[_Attempt], faults: list[BadRecord]
) -> tuple[dict[tuple[int | None, int], _Step], int]:
    """Return steps by (attempt, step), and the number of steps logged by all ranks of the last attempt."""
    known = {attempt.number: attempt for attempt in attempts}
    steps: dict[tuple[int | None, int], _Step] = {}
    ends: Counter[tuple[int, int]] = Counter()  # by (attempt, rank): after its last step
    for rank, of_rank in lines.items():
        current = None
        for where, line in of_rank:
            if isinstance(line, _Attempt):
                current = known.get(line.number)
            elif current is None or rank >= current.world or line.step < current.first_step:
                reason = f"step {line.step} belongs to no attempt of rank 0"
                faults.append(BadRecord(id=where, reason=reason))
            else:
                step = steps.setdefault((current.number, line.step), _Step(line.step, Counter(), Counter()))
                step.ids.update(line.ids)
                step.bad.update(line.bad)
                ends[current.number, rank] = max(ends[current.number, rank], line.step + 1)
    if not attempts:
        return steps, 0
    last = attempts[-1]
    return steps, min(max(ends[last.number, rank], last.first_step) for rank in range(last.world))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
