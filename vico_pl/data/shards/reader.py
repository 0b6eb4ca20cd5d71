"""Sets of shards: any sample of a set by its number, whatever came before it.

A shard is a WebDataset tar, in which the members of a sample are neighbours: so a sample is one range of
bytes, and its side index (`index.py`) tells which. A plain tar on a disk is read in place (`local.py`). A
shard at a URL, or a compressed one, is first fetched or unpacked whole (`cached.py`, `remote.py`).
`locations.py` tells how sets are named.
"""

import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Thread
from typing import Any, Protocol, runtime_checkable

import numpy as np
import webdataset as wds

from vico_pl.data.shards.cached import open_streamed
from vico_pl.data.shards.index import INDEX_NAME, PLAN_NAME, ShardEntry, parse_entries
from vico_pl.data.shards.indexing import index_folder
from vico_pl.data.shards.local import open_folder
from vico_pl.data.shards.locations import Source, is_packed, list_shards, parse_source
from vico_pl.data.shards.opened import (
    MAX_OPEN,
    OpenShard,
    OpenShards,
    read_contents,
    write_contents,
)
from vico_pl.data.shards.remote import DEFAULT_STREAMING, StreamingConfig, build_cache, fetch_bytes
from vico_pl.data.shards.sizes import UNKNOWN_SIZE, SampleSize
from vico_pl.data.shards.tars import MAX_RECORD_BYTES, read_members
from vico_pl.errors import RecordError
from vico_pl.files import atomic_path
from vico_pl.types import Record


@runtime_checkable
class Shards(Protocol):
    """Opens the shards of a set by their numbers."""

    def open(self, number: int) -> OpenShard:
        """Open a shard; `RecordError` if that cannot be."""

    def sizes(self, number: int) -> np.ndarray | None:
        """Return what its samples cost, int32 (n, 4); None: unknown."""

    def fetch(self, number: int) -> None:
        """Bring a shard to this machine that will be opened."""

    def look(self, number: int) -> None:
        """Raise `RecordError` for a shard that cannot be opened, as far as that shows without fetching it."""


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Where every sample of a set lies. Shards are opened when they are asked for."""

    folder: Path | str  # or its URL
    entries: Sequence[ShardEntry]  # in the order of the set
    shards: Shards
    is_streamed: bool = False  # whether shards are fetched or unpacked whole before they are read

    @cached_property
    def names(self) -> list[str]:
        """Tar files, as records, logs and audits name them."""
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
        """Byte positions between the samples of each shard, int64 (n + 1,); opens them all."""
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
        """Return (shard, first byte, byte after the last) of a sample of the set."""
        number, place = self.place(sample)
        return self.names[number], *self.open(number).span(place)

    def size_of(self, sample: int) -> SampleSize:
        """Return what the cost of a sample follows from: on every machine the same."""
        number, place = self.place(sample)
        sizes = self._sizes(number)
        return UNKNOWN_SIZE if sizes is None else SampleSize(*sizes[place].tolist())

    @cached_property
    def open(self) -> OpenShards:
        """Opens a shard by its number, or returns it if it is still open."""
        return OpenShards(self.shards.open)

    @cached_property
    def _sizes(self) -> Callable[[int], np.ndarray | None]:
        return lru_cache(MAX_OPEN)(self.shards.sizes)

    def __getstate__(self) -> dict[str, Any]:
        """Travel to other processes without what is open."""
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
                tar, or a member comes twice or is no plain file.
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
        """Fetch the shards that are read next in the background; what is here already costs nothing."""
        if not self._index.is_streamed or shards == self._expected:
            return
        self._expected = shards
        # A daemon: nobody waits for what nobody will read when the process ends.
        Thread(target=_fetch_all, args=(self._index.shards, shards), daemon=True).start()


def _read_range(descriptor: int, start: int, end: int) -> tuple[str, dict[str, memoryview]]:
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
        ValueError: it is absent or empty, its index is damaged, or a shard cannot be opened of which nobody
            knows how many samples it has.
    """
    found = parse_source(str(source), allow_pipe=streaming.allow_pipe)
    return _open_local(found, streaming) if found.is_local else _open_remote(found, streaming)


