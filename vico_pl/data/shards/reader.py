"""Sets of shards: any sample of a set by its number.

A shard is a WebDataset tar, in which the members of a sample are neighbours: a sample is one range of bytes,
given by the shard's sidecar file (`index.py`). A local plain tar is read in place; any other shard is first
fetched into the cache and then read as a local tar (`shard.py`, `cache.py`).
"""

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import webdataset as wds
from tqdm import tqdm

from vico_pl.data.decode import bad_record, decode_record, printable, with_caption
from vico_pl.data.shards.cache import DEFAULT_STREAMING, ShardCache, StreamingConfig, fetch_bytes
from vico_pl.data.shards.index import (
    INDEX_NAME,
    PLAN_NAME,
    Contents,
    ShardEntry,
    parse_entries,
    write_entries,
    write_sidecar,
)
from vico_pl.data.shards.locations import Source, list_shards, parse_source
from vico_pl.data.shards.shard import Shard, ShardIndex
from vico_pl.data.shards.tars import MAX_RECORD_BYTES, measure_shard, read_members, scan_boundaries
from vico_pl.errors import RecordError
from vico_pl.files import atomic_path
from vico_pl.types import BadRecord, Record, Sample

_THREADS = 4
Job = TypeVar("Job")
Result = TypeVar("Result")
_FEW_BYTES = 2**26  # reading as much takes less time than starting processes


class RecordReader:
    """Reads any record of a set with one positioned read."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._expected: Sequence[int] = ()

    def __call__(self, sample: int) -> Record:
        """Return a record as raw bytes.

        Raises:
            RecordError: its shard cannot be opened, the bytes cannot be read or are no readable part of a
                tar, or a member is a duplicate or no plain file.
        """
        number, place = self._index.place(sample)
        shard, opened = self._index.names[number], self._index.open(number)
        start, end = opened.span(place)
        try:
            key, files = _read_range(opened.descriptor, start, end)
        except RecordError as error:
            raise RecordError(f"bytes {start} to {end} of {shard} {error}", kind=error.kind) from error
        return Record(shard=shard, key=key, files=files)

    def expect(self, shards: Sequence[int]) -> None:
        """Fetch the shards that are read next in the background."""
        if not self._index.is_streamed or shards == self._expected:
            return
        self._expected = shards
        # A daemon, so that the end of the process does not wait for it.
        Thread(target=_fetch_all, args=(self._index, shards), daemon=True).start()


def _fetch_all(index: ShardIndex, numbers: Sequence[int]) -> None:
    """Fetch shards that no other process fetches; faults show when they are read."""
    for number in numbers:
        with suppress(ValueError, TimeoutError, OSError):
            index.shards[number].open(wait_s=0.0)


def _read_range(descriptor: int, start: int, end: int) -> tuple[str, dict[str, bytes]]:
    if end - start > MAX_RECORD_BYTES:
        raise RecordError(f"are more than a record may have ({MAX_RECORD_BYTES})", kind="tar")
    try:
        return read_members(os.pread(descriptor, end - start, start))
    except OSError as error:
        raise RecordError(f"cannot be read: {error.strerror}", kind="io") from error
    except RecordError as error:
        raise RecordError(f"are no record: {error}", kind=error.kind) from error


def read_index(source: Path | str, *, streaming: StreamingConfig = DEFAULT_STREAMING) -> ShardIndex:
    """Open a set of shards.

    Raises:
        ValueError: it is absent or empty, its index is damaged, or a shard that is not counted cannot be
            opened.
    """
    found, cache = parse_source(str(source), allow_pipe=streaming.allow_pipe), ShardCache(streaming)
    known = {entry.name: entry for entry in _read_entries(found, streaming)}
    names = found.names or list(known) or list_shards(Path(found.base))
    shards = [Shard(source=found, name=name, cache=cache, entry=known.get(name)) for name in names]
    index = ShardIndex(source=found, shards=_prepare_all(shards, found))
    _warn_of_faults(index)
    return replace(index, has_sizes=_fetch_sizes(index.shards)) if index.is_streamed else index


def write_index(
    folder: Path | str, *, streaming: StreamingConfig = DEFAULT_STREAMING, workers: int | None = None
) -> ShardIndex:
    """Rebuild `index.json` of a folder and the sidecar of each shard, in several processes.

    Raises:
        ValueError: the folder is absent or empty, or a tar is unreadable.
    """
    source = parse_source(str(folder))
    if not source.is_local or source.names is not None:
        raise ValueError(f"{folder}: an index is written next to the shards; expected their folder")
    _index_folder(source, streaming, workers)
    return read_index(folder, streaming=streaming)


def _index_folder(source: Source, streaming: StreamingConfig, workers: int | None = None) -> None:
    folder, cache = Path(source.base), ShardCache(streaming)
    shards = [Shard(source=source, name=name, cache=cache, entry=None) for name in list_shards(folder)]
    workers = workers or worth_processes([shard.original for shard in shards])
    entries = run_parallel(Shard.index, shards, workers=workers, title=f"index of {folder}")
    write_entries(list(entries), folder / INDEX_NAME)


def write_shard(path: Path, records: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write `(key, {extension: content})` records as a tar and its sidecar, each in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"encoder": False, "mtime": 0, "user": "", "group": ""}
    with atomic_path(path) as temporary, wds.TarWriter(str(temporary), **options) as tar:
        for key, files in records:
            tar.write({"__key__": key, **files})
    bounds = scan_boundaries(path)
    write_sidecar(Contents(bounds, measure_shard(path, bounds)), path)


def _read_entries(source: Source, streaming: StreamingConfig) -> list[ShardEntry]:
    """Read `index.json`, or write it in a folder that has none; empty: there is none, shards are counted."""
    where = f"{source.folder}/{INDEX_NAME}"
    if not source.is_local:
        content = None if source.commands is not None else fetch_bytes(source.location(INDEX_NAME))
        if content is None and source.names is None:
            raise ValueError(
                f"{source.folder}: no {INDEX_NAME} there; write it where the shards are stored ('vico shards "
                "index'), or name the shards as train-{000000..000031}.tar"
            )
        return [] if content is None else parse_entries(content, where=where)
    path = Path(source.base, INDEX_NAME)
    if source.names is None and not path.exists():
        if path.with_name(PLAN_NAME).exists():
            started = "holds a part of a set that 'vico shards build' began; the same command completes it"
            raise ValueError(f"{source.folder}: {started}")
        if os.access(source.base, os.W_OK):
            _index_folder(source, streaming)
    return parse_entries(path.read_bytes(), where=where) if path.exists() else []


def _prepare_all(shards: Sequence[Shard], source: Source) -> list[Shard]:
    """Count the shards that `index.json` does not list, and write missing sidecars of local tars."""
    local = [shard for shard in shards if shard.in_place and _is_new(shard)]
    workers = worth_processes([shard.original for shard in local])
    title = f"index of {source.folder}"
    prepared = {s.name: s for s in run_parallel(_prepare, local, workers=workers, title=title)}
    remote = [shard for shard in shards if shard.entry is None and not shard.in_place]
    new = [shard for shard in remote if shard.contents() is None]
    if new:
        warnings.warn(
            f"{source.folder}: {len(new)} of its shards are in no {INDEX_NAME}, so each is fetched once to "
            f"count its samples; an {INDEX_NAME} next to them avoids that ('vico shards index' writes it)",
            stacklevel=3,
        )
    with _threads() as pool:
        bar = tqdm(pool.map(_prepare, remote), total=len(remote), unit="shard", disable=None if new else True)
        prepared.update({shard.name: shard for shard in bar})
    return [prepared.get(shard.name, shard) for shard in shards]


def _is_new(shard: Shard) -> bool:
    return shard.entry is None or (shard.original.exists() and shard.contents() is None)


def _prepare(shard: Shard) -> Shard:
    if shard.entry is not None:
        with suppress(ValueError):  # reported when it is read
            shard.open()
    return shard.counted()


def _fetch_sizes(shards: Sequence[Shard]) -> bool:
    with _threads() as pool:
        return all(map(Shard.fetch_sizes, shards[:1])) and all(pool.map(Shard.fetch_sizes, shards[1:]))


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Yield threads that fetch; after a failure, what has not begun is not fetched."""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _warn_of_faults(index: ShardIndex) -> None:
    """Warn of local shards that cannot be opened: their records will be bad ones."""
    faults = []
    for shard in index.shards:
        try:
            shard.check()
        except RecordError as error:
            faults.append(str(error))
    if faults:
        more = f" (and {len(faults) - 1} more shards)" if len(faults) > 1 else ""
        warnings.warn(f"{faults[0]}{more}; its records will be bad ones", stacklevel=3)


