"""Check from its logs that a run used each sample once per epoch.

`SampleOrder` gives the samples that each step has to use, `samples-rank-R.jsonl` those that rank R used. A
restarted run has several attempts: each counts up to the step at which a later one resumed.
"""

import io
import json
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from vico_pl.callbacks.records import SAMPLE_LOG
from vico_pl.data.module import DataConfig, build_order, open_sources
from vico_pl.data.order import Place
from vico_pl.data.shards.locations import without_secrets
from vico_pl.data.shards.shard import ShardIndex
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


def audit_run(run_dir: Path, config: DataConfig, *, seed: int, completed_steps: int) -> Audit:
    """Compare a run's sample logs with its sample order.

    The audit covers the steps that all ranks logged, and at least `completed_steps`.

    Raises:
        ValueError: there is no sample log, or a source is missing or damaged.
    """
    faults: list[BadRecord] = []
    num_attempts, num_logged, ids, bad = _read_logs(run_dir, faults)
    indexes = open_sources(config)
    order, names = build_order(config, indexes, seed=seed), [SampleNames(index) for index in indexes]
    counts: defaultdict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    num_steps = max(completed_steps, num_logged)
    for step in range(num_steps):
        due = map(order, range(step * config.batch_size, (step + 1) * config.batch_size))
        for name, reason in _deviations(due, ids[step], bad[step], names, counts):
            faults.append(BadRecord(id=name, reason=f"step {step}: {reason}"))
    paths = [without_secrets(source.path) for source in config.sources]
    return Audit(
        sources=[(path, index.num_samples) for path, index in zip(paths, indexes, strict=True)],
        num_steps=num_steps,
        num_attempts=num_attempts,
        counts=dict(counts),
        faults=faults,
    )


def _deviations(
    due: Iterable[Place],
    ids: Counter[str],
    bad: Counter[str],
    names: Sequence["SampleNames"],
    counts: Mapping[tuple[int, int], Counter[str]],
) -> Iterator[tuple[str, str]]:
    """Count what all ranks used in a step, whichever rank it was; yield each deviation and its reason."""
    for place in due:
        name, count = names[place.source](place.sample), counts[place.source, place.epoch]
        number = f"source {place.source}, sample {place.sample}"  # logged where the key is unreadable
        if _take(ids, name):
            count["used"] += 1
        elif _take(bad, name) or _take(bad, number):
            count["bad"] += 1
        else:
            count["missing"] += 1
            yield name or number, f"due but not used ({number})"
    for name in (ids + bad).elements():
        source = next((number for number, known in enumerate(names) if name in known), None)
        if source is None:
            yield name, "used but in no source of the run"
        else:
            epoch = max((epoch for number, epoch in counts if number == source), default=0)
            counts[source, epoch]["twice"] += 1
            yield name, f"used but not due (source {source})"


def _take(names: Counter[str], name: str | None) -> bool:
    """Remove one occurrence of a name; return whether there was one."""
    if name is None or not names[name]:
        return False
    names[name] -= 1
    return True


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
    if not audit.num_steps:
        return f"{covered}: nothing to check yet; every rank has to log a step first"
    return f"{covered}: every sample of each source and epoch was used once, as the order says"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class SampleNames:
    """Names the samples of a source `shard/key`, reading one tar header per sample."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._known: dict[str, set[str | None]] = {}  # by shard

    def __call__(self, sample: int) -> str | None:
        """Return a sample's name, or None if its header is unreadable."""
        number, place = self._index.place(sample)
        shard = self._index.open(number)
        start, end = shard.sidecar.span(place)
        try:
            content = os.pread(shard.file.descriptor, min(end - start, _NAME_BYTES), start)
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


class _Attempt(NamedTuple):
    number: int
    first_step: int
    world: int


class _Step(NamedTuple):
    number: int
    ids: Counter[str]
    bad: Counter[str]


_Names = defaultdict[int, Counter[str]]  # by step


def _read_logs(run_dir: Path, faults: list[BadRecord]) -> tuple[int, int, _Names, _Names]:
    """Return how many attempts there were, how many steps all ranks logged, and the samples used and bad."""
    paths = {int(path.stem.split("-")[-1]): path for path in run_dir.glob(SAMPLE_LOG.format(rank="*"))}
    if 0 not in paths:
        raise ValueError(
            f"{run_dir}: no {SAMPLE_LOG.format(rank=0)}; training writes it from its first step on"
        )
    lines = {rank: list(_whole_lines(path, faults)) for rank, path in sorted(paths.items())}
    attempts = [line for _, line in lines[0] if isinstance(line, _Attempt)]
    last = attempts[-1] if attempts else _Attempt(0, 0, 1)
    ids, bad = _Names(Counter), _Names(Counter)
    ends = [last.first_step] * last.world  # of each rank of the last attempt: the step after its last
    for rank, of_rank in lines.items():
        current = None
        for where, line in of_rank:
            if isinstance(line, _Attempt):
                current = next((a for a in reversed(attempts) if a.number == line.number), None)
            elif current is None or rank >= current.world or line.number < current.first_step:
                reason = f"step {line.number} belongs to no attempt of rank 0"
                faults.append(BadRecord(id=where, reason=reason))
            elif current is next(a for a in reversed(attempts) if a.first_step <= line.number):
                ids[line.number].update(line.ids)
                bad[line.number].update(line.bad)
                if current is last:
                    ends[rank] = max(ends[rank], line.number + 1)
    return len(attempts), min(ends), ids, bad


def _whole_lines(path: Path, faults: list[BadRecord]) -> Iterator[tuple[str, _Attempt | _Step]]:
    """Yield the lines of a log; only the last line of an attempt may be truncated."""
    truncated: list[BadRecord] = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        where = f"{path.name}, line {number}"
        try:
            line = _parse(json.loads(raw))
        except (ValueError, TypeError, KeyError):
            truncated.append(BadRecord(id=where, reason="unreadable"))
            continue
        if isinstance(line, _Step):
            faults.extend(truncated)
        truncated.clear()
        yield where, line


def _parse(line: Any) -> _Attempt | _Step:
    if "attempt" in line:
        return _Attempt(int(line["attempt"]), int(line["from_step"]), max(int(line["world"]), 1))
    return _Step(int(line["step"]), Counter(line["ids"]), Counter(line.get("bad", [])))
