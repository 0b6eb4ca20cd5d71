"""Opens shards: a local plain tar in place, any other one in the cache; both with a sidecar file."""

import errno
import hashlib
import os
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vico_pl.data.shards.cache import ShardCache, StreamingConfig, build_cache, fetch_bytes
from vico_pl.data.shards.index import (
    INDEX_NAME,
    Contents,
    ShardEntry,
    check_contents,
    load_table,
    parse_sidecar,
    read_sidecar,
    read_sizes,
    shard_stem,
    side_index_path,
    write_entries,
    write_sidecar,
)
from vico_pl.data.shards.locations import Source, list_shards, parse_source
from vico_pl.data.shards.parallel import run_parallel, worth_processes
from vico_pl.data.shards.sizes import measure_shard
from vico_pl.data.shards.tars import scan_boundaries
from vico_pl.errors import RecordError

MAX_OPEN = 128  # shards of a set: several sets share the 1,024 files that a process may usually open
FAILURE_S = 60.0  # for which a shard that could not be opened is not tried again
_THREADS = 4


class OpenShard:
    """An open tar and where its samples are; it remains readable when its file is removed."""

    def __init__(self, descriptor: int, bounds: np.ndarray) -> None:
        """Take over an open file."""
        self.descriptor, self.bounds = descriptor, bounds

    def span(self, place: int) -> tuple[int, int]:
        """Return the first byte of a sample, and the byte after its last."""
        return int(self.bounds[place]), int(self.bounds[place + 1])

    def __del__(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


class OpenShards:
    """Opens shards by number and keeps the most recent ones open; a failure is remembered for a while."""

    def __init__(self, open_: Callable[[int], OpenShard]) -> None:
        """Open nothing yet."""
        self._open = open_
        self._recent: OrderedDict[int, OpenShard] = OrderedDict()
        self._failures: dict[int, tuple[float, RecordError]] = {}

    def __call__(self, number: int) -> OpenShard:
        """Return a shard.

        Raises:
            RecordError: it cannot be opened.
        """
        if number not in self._recent:
            self._recent[number] = self._reopen(number)
            if len(self._recent) > MAX_OPEN:
                self._recent.popitem(last=False)
        self._recent.move_to_end(number)
        return self._recent[number]

    def _reopen(self, number: int) -> OpenShard:
        failed_at, failure = self._failures.get(number, (0.0, None))
        if failure is not None and time.monotonic() - failed_at < FAILURE_S:
            raise RecordError(str(failure), kind=failure.kind)
        try:
            return self._open(number)
        except RecordError as error:
            self._failures[number] = time.monotonic(), error
            raise
        except ValueError as error:  # its sidecar is damaged
            raise RecordError(str(error), kind="shard") from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without open files."""
        return OpenShards, (self._open,)


def index_tar(path: Path) -> Contents | None:
    """Read a tar and write its sidecar; if the folder is read-only, return the contents.

    Raises:
        ValueError: it is no readable tar.
    """
    try:
        bounds = scan_boundaries(path)
    except ValueError as error:
        remedy = "fetch or write it again, then run 'vico shards index'"
        raise ValueError(f"{path}: {error}; {remedy}") from error
    contents = Contents(bounds, measure_shard(path, bounds))
    try:
        write_sidecar(contents, path)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return contents
    return None


def index_folder(folder: Path, streaming: StreamingConfig, workers: int | None = None) -> None:
    """Write the sidecar of each shard of a folder, and `index.json` last.

    Raises:
        ValueError: the folder has no shard, or one is no readable tar.
    """
    paths = [folder / name for name in list_shards(folder)]
    index = partial(_index_shard, streaming=streaming)
    workers = workers or worth_processes(paths)
    entries = list(run_parallel(index, paths, workers=workers, title=f"index of {folder}"))
    write_entries(entries, folder / INDEX_NAME)


def _index_shard(path: Path, *, streaming: StreamingConfig) -> ShardEntry:
    source = parse_source(str(path))
    if source.is_in_place(path.name):
        contents = index_tar(path)
    else:
        contents = measure_cached(source, path.name, build_cache(streaming))
        write_sidecar(contents, path)
    contents = contents or read_sidecar(path)
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    assert contents is not None  # because it was just written
    count = len(contents.bounds) - 1
    return ShardEntry(name=path.name, num_samples=count, num_bytes=path.stat().st_size, sha256=checksum)


def open_in_place(path: Path, entry: ShardEntry, in_memory: dict[str, Contents]) -> OpenShard:
    """Open a local plain tar; `in_memory` has the contents of shards whose sidecar cannot be written.

    Raises:
        RecordError: it is absent, damaged or not the one that was indexed.
        ValueError: its sidecar is damaged.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _absent(path, error) from error
    try:
        num_bytes = check_size(path, entry)
        contents = in_memory.get(entry.name) or read_sidecar(path) or _index_now(path, in_memory)
        check_contents(contents, path, count=entry.num_samples, num_bytes=num_bytes)
        return OpenShard(os.dup(descriptor), contents.bounds)
    finally:
        os.close(descriptor)


def _index_now(path: Path, in_memory: dict[str, Contents]) -> Contents:
    try:
        contents = index_tar(path)
    except ValueError as error:
        raise RecordError(str(error), kind="shard") from error
    if contents is not None:
        in_memory[path.name] = contents
    contents = contents or read_sidecar(path)
    assert contents is not None  # because it was just written
    return contents


def check_size(path: Path, entry: ShardEntry) -> int:
    """Return the bytes of a local shard.

    Raises:
        RecordError: it is absent, or not the one that was indexed.
    """
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise _absent(path, error) from error
    if entry.num_bytes not in (None, num_bytes):
        sizes = f"{num_bytes} bytes, not {entry.num_bytes}"
        reason = (
            f"{path}: its size differs from {INDEX_NAME} ({sizes}); run 'vico shards index {path.parent}'"
        )
        raise RecordError(reason, kind="shard")
    return num_bytes


def _absent(path: Path, error: OSError) -> RecordError:
    reason = "absent" if isinstance(error, FileNotFoundError) else error.strerror
    remedy = f"restore it or run 'vico shards index {path.parent}'"
    return RecordError(f"{path}: named in {INDEX_NAME} but {reason}; {remedy}", kind="shard")


def open_cached(
    source: Source, name: str, cache: ShardCache, entry: ShardEntry | None, *, wait_s: float = -1.0
) -> OpenShard:
    """Open a shard in the cache, fetched if it is not there; another process is waited for `wait_s` seconds.

    Raises:
        RecordError: it cannot be fetched, is damaged or not the one that was indexed.
        TimeoutError: another process fetches it.
    """
    path = _cached_path(source, name, cache, entry)
    index = partial(_index_cached, path=path, entry=entry)
    descriptor = cache.open(source.location(name), path, entry, check=index, wait_s=wait_s)
    try:
        contents = _cached_sidecar(path) or index(Path(f"/dev/fd/{descriptor}"))
        count = len(contents.bounds) - 1 if entry is None else entry.num_samples
        check_contents(contents, path, count=count, num_bytes=os.fstat(descriptor).st_size)
        return OpenShard(os.dup(descriptor), contents.bounds)
    finally:
        os.close(descriptor)


def measure_cached(source: Source, name: str, cache: ShardCache) -> Contents:
    """Return the contents of a shard, fetched and measured unless the cache knows them.

    Raises:
        ValueError: it cannot be fetched or is damaged.
    """
    path = _cached_path(source, name, cache)
    contents = _cached_sidecar(path)
    if contents is None or contents.sizes is None:
        shard = open_cached(source, name, cache, None)
        sizes = measure_shard(Path(f"/dev/fd/{shard.descriptor}"), shard.bounds)
        contents = Contents(shard.bounds, sizes)
        write_sidecar(contents, path)
    return contents


def count_cached(source: Source, names: Sequence[str], cache: ShardCache) -> dict[str, ShardEntry]:
    """Count the samples of shards that `index.json` does not list; the counts remain in the cache.

    Raises:
        ValueError: one cannot be fetched or is damaged.
    """
    new = [name for name in names if not side_index_path(_cached_path(source, name, cache)).exists()]
    if new:
        warnings.warn(
            f"{source.folder}: {len(new)} of its shards are in no {INDEX_NAME}, so each is fetched once to "
            f"count its samples; an {INDEX_NAME} next to them avoids that ('vico shards index' writes it)",
            stacklevel=2,
        )
    pool = ThreadPoolExecutor(_THREADS)
    try:
        found = pool.map(lambda name: measure_cached(source, name, cache), names)
        bar = tqdm(found, total=len(names), unit="shard", disable=None if new else True)
        counts = [len(contents.bounds) - 1 for contents in bar]
    finally:
        pool.shutdown(cancel_futures=True)
    return {n: ShardEntry(name=n, num_samples=count) for n, count in zip(names, counts, strict=True)}


def fetch_sizes(source: Source, entries: Sequence[ShardEntry], cache: ShardCache) -> bool:
    """Fetch the sidecars of shards, and say whether the sizes of all their samples are known.

    Raises:
        ValueError: one exists but cannot be fetched: machines that could fetch it would assign otherwise.
    """
    fetch = partial(_fetch_sizes_of, source=source, cache=cache)
    pool = ThreadPoolExecutor(_THREADS)
    try:
        return all(map(fetch, entries[:1])) and all(pool.map(fetch, entries[1:]))
    finally:
        pool.shutdown(cancel_futures=True)


def cached_sizes(source: Source, entry: ShardEntry, cache: ShardCache) -> np.ndarray | None:
    """Return the sizes of the samples of a cached or compressed shard; None: unknown."""
    sizes = read_sizes(_cached_path(source, entry.name, cache, entry), entry.num_samples)
    if sizes is None and source.is_local:
        return read_sizes(Path(source.location(entry.name)), entry.num_samples)
    return sizes


def _fetch_sizes_of(entry: ShardEntry, *, source: Source, cache: ShardCache) -> bool:
    if cached_sizes(source, entry, cache) is not None:
        return True
    if source.is_local or source.commands is not None:
        return False
    content = fetch_bytes(source.location(f"{shard_stem(entry.name)}.idx"))
    try:
        found = None if content is None else parse_sidecar(load_table(BytesIO(content)))
    except (ValueError, EOFError):
        return False
    if found is None or found.sizes is None or len(found.sizes) != entry.num_samples:
        return False
    path = _cached_path(source, entry.name, cache, entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sidecar(found, path)
    return True


def _index_cached(tar: Path, *, path: Path, entry: ShardEntry | None) -> Contents:
    """Write the sidecar of the shard cached at `path`, with the sizes that were fetched, if any.

    A counted shard is not measured: sizes must be known on all machines or on none.
    """
    bounds = scan_boundaries(tar)
    count = len(bounds) - 1
    if entry is not None and count != entry.num_samples:
        raise ValueError(f"holds {count} samples, {INDEX_NAME} says {entry.num_samples}")
    contents = Contents(bounds, read_sizes(path, count))
    write_sidecar(contents, path)
    return contents


def _cached_sidecar(path: Path) -> Contents | None:
    """Read a sidecar in the cache; a damaged one is written again."""
    with suppress(ValueError):
        return read_sidecar(path)
    return None


def _cached_path(source: Source, name: str, cache: ShardCache, entry: ShardEntry | None = None) -> Path:
    """Return the path of a shard in the cache: it depends on its URL and, as far as known, its content."""
    content = "" if entry is None else f"{entry.num_bytes or ''}{entry.sha256 or ''}"
    if source.is_local:
        with suppress(FileNotFoundError):  # reported when it is opened
            status = os.stat(source.location(name))
            content = f"{status.st_size} {status.st_mtime_ns}"
    identity = _digest(f"{source.identity(name)} {content}")
    return cache.folder / _digest(source.base) / f"{shard_stem(name)}-{identity}.tar"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]