def write_index(
    folder: Path | str, *, streaming: StreamingConfig = DEFAULT_STREAMING, workers: int | None = None
) -> ShardIndex:
    """Write `index.json` of a folder of tars, and what lies beside each tar, anew, whatever was there.

    `workers` is the number of processes, by default that of the CPU cores.

    Raises:
        ValueError: the folder is absent or empty, or a tar is unreadable.
    """
    source = parse_source(str(folder))
    if not source.is_local or source.names is not None:
        raise ValueError(f"{folder}: an index is written beside the shards; expected their folder")
    index_folder(Path(source.base), streaming=streaming, workers=workers)
    return read_index(folder, streaming=streaming)


def write_shard(path: Path, records: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write `(key, {extension: content})` records as a tar and what lies beside it, each file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_path(path) as temporary,
        wds.TarWriter(str(temporary), encoder=False, mtime=0, user="", group="") as tar,
    ):
        for key, files in records:
            tar.write({"__key__": key, **files})
    write_contents(read_contents(path), path)


def _open_local(source: Source, streaming: StreamingConfig) -> ShardIndex:
    folder = Path(source.base)
    path = folder / INDEX_NAME
    if source.names is None and not path.exists():
        _check_finished(folder)
        if os.access(folder, os.W_OK):
            index_folder(folder, streaming=streaming)
    entries = parse_entries(path.read_bytes(), where=str(path)) if path.exists() else None
    names = source.names or (list_shards(folder) if entries is None else [entry.name for entry in entries])
    known = {entry.name: entry for entry in entries or ()}
    plain = open_folder(folder, [name for name in names if not is_packed(name)], known)
    if len(plain.entries) == len(names):
        index = ShardIndex(folder=folder, entries=plain.entries, shards=plain)
    else:
        known.update({entry.name: entry for entry in plain.entries})
        shards = open_streamed(source, names, known, build_cache(streaming), in_place=plain)
        index = ShardIndex(folder=folder, entries=shards.entries, shards=shards, is_streamed=True)
    _warn_of_faults(index)
    return index


def _check_finished(folder: Path) -> None:
    if (folder / PLAN_NAME).exists():
        raise ValueError(
            f"{folder}: holds a part of a set that 'vico shards build' began; the same command completes it"
        )


def _open_remote(source: Source, streaming: StreamingConfig) -> ShardIndex:
    content = None if source.commands is not None else fetch_bytes(source.location(INDEX_NAME))
    if content is None and source.names is None:
        raise ValueError(
            f"{source.folder}: no {INDEX_NAME} there; write it where the shards are stored ('vico shards "
            "index'), or name the shards as train-{000000..000031}.tar"
        )
    entries = [] if content is None else parse_entries(content, where=f"{source.folder}/{INDEX_NAME}")
    names = source.names or [entry.name for entry in entries]
    known = {entry.name: entry for entry in entries}
    shards = open_streamed(source, names, known, build_cache(streaming))
    return ShardIndex(folder=source.folder, entries=shards.entries, shards=shards, is_streamed=True)


def _warn_of_faults(index: ShardIndex) -> None:
    """Tell of the shards of this machine that cannot be opened: each of their records will be a bad one.

    Raises:
        ValueError: what lies beside a shard is damaged.
    """
    faults = []
    for number in range(len(index.entries)):
        try:
            index.shards.look(number)
        except RecordError as error:
            faults.append(str(error))
    if faults:
        more = f" (and {len(faults) - 1} more shards)" if len(faults) > 1 else ""
        warnings.warn(f"{faults[0]}{more}; its records will be bad ones", stacklevel=2)


def _fetch_all(shards: Shards, numbers: Sequence[int]) -> None:
    for number in numbers:
        shards.fetch(number)
