"""Check from its logs that a run used each sample once per epoch.

`SampleOrder` gives the samples that each step has to use, `samples-rank-R.jsonl` those that rank R used. A
restarted run has several attempts: each counts up to the step at which a later one resumed.
"""

import heapq
import io
import json
import math
import os
import tarfile
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from vico_pl.callbacks.records import ATTEMPT, SAMPLE_LOG, checksum, read_lines, unpack_positions
from vico_pl.data.module import DataConfig, build_order, open_sources
from vico_pl.data.order import Place
from vico_pl.data.shards.locations import without_secrets
from vico_pl.data.shards.shard import ShardIndex
from vico_pl.data.shards.tars import TAR_ERRORS, member_key
from vico_pl.types import BadRecord

COLUMNS = ("used", "bad", "missing", "twice")
MAX_FAULTS = 100_000  # after which an audit ends
MAX_KNOWN = 65_536  # names that are kept: each is asked for as due and as used
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

    The audit covers the steps that all ranks logged, and at least `completed_steps`; it ends where it has
    found more than `MAX_FAULTS` faults. It holds the lines of one step at a time, and one open file.

    Raises:
        ValueError: there is no sample log, or a source is missing or damaged.
    """
    faults: list[BadRecord] = []
    logs = _Logs(run_dir, faults)
    indexes = open_sources(config)
    order, names = build_order(config, indexes, seed=seed), [SampleNames(index) for index in indexes]

    @lru_cache(MAX_KNOWN)
    def sample_at(position: int) -> tuple[Place, str | None]:
        place = order(position)
        return place, names[place.source](place.sample)

    counts: defaultdict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    num_steps = 0
    for step, lines in logs.steps(completed_steps):
        num_steps = step + 1
        ids = Counter(name for line in lines for name in _names_in(line, sample_at, faults))
        bad = Counter(name for line in lines for name in line.bad)
        due = map(sample_at, range(step * config.batch_size, num_steps * config.batch_size))
        for name, reason in _deviations(due, ids, bad, names, counts):
            faults.append(BadRecord(id=name, reason=f"step {step}: {reason}"))
        if len(faults) > MAX_FAULTS:
            break
    paths = [without_secrets(source.path) for source in config.sources]
    return Audit(
        sources=[(path, index.num_samples) for path, index in zip(paths, indexes, strict=True)],
        num_steps=num_steps,
        num_attempts=len(logs.attempts),
        counts=dict(counts),
        faults=faults,
    )


def _names_in(
    line: "_Step", sample_at: Callable[[int], tuple[Place, str | None]], faults: list[BadRecord]
) -> list[str]:
    """Return the names of the samples that a rank used in a step; none if they cannot be those it logged."""
    if not line.positions:
        return line.ids
    names = [name for _, name in map(sample_at, line.positions) if name is not None]
    if len(names) == len(line.positions) and checksum(names) == line.crc32:
        return names
    reason = f"step {line.number}: other samples than those at its positions"
    faults.append(BadRecord(id=line.where, reason=reason))
    return []


def _deviations(
    due: Iterable[tuple[Place, str | None]],
    ids: Counter[str],
    bad: Counter[str],
    names: Sequence["SampleNames"],
    counts: Mapping[tuple[int, int], Counter[str]],
) -> Iterator[tuple[str, str]]:
    """Count what all ranks used in a step, whichever rank it was; yield each deviation and its reason."""
    for place, name in due:
        count = counts[place.source, place.epoch]
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
        self._in_shard = lru_cache(2)(self._all_names)

    def __call__(self, sample: int) -> str | None:
        """Return a sample's name, or None if its header is unreadable."""
        number, place = self._index.place(sample)
        shard = self._index.open(number)
        start, end = shard.sidecar.span(place)
        try:
            content = os.pread(shard.file.descriptor, min(end - start, _NAME_BYTES), start)
            name = _plain_name(content)
            if name is None:
                with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
                    member = tar.next()
                name = "" if member is None else member.name
            key = member_key(name)
        except (*TAR_ERRORS, OSError):
            return None
        return None if key is None else f"{self._index.names[number]}/{key}"

    def __contains__(self, name: str) -> bool:
        """Return whether a sample has this name."""
        shard = name.partition("/")[0]
        return shard in self._index.names and name in self._in_shard(self._index.names.index(shard))

    def _all_names(self, number: int) -> set[str | None]:
        return {self(sample) for sample in range(*self._index.starts[number : number + 2])}


