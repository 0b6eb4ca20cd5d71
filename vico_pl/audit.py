"""Proof, from what a run left behind, that it used each sample once per epoch and nothing else.

Two accounts meet here. The order says which sample stands at each position (`order.py`), and so which ones a
step has to use. The sample logs say which ones each rank did use. A sample is named `shard/key`, as in
batches; two sources may share names, and are told apart by the position.

An attempt (a process that trained) counts up to the step at which a later one took up again.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from vico_pl.data.module import DataConfig, build_order, open_sources
from vico_pl.data.order import Place, SampleOrder
from vico_pl.data.shards.locations import without_secrets
from vico_pl.keys import SampleNames

COLUMNS = ("used", "bad", "missing", "twice")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What a run did otherwise than its order says, and the sample or line concerned."""

    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A process group that trained: its lines count from `first_step` to before `end_step`."""

    number: int
    first_step: int
    end_step: int | None  # at which a later attempt took up again; None: no later one
    world: int  # ranks


@dataclass(kw_only=True)
class Step:
    """What a rank says it used in a step; several lines of one step are taken together."""

    ids: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


Steps = dict[int, Step]


@dataclass(frozen=True, kw_only=True)
class SampleLogs:
    """The sample logs of all ranks of a run."""

    attempts: list[Attempt]  # in their order, as rank 0 took part in all
    steps: dict[tuple[int, int], Steps]  # by (attempt, rank)
    faults: list[Fault]  # lines that nothing explains


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What came out: counts by (source, epoch), keys as in `COLUMNS`, and faults."""

    sources: list[tuple[str, int]]  # path and samples
    num_steps: int
    num_attempts: int
    counts: dict[tuple[int, int], Counter[str]]
    faults: list[Fault]


def audit_run(run_dir: Path, config: DataConfig, *, seed: int, completed_steps: int) -> Audit:
    """Hold the sample logs of a run against its order.

    The run is audited as far as every rank logged, and at least for `completed_steps`: a killed run may leave
    a step that only some ranks had written down.

    Raises:
        ValueError: there is no sample log, or a source is absent or damaged.
    """
    logs = read_logs(run_dir)
    indexes = open_sources(config)
    names = [SampleNames(index) for index in indexes]
    ledger = _Ledger(build_order(config, indexes, seed=seed), names, config.batch_size)
    num_steps = max(completed_steps, _steps_logged(logs))
    for attempt in [_before(logs.attempts), *logs.attempts]:
        end = num_steps if attempt.end_step is None else attempt.end_step
        for step in range(attempt.first_step, end):
            of_ranks = (logs.steps.get((attempt.number, rank), {}) for rank in range(attempt.world))
            ledger.enter(step, [steps[step] for steps in of_ranks if step in steps])
    return Audit(
        sources=[
            (without_secrets(source.path), index.num_samples)
            for source, index in zip(config.sources, indexes, strict=True)
        ],
        num_steps=num_steps,
        num_attempts=len(logs.attempts),
        counts=dict(ledger.counts),
        faults=[*logs.faults, *ledger.faults],
    )


def format_table(audit: Audit) -> str:
    """Return a row per source and epoch; neighbouring epochs with the same counts share one."""
    rows: list[tuple[str, ...]] = [("source", "epoch", "samples", *COLUMNS)]
    for (source, values), group in groupby(sorted(audit.counts.items()), key=_source_and_values):
        epochs = [epoch for (_, epoch), _ in group]
        span = str(epochs[0]) if len(epochs) == 1 else f"{epochs[0]}-{epochs[-1]}"
        path, size = audit.sources[source]
        rows.append((path, span, str(size), *map(str, values)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]) for row in rows
    )


def format_verdict(audit: Audit) -> str:
    """Return the outcome in a sentence."""
    steps, attempts = _count(audit.num_steps, "step"), _count(audit.num_attempts, "attempt")
    if audit.faults:
        return f"{steps} in {attempts}: {_count(len(audit.faults), 'fault')}"
    return f"{steps} in {attempts}: every sample of each source and epoch was used once, as the order says"


def read_logs(run_dir: Path) -> SampleLogs:
    """Read the sample logs of a run.

    Raises:
        ValueError: rank 0 left none.
    """
    paths = {int(path.stem.split("-")[-1]): path for path in run_dir.glob("samples-rank-*.jsonl")}
    if 0 not in paths:
        raise ValueError(f"{run_dir}: no samples-rank-0.jsonl; training writes it from its first step on")
    faults: list[Fault] = []
    lines = {rank: list(_whole_lines(path, faults)) for rank, path in sorted(paths.items())}
    attempts = _attempts(line for _, line in lines[0])
    known = {attempt.number: attempt for attempt in attempts}
    steps: dict[tuple[int, int], Steps] = {}
    for rank, of_rank in lines.items():
        current = None
        for where, line in of_rank:
            if "attempt" in line:
                current = known.get(line["attempt"])
            elif current is None or rank >= current.world or line["step"] < current.first_step:
                faults.append(Fault(id=where, reason=f"step {line['step']} is of no attempt of rank 0"))
            else:
                step = steps.setdefault((current.number, rank), {}).setdefault(line["step"], Step())
                step.ids.extend(line["ids"])
                step.bad.extend(line.get("bad", []))
    return SampleLogs(attempts=attempts, steps=steps, faults=faults)


