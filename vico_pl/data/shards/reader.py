"""Sets of shards: any sample of a set by its number.

A shard is a WebDataset tar, in which the members of a sample are neighbours: a sample is one range of bytes,
given by the shard's sidecar file (`index.py`). A local plain tar is read in place; any other shard is first
fetched into the cache and then read as a local tar (`shard.py`, `cache.py`).
"""

import os
import signal
import tarfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, suppress
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
    ShardEntry,
    is_foreign,
    parse_entries,
    write_entries,
    write_sidecar,
)
from vico_pl.data.shards.locations import Source, list_shards, parse_source
from vico_pl.data.shards.shard import MAX_OPEN, Origin, Shard, ShardIndex, is_streamed
from vico_pl.data.shards.tars import MAX_RECORD_BYTES, check_rest, describe_tar, read_members
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
        start, end = opened.sidecar.span(place)
        where = f"bytes {start} to {end} of {shard}"
        if end - start > MAX_RECORD_BYTES:
            raise RecordError(f"{where} are more than a record may have ({MAX_RECORD_BYTES})", kind="tar")
        try:
            key, files = read_members(os.pread(opened.file.descriptor, end - start, start))
        except OSError as error:
            raise RecordError(f"{where} cannot be read: {error.strerror}", kind="io") from error
        except RecordError as error:
            raise RecordError(f"{where} are no record: {error}", kind=error.kind) from error
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
            index.fetch(number)


def read_index(
    source: Path | str, *, streaming: StreamingConfig = DEFAULT_STREAMING, max_open: int = MAX_OPEN
) -> ShardIndex:
    """Open a set of shards. Those that `index.json` lists are checked only when they are read.

    `max_open` of them remain open.

    Raises:
        ValueError: it is absent or empty, its index is damaged, or a shard that is not counted cannot be
            opened.
    """
    found, cache = parse_source(str(source), allow_pipe=streaming.allow_pipe), ShardCache(streaming)
    listed, has_sizes = _read_entries(found, streaming)
    known = {entry.name: entry for entry in listed}
    names = found.names or list(known) or list_shards(Path(found.base))
    new = [name for name in names if name not in known]
    known.update(_count([Shard(source=found, name=name, cache=cache, entry=None) for name in new]))
    if found.is_local:
        _warn_of_missing(Path(found.base), names)
    origin: Origin = "measured"
    if listed and is_streamed(found, names):
        origin = "stored" if has_sizes and not new else "unknown"
    return ShardIndex(found, cache, [known[name] for name in names], origin, max_open)


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
    if sum(shard.original.stat().st_size for shard in shards) < _FEW_BYTES:
        workers = 1
    entries = list(run_parallel(Shard.index, shards, workers=workers, title=f"index of {folder}"))
    has_sizes = not any(is_foreign(shard.original) for shard in shards)
    write_entries(entries, folder / INDEX_NAME, has_sizes=has_sizes)


def write_shard(path: Path, records: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write `(key, {extension: content})` records as a tar and its sidecar, each in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"encoder": False, "mtime": 0, "user": "", "group": ""}
    with atomic_path(path) as temporary, wds.TarWriter(str(temporary), **options) as tar:
        for key, files in records:
            tar.write({"__key__": key, **files})
    write_sidecar(describe_tar(path), path)


def _read_entries(source: Source, streaming: StreamingConfig) -> tuple[list[ShardEntry], bool]:
    """Read `index.json`, or write it in a folder that has none; empty: there is none, shards are counted."""
    where = f"{source.folder}/{INDEX_NAME}"
    if not source.is_local:
        content = None if source.commands is not None else fetch_bytes(source.location(INDEX_NAME))
        if content is None and source.names is None:
            raise ValueError(
                f"{source.folder}: no {INDEX_NAME} there; write it where the shards are stored ('vico shards "
                "index'), or name the shards as train-{000000..000031}.tar"
            )
        return ([], False) if content is None else parse_entries(content, where=where)
    path = Path(source.base, INDEX_NAME)
    if source.names is None and not path.exists():
        if path.with_name(PLAN_NAME).exists():
            started = "holds a part of a set that 'vico shards build' began; the same command completes it"
            raise ValueError(f"{source.folder}: {started}")
        if os.access(source.base, os.W_OK):
            _index_folder(source, streaming)
    return parse_entries(path.read_bytes(), where=where) if path.exists() else ([], False)


def _warn_of_missing(folder: Path, names: Sequence[str]) -> None:
    """Warn of absent shards, after one listing of their folder."""
    present = set(os.listdir(folder))
    absent = [name for name in names if name not in present]
    if absent:
        remedy = f"restore it or run 'vico shards index {folder}'"
        more = f" (and {len(absent) - 1} more shards)" if len(absent) > 1 else ""
        fault = f"{folder / absent[0]}: named in {INDEX_NAME} but absent; {remedy}{more}"
        warnings.warn(f"{fault}; its records will be bad ones", stacklevel=3)


def _count(shards: Sequence[Shard]) -> dict[str, ShardEntry]:
    """Count the samples of shards that `index.json` does not list."""
    fetched = [shard for shard in shards if not shard.in_place and shard.find_sidecar() is None]
    if fetched:
        warnings.warn(
            f"{fetched[0].source.folder}: {len(fetched)} of its shards are in no {INDEX_NAME}, so each is "
            f"fetched once to count its samples; 'vico shards index' where they are stored avoids that",
            stacklevel=3,
        )
    with ExitStack() as stack:
        pool = ThreadPoolExecutor(_THREADS)
        stack.callback(pool.shutdown, cancel_futures=True)  # what has not begun when one of them fails
        counted, hidden = pool.map(Shard.counted, shards), None if fetched else True
        bar = tqdm(counted, "count samples", len(shards), unit="shard", disable=hidden)
        return {entry.name: entry for entry in bar}


def run_parallel(
    function: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int | None, title: str, done: int = 0
) -> Iterator[Result]:
    """Yield `function(job)` of each job in order.

    `workers` is the number of processes, by default that of the CPU cores; 1: this process. `done` jobs were
    finished before. The bar is shown only in a terminal.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    with ExitStack() as stack:
        results: Iterable[Result] = map(function, jobs)
        if workers > 1:
            pool = ProcessPoolExecutor(workers, initializer=_end_with_parent, initargs=(os.getpid(),))
            stack.callback(pool.shutdown, cancel_futures=True)
            results = pool.map(function, jobs)
        hidden = True if len(jobs) < 2 else None
        yield from tqdm(results, title, done + len(jobs), initial=done, unit="shard", disable=hidden)


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
    """Decode every record and yield the bad ones; a shard that cannot be opened or is cut is yielded once."""
    dead: set[str] = set()
    for item in read_all(index, caption_prompt=caption_prompt):
        if isinstance(item, BadRecord) and item.reason not in dead:
            yield item
            if item.kind == "shard":
                dead.add(item.reason)
    yield from _cut_shards(index)


def _cut_shards(index: ShardIndex) -> Iterator[BadRecord]:
    """Yield the local tars without their end, which may have lost records; fetched ones came whole."""
    for number, name in enumerate(index.names):
        shard = index.shard(number)
        if shard.in_place:
            with suppress(RecordError, OSError):  # it cannot be opened, and neither could its records
                end = index.open(number).sidecar.end
                try:
                    with shard.original.open("rb") as file:
                        check_rest(file, end)
                except tarfile.ReadError as error:
                    yield bad_record(name, RecordError(str(error), kind="tar"))


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
