"""Sets of shards: any sample of a set by its number.

A shard is a WebDataset tar, in which the members of a sample are neighbours: a sample is one range of bytes,
given by the shard's sidecar file (`index.py`). A local plain tar is read in place; any other shard is first
fetched into the cache and then read as a local tar (`opened.py`, `cache.py`).
"""

import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import webdataset as wds

from vico_pl.data.shards.cache import DEFAULT_STREAMING, ShardCache, StreamingConfig, build_cache, fetch_bytes
from vico_pl.data.shards.index import (
    INDEX_NAME,
    PLAN_NAME,
    Contents,
    ShardEntry,
    parse_entries,
    read_sidecar,
    read_sizes,
    write_sidecar,
)
from vico_pl.data.shards.locations import Source, list_shards, parse_source
from vico_pl.data.shards.opened import (
    MAX_OPEN,
    OpenShard,
    OpenShards,
    cached_sizes,
    check_size,
    count_cached,
    fetch_sizes,
    index_folder,
    index_tar,
    open_cached,
    open_in_place,
)
from vico_pl.data.shards.parallel import run_parallel, worth_processes
from vico_pl.data.shards.sizes import UNKNOWN_SIZE, SampleSize, measure_shard
from vico_pl.data.shards.tars import MAX_RECORD_BYTES, read_members, scan_boundaries
from vico_pl.errors import RecordError
from vico_pl.files import atomic_path
from vico_pl.types import Record


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """A set of shards. Each shard is opened on first use."""

    source: Source
    entries: Sequence[ShardEntry]  # in the order of the set
    cache: ShardCache
    in_memory: dict[str, Contents] = field(default_factory=dict)  # of shards in a read-only folder
    has_sizes: bool = True  # of streamed sets: known of all shards or of none, so that all machines agree

    @property
    def folder(self) -> Path | str:
        """The folder of the set, or its URL without secrets."""
        return self.source.folder

    @cached_property
    def is_streamed(self) -> bool:
        """Whether some shards must be fetched or uncompressed before they are read."""
        return not (self.source.is_local and all(map(self.source.is_in_place, self.names)))

    @cached_property
    def names(self) -> list[str]:
        """File names of the shards."""
        return [entry.name for entry in self.entries]

    @cached_property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard."""
        return [entry.num_samples for entry in self.entries]

    @property
    def num_samples(self) -> int:
        """Samples in the whole set."""
        return self.starts[-1]

    @property
    def boundaries(self) -> list[np.ndarray]:
        """Byte positions between the samples of each shard, int64 (n + 1,); opens all shards."""
        return [self.open(number).bounds for number in range(len(self.entries))]

    @cached_property
    def starts(self) -> list[int]:
        """Number of the first sample of each shard, and the number of samples."""
        return list(accumulate(self.shard_sizes, initial=0))

    def place(self, sample: int) -> tuple[int, int]:
        """Return the number of a sample's shard, and the sample's place in it."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"{self.folder} has {self.num_samples} samples, no sample {sample}")
        number = bisect_right(self.starts, sample) - 1
        return number, sample - self.starts[number]

    def locate(self, sample: int) -> tuple[str, int, int]:
        """Return (shard, first byte, byte after the last) of a sample."""
        number, place = self.place(sample)
        return self.names[number], *self.open(number).span(place)

    def size_of(self, sample: int) -> SampleSize:
        """Return the size of a sample: the same on every machine."""
        number, place = self.place(sample)
        sizes = self._sizes(number)
        return UNKNOWN_SIZE if sizes is None else SampleSize(*sizes[place].tolist())

    @cached_property
    def open(self) -> OpenShards:
        """Opens a shard by its number, unless it is still open."""
        return OpenShards(self._open)

    def fetch(self, number: int) -> None:
        """Fetch a shard into the cache, unless another process does; a fault shows when it is read."""
        with suppress(RecordError, TimeoutError, OSError):
            self._open(number, wait_s=0.0)

    def check(self, number: int) -> None:
        """Open a local shard, but do not fetch any.

        Raises:
            RecordError: it is absent, damaged or not the one that was indexed.
            ValueError: its sidecar is damaged.
        """
        entry = self.entries[number]
        if self.source.is_in_place(entry.name):
            self._open(number)
        elif self.source.is_local:
            check_size(Path(self.source.location(entry.name)), entry)

    def _open(self, number: int, wait_s: float = -1.0) -> OpenShard:
        entry = self.entries[number]
        if self.source.is_in_place(entry.name):
            return open_in_place(Path(self.source.location(entry.name)), entry, self.in_memory)
        return open_cached(self.source, entry.name, self.cache, entry, wait_s=wait_s)

    @cached_property
    def _sizes(self) -> Callable[[int], np.ndarray | None]:
        return lru_cache(MAX_OPEN)(self._read_sizes)

    def _read_sizes(self, number: int) -> np.ndarray | None:
        entry = self.entries[number]
        if not self.has_sizes:
            return None
        if self.source.is_in_place(entry.name):
            return self._sizes_in_place(entry)
        sizes = cached_sizes(self.source, entry, self.cache)
        if sizes is None:  # this machine would assign otherwise than others
            where = f"{self.cache.folder}: the sizes of {entry.name} were"
            raise FileNotFoundError(f"{where} removed during the run; leave the cache alone while it is used")
        return sizes

    def _sizes_in_place(self, entry: ShardEntry) -> np.ndarray | None:
        if entry.name in self.in_memory:
            return self.in_memory[entry.name].sizes
        return read_sizes(Path(self.source.location(entry.name)), entry.num_samples)

    def with_sizes(self) -> "ShardIndex":
        """Return a streamed set after fetching its sizes.

        Raises:
            ValueError: those of a shard exist but cannot be fetched.
        """
        in_place = [entry for entry in self.entries if self.source.is_in_place(entry.name)]
        cached = [entry for entry in self.entries if not self.source.is_in_place(entry.name)]
        known = all(self._sizes_in_place(entry) is not None for entry in in_place)
        return replace(self, has_sizes=known and fetch_sizes(self.source, cached, self.cache))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without open files."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