def run_parallel(
    function: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int | None, title: str, done: int = 0
) -> Iterator[Result]:
    """Yield `function(job)` of each job in order.

    `workers` is the number of processes, by default that of the CPU cores; 1: this process. `done` jobs were
    finished before. The bar is shown only in a terminal.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    hidden = True if len(jobs) < 2 else None
    with tqdm(total=done + len(jobs), initial=done, desc=title, unit="shard", disable=hidden) as bar:
        for result in map(function, jobs) if workers < 2 else _by_processes(function, jobs, workers):
            bar.update()
            yield result


def worth_processes(paths: Sequence[Path]) -> int | None:
    """Return the number of processes for reading files: 1 if they are small, else the default."""
    return 1 if sum(path.stat().st_size for path in paths) < _FEW_BYTES else None


def _by_processes(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    pool = ProcessPoolExecutor(workers, initializer=_end_with_parent, initargs=(os.getpid(),))
    try:
        yield from pool.map(function, jobs)
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent(parent: int) -> None:
    """Leave Ctrl-C to the parent process, and exit when it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def read_samples(
    source: Path | str, *, streaming: StreamingConfig = DEFAULT_STREAMING, caption_prompt: str | None = None
) -> Iterator[Sample]:
    """Yield the usable samples of a set in order."""
    items = read_all(read_index(source, streaming=streaming), caption_prompt=caption_prompt)
    return (item for item in items if isinstance(item, Sample))


def find_faults(index: ShardIndex, *, caption_prompt: str | None = None) -> Iterator[BadRecord]:
    """Decode every record and yield the bad ones; a shard that cannot be opened is yielded once."""
    dead: set[str] = set()
    for item in read_all(index, caption_prompt=caption_prompt):
        if isinstance(item, BadRecord) and item.reason not in dead:
            yield item
            if item.kind == "shard":
                dead.add(item.reason)


def read_all(index: ShardIndex, *, caption_prompt: str | None = None) -> Iterator[Sample | BadRecord]:
    """Yield every record of a set in order, decoded or as a bad record."""
    reader = RecordReader(index)
    for position in range(index.num_samples):
        name = f"{index.names[index.place(position)[0]]}, sample {position} of the set"
        try:
            record = reader(position)
            name = printable(record.id)
            yield decode_record(with_caption(record, caption_prompt))
        except RecordError as error:
            yield bad_record(name, error)