def _plain_name(header: bytes) -> str | None:
    """Return the name in the header of a plain file, 20 times as fast as `tarfile`; None: ask that."""
    if header[156:157] != b"0" or header[257:263] != b"ustar\0":
        return None
    parts = (part.partition(b"\0")[0] for part in (header[345:500], header[:100]))
    return b"/".join(filter(None, parts)).decode(errors="surrogateescape")


class _Attempt(NamedTuple):
    number: int
    first_step: int
    world: int


class _Step(NamedTuple):
    where: str
    number: int
    ids: list[str]  # of logs before version 1; later ones have the positions and a checksum of the names
    positions: list[int]
    crc32: int | None
    bad: list[str]


_NO_MORE: tuple[float, list[_Step]] = (math.inf, [])


class _Logs:
    """The sample logs of a run, which may be larger than memory: read together, step by step."""

    def __init__(self, run_dir: Path, faults: list[BadRecord]) -> None:
        """Read from the log of rank 0 which attempts there were; add to `faults` while the steps are read."""
        self._paths = {
            int(path.stem.split("-")[-1]): path for path in run_dir.glob(SAMPLE_LOG.format(rank="*"))
        }
        self._faults = faults
        if 0 not in self._paths:
            raise ValueError(
                f"{run_dir}: no {SAMPLE_LOG.format(rank=0)}; training writes it from its first step on"
            )
        lines = _whole_lines(
            "", (line for line in read_lines(self._paths[0]) if line.startswith(ATTEMPT)), []
        )
        self.attempts = [line for line in lines if isinstance(line, _Attempt)]

    def steps(self, min_steps: int) -> Iterator[tuple[int, list[_Step]]]:
        """Yield each step that all ranks of the last attempt logged, at least `min_steps`, with its lines."""
        last = self.attempts[-1] if self.attempts else _Attempt(0, 0, 1)
        ends = [last.first_step] * last.world  # of each rank of the last attempt: the step after its last
        ranks = (self._steps_of(rank, last, ends) for rank in sorted(self._paths))
        groups = groupby(heapq.merge(*ranks, key=_number), key=_number)
        read = ((number, list(lines)) for number, lines in groups)
        step, (number, lines) = 0, next(read, _NO_MORE)
        while step < max(min_steps, min(ends)):  # with the lines of a step, `ends` are beyond it or final
            if number == step:
                yield step, lines
                number, lines = next(read, _NO_MORE)
            else:
                yield step, []
            step += 1
        deque(read, maxlen=0)  # the rest may have faults, too

    def _steps_of(self, rank: int, last: _Attempt, ends: list[int]) -> Iterator[_Step]:
        """Yield the steps of a rank that count, in increasing order; note in `ends` how far they go."""
        current, newest, path = None, -1, self._paths[rank]
        for line in _whole_lines(path.name, read_lines(path), self._faults):
            if isinstance(line, _Attempt):
                current = next((a for a in reversed(self.attempts) if a.number == line.number), None)
            elif current is None or rank >= current.world or line.number < current.first_step:
                self._reject(line, "belongs to no attempt of rank 0")
            elif current is not next(a for a in reversed(self.attempts) if a.first_step <= line.number):
                continue  # taken again by a later attempt
            elif line.number < newest:
                self._reject(line, f"is logged after step {newest}")
            else:
                newest = line.number
                if current is last:
                    ends[rank] = newest + 1
                yield line

    def _reject(self, line: _Step, reason: str) -> None:
        self._faults.append(BadRecord(id=line.where, reason=f"step {line.number} {reason}"))


def _number(step: _Step) -> int:
    return step.number


def _whole_lines(name: str, lines: Iterable[bytes], faults: list[BadRecord]) -> Iterator[_Attempt | _Step]:
    """Yield the lines of a log; only the last line of an attempt may be truncated."""
    truncated: list[BadRecord] = []
    for number, raw in enumerate(lines, 1):
        where = f"{name}, line {number}"
        try:
            line = _parse(json.loads(raw), where)
        except (ValueError, TypeError, KeyError, zlib.error):
            truncated.append(BadRecord(id=where, reason="unreadable"))
            continue
        if isinstance(line, _Step):
            faults.extend(truncated)
        truncated.clear()
        yield line


def _parse(line: Any, where: str) -> _Attempt | _Step:
    if "attempt" in line:
        return _Attempt(int(line["attempt"]), int(line["from_step"]), max(int(line["world"]), 1))
    packed = "used" in line
    return _Step(
        where=where,
        number=int(line["step"]),
        ids=[] if packed else list(line["ids"]),
        positions=unpack_positions(line["used"]) if packed else [],
        crc32=line.get("crc32"),
        bad=list(line.get("bad", [])),
    )