class RecordReader:
    """Reads any record of a set with one positioned read."""

    def __init__(self, index: ShardIndex) -> None:
        """Open nothing yet."""
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
    for number in numbers:
        index.fetch(number)


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
    found, cache = parse_source(str(source), allow_pipe=streaming.allow_pipe), build_cache(streaming)
    known = {entry.name: entry for entry in _read_entries(found, streaming)}
    names = found.names or list(known) or list_shards(Path(found.base))
    in_memory = _index_in_place(found, names, known)
    uncounted = [name for name in names if name not in known]
    in_place = [name for name in uncounted if found.is_in_place(name)]
    known.update({name: _count_in_place(Path(found.location(name)), in_memory) for name in in_place})
    known.update(count_cached(found, [name for name in uncounted if name not in known], cache))
    entries = [known[name] for name in names]
    index = ShardIndex(source=found, entries=entries, cache=cache, in_memory=in_memory)
    _warn_of_faults(index)
    return index.with_sizes() if index.is_streamed else index


def write_index(
    folder: Path | str, *, streaming: StreamingConfig = DEFAULT_STREAMING, workers: int | None = None
) -> ShardIndex:
    """Rebuild `index.json` of a folder and the sidecar of each shard.

    `workers` is the number of processes, by default that of the CPU cores.

    Raises:
        ValueError: the folder is absent or empty, or a tar is unreadable.
    """
    source = parse_source(str(folder))
    if not source.is_local or source.names is not None:
        raise ValueError(f"{folder}: an index is written next to the shards; expected their folder")
    index_folder(Path(source.base), streaming, workers)
    return read_index(folder, streaming=streaming)


def write_shard(path: Path, records: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write `(key, {extension: content})` records as a tar and its sidecar, each in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_path(path) as temporary,
        wds.TarWriter(str(temporary), encoder=False, mtime=0, user="", group="") as tar,
    ):
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
            index_folder(Path(source.base), streaming)
    return parse_entries(path.read_bytes(), where=where) if path.exists() else []


def _index_in_place(
    source: Source, names: Sequence[str], known: Mapping[str, ShardEntry]
) -> dict[str, Contents]:
    """Write missing and old sidecars; return the contents of shards in a read-only folder."""
    paths = [Path(source.location(name)) for name in names if source.is_in_place(name)]
    paths = [path for path in paths if path.exists() and read_sidecar(path) is None]
    jobs = [(path, path.name in known) for path in paths]
    found = run_parallel(_try_index, jobs, workers=worth_processes(paths), title=f"index of {source.folder}")
    return {path.name: contents for path, contents in zip(paths, found, strict=True) if contents is not None}


def _try_index(job: tuple[Path, bool]) -> Contents | None:
    path, is_counted = job
    try:
        return index_tar(path)
    except ValueError:
        if is_counted:  # it is reported when it is opened
            return None
        raise


def _count_in_place(path: Path, in_memory: Mapping[str, Contents]) -> ShardEntry:
    contents = in_memory.get(path.name) or read_sidecar(path)
    if contents is None:
        raise FileNotFoundError(f"{path}: no such shard")
    return ShardEntry(name=path.name, num_samples=len(contents.bounds) - 1, num_bytes=path.stat().st_size)


def _warn_of_faults(index: ShardIndex) -> None:
    """Warn of local shards that cannot be opened: their records will be bad ones."""
    faults = []
    for number in range(len(index.entries)):
        try:
            index.check(number)
        except RecordError as error:
            faults.append(str(error))
    if faults:
        more = f" (and {len(faults) - 1} more shards)" if len(faults) > 1 else ""
        warnings.warn(f"{faults[0]}{more}; its records will be bad ones", stacklevel=2)