class _Ledger:
    """Crosses off what was used against what the order says."""

    def __init__(self, order: SampleOrder, names: list[SampleNames], batch_size: int) -> None:
        self._order, self._names, self._batch_size = order, names, batch_size
        self._epochs = [0] * len(names)  # in which each source is
        self.counts: defaultdict[tuple[int, int], Counter[str]] = defaultdict(Counter)
        self.faults: list[Fault] = []

    def enter(self, step: int, ranks: list[Step]) -> None:
        """Enter what the ranks that left word of a step used in it; which of them did makes no difference."""
        where = f"step {step}"
        ids = Counter(name for used in ranks for name in used.ids)
        bad = Counter(name for used in ranks for name in used.bad)
        for position in range(step * self._batch_size, (step + 1) * self._batch_size):
            self._cross_off(self._order(position), ids, bad, where)
        for name in (ids + bad).elements():
            self._enter_extra(name, where)

    def _cross_off(self, place: Place, ids: Counter[str], bad: Counter[str], where: str) -> None:
        """Find what stands at a place among what was used."""
        count = self.counts[place.source, place.epoch]
        self._epochs[place.source] = place.epoch
        name = self._names[place.source](place.sample)
        unnamed = (
            f"source {place.source}, sample {place.sample}"  # as of a record whose key could not be read
        )
        if name is not None and ids[name]:
            ids[name] -= 1
            count["used"] += 1
            return
        for bad_name in (name, unnamed):
            if bad_name is not None and bad[bad_name]:
                bad[bad_name] -= 1
                count["bad"] += 1
                return
        count["missing"] += 1
        self.faults.append(
            Fault(id=name or unnamed, reason=f"{where}: was to be used and was not ({unnamed})")
        )

    def _enter_extra(self, name: str, where: str) -> None:
        """Enter a sample that the order does not have in this step."""
        for source, names in enumerate(self._names):
            if names.holds(name):
                self.counts[source, self._epochs[source]]["twice"] += 1
                self.faults.append(
                    Fault(id=name, reason=f"{where}: used where the order does not have it (source {source})")
                )
                return
        self.faults.append(Fault(id=name, reason=f"{where}: used, but no source of the run holds it"))


def _whole_lines(path: Path, faults: list[Fault]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, content) of a log's lines; the last line of an attempt may be torn, others are faults."""
    torn: list[Fault] = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        where = f"{path.name}, line {number}"
        line = _parse(raw)
        if line is None:
            torn.append(Fault(id=where, reason="unreadable"))
            continue
        if "attempt" not in line:
            faults.extend(torn)
        torn.clear()
        yield where, line


def _parse(raw: bytes) -> dict[str, Any] | None:
    """Return a line that says when an attempt began or what a step used; None: it is neither."""
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    if not isinstance(line, dict):
        return None
    numbers = ("attempt", "from_step", "world") if "attempt" in line else ("step",)
    names = [] if "attempt" in line else [line.get("ids"), line.get("bad", [])]
    fits = all(isinstance(line.get(key), int) for key in numbers) and all(
        isinstance(part, list) and all(isinstance(name, str) for name in part) for part in names
    )
    return line if fits else None


def _attempts(lines: Iterable[dict[str, Any]]) -> list[Attempt]:
    """Return the attempts of rank 0's log, each with the step at which the first later one takes over."""
    found: list[Attempt] = []
    end = None
    for line in reversed([line for line in lines if "attempt" in line]):
        first = line["from_step"]
        world = max(line["world"], 1)
        found.append(Attempt(number=line["attempt"], first_step=first, end_step=end, world=world))
        end = first if end is None else min(first, end)
    return found[::-1]


def _before(attempts: list[Attempt]) -> Attempt:
    """Return the attempt that took the steps of which no log tells, if there are such."""
    first = min((attempt.first_step for attempt in attempts), default=None)
    return Attempt(number=-1, first_step=0, end_step=first, world=1)


def _steps_logged(logs: SampleLogs) -> int:
    """Return how many steps every rank of the last attempt wrote down."""
    if not logs.attempts:
        return 0
    last = logs.attempts[-1]
    of_ranks = (logs.steps.get((last.number, rank), {}) for rank in range(last.world))
    return min(max(steps, default=last.first_step - 1) + 1 for steps in of_ranks)


def _source_and_values(item: tuple[tuple[int, int], Counter[str]]) -> tuple[int, tuple[int, ...]]:
    (source, _), count = item
    return source, tuple(count[column] for column in COLUMNS)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
