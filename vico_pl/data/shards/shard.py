"""A shard, read in place if it is a local plain tar and else from its copy in the cache; a set of shards."""

import errno
import hashlib
import math
import os
import shutil
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from vico_pl.data.shards.cache import ShardCache
from vico_pl.data.shards.index import (
    INDEX_NAME,
    OpenFile,
    ShardEntry,
    Sidecar,
    is_foreign,
    open_sidecar,
    shard_stem,
    side_index_path,
    write_sidecar,
)
from vico_pl.data.shards.locations import Source, without_secrets
from vico_pl.data.shards.tars import UNKNOWN_SIZE, SampleSize, describe_tar
from vico_pl.errors import RecordError, is_out_of_files
from vico_pl.files import atomic_path

MAX_OPEN = 160  # shards of all sets of a run, with up to three files each: a process may often open 1,024
FAILURE_S = 60.0  # for which a shard that could not be opened is not tried again
# Where the sizes of samples come from: measured on the files, stored next to shards to fetch, or unknown. All
# machines must know the same, or their ranks would assign samples otherwise.
Origin = Literal["measured", "stored", "unknown"]
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class OpenShard:
    """An open tar and its sidecar."""

    file: OpenFile
    sidecar: Sidecar


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard and its sidecar."""

    source: Source
    name: str
    cache: ShardCache
    entry: ShardEntry | None  # None: it is not in index.json, so its samples are counted

    @property
    def in_place(self) -> bool:
        """Whether it is read where it is: a local tar that is not compressed."""
        return self.source.is_local and self.name.endswith(".tar")

    @property
    def original(self) -> Path:
        """The path of a local shard."""
        return Path(self.source.location(self.name))

    @cached_property
    def cached(self) -> Path:
        """Its path in the cache, which depends on its URL and, as far as known, its content."""
        content = "" if self.entry is None else f"{self.entry.num_bytes or ''}{self.entry.sha256 or ''}"
        if self.source.is_local:
            with suppress(FileNotFoundError):  # reported when it is opened
                status = self.original.stat()
                content = f"{status.st_size} {status.st_mtime_ns}"
        identity = _digest(f"{self.source.identity(self.name)} {content}")
        return self.cache.folder / _digest(self.source.base) / f"{shard_stem(self.name)}-{identity}.tar"

    def open(self, *, wait_s: float = -1.0) -> OpenShard:
        """Open it, fetched if it is not in the cache; another process is waited for `wait_s` seconds.

        A sidecar that is missing or does not fit is rebuilt.

        Raises:
            RecordError: it is absent, cannot be fetched, is damaged or not the one that was indexed.
            TimeoutError: another process fetches it.
        """
        file = OpenFile(self._open_file(wait_s))
        sidecar = self.find_sidecar(os.fstat(file.descriptor).st_size)
        return OpenShard(file, sidecar or self._index_tar(Path(f"/dev/fd/{file.descriptor}")))

    def find_sidecar(self, num_bytes: int = sys.maxsize) -> Sidecar | None:
        """Open its sidecar, if there is one that fits its entry and a tar of `num_bytes`."""
        for path in self._places():
            sidecar = open_sidecar(side_index_path(path))
            if sidecar is None or sidecar.end > num_bytes:
                continue
            if self.entry is None or self.entry.num_samples == sidecar.num_samples:
                return sidecar
        return None

    def stored_sidecar(self) -> Sidecar:
        """Open the sidecar that is stored next to a shard to fetch, fetched if it is not in the cache.

        Raises:
            ValueError: it cannot be fetched or does not fit: machines that have it would assign otherwise.
        """
        location = self.source.location(f"{shard_stem(self.name)}.idx")
        path = self.cached.with_suffix(".stored.idx")
        try:
            return Sidecar(self.cache.open(location, path, None, check=self._check_stored))
        except RecordError as error:
            remedy = f"{INDEX_NAME} says that it is there; restore it or run 'vico shards index' where it is"
            raise ValueError(f"{error}; {remedy}") from error

    def counted(self) -> ShardEntry:
        """Describe it, after counting its samples.

        Raises:
            ValueError: it cannot be fetched or is damaged.
        """
        sidecar = (None if self.in_place else self.find_sidecar()) or self.open().sidecar
        num_bytes = self.original.stat().st_size if self.in_place else None
        return ShardEntry(name=self.name, num_samples=sidecar.num_samples, num_bytes=num_bytes)

    def index(self) -> ShardEntry:
        """Write the sidecar of a local shard next to it, even if there is one, and describe the shard.

        Raises:
            ValueError: it is unreadable.
        """
        sidecar = self._index_tar(self.original) if self.in_place else self.open().sidecar
        if not self.in_place and not is_foreign(self.original):
            with atomic_path(side_index_path(self.original)) as temporary:
                shutil.copyfile(side_index_path(self.cached), temporary)
        with self.original.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
            num_bytes = file.tell()
        return ShardEntry(self.name, sidecar.num_samples, num_bytes, checksum)

    def _open_file(self, wait_s: float) -> int:
        if not self.in_place:
            location = self.source.location(self.name)
            return self.cache.open(location, self.cached, self.entry, check=self._index_tar, wait_s=wait_s)
        path, expected = self.original, self.entry and self.entry.num_bytes
        remedy = f"restore it or run 'vico shards index {path.parent}'"
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            if is_out_of_files(error):
                raise
            reason = "absent" if isinstance(error, FileNotFoundError) else error.strerror
            raise RecordError(f"{path}: {reason}; {remedy}", kind="shard") from error
        num_bytes = os.fstat(descriptor).st_size
        if expected not in (None, num_bytes):
            os.close(descriptor)
            reason = f"its size differs from {INDEX_NAME} ({num_bytes} bytes, not {expected})"
            raise RecordError(f"{path}: {reason}; {remedy}", kind="shard")
        return descriptor

    def _index_tar(self, tar: Path) -> Sidecar:
        """Write the sidecar of a tar with its content, where it can be written."""
        shown = without_secrets(self.source.location(self.name))
        try:
            table = describe_tar(tar)
        except ValueError as error:
            remedy = "fetch or write it again, then run 'vico shards index'"
            raise RecordError(f"{shown}: {error}; {remedy}", kind="shard") from error
        if self.entry is not None and len(table) - 1 != self.entry.num_samples:
            counts = f"holds {len(table) - 1} samples, {INDEX_NAME} says {self.entry.num_samples}"
            raise RecordError(f"{shown}: {counts}; run 'vico shards index' where it is", kind="shard")
        if self.in_place and not is_foreign(self.original):
            try:
                return write_sidecar(table, self.original)
            except OSError as error:
                if error.errno not in _READ_ONLY:
                    raise
        self.cached.parent.mkdir(parents=True, exist_ok=True)
        return write_sidecar(table, self.cached)

    def _places(self) -> Iterator[Path]:
        """Yield the tars next to which the sidecar may be: the shard, and where the cache has or had it."""
        if self.in_place:
            yield self.original
        yield self.cached

    def _check_stored(self, path: Path) -> None:
        sidecar = open_sidecar(path)
        if sidecar is None or self.entry is None or sidecar.num_samples != self.entry.num_samples:
            location = without_secrets(self.source.location(f"{shard_stem(self.name)}.idx"))
            raise RecordError(f"{location}: no sidecar of {self.name} as in {INDEX_NAME}", kind="shard")


class ShardIndex:
    """A set of shards. Each shard is opened on first use, and the most recent ones remain open."""

    def __init__(
        self,
        source: Source,
        cache: ShardCache,
        entries: Sequence[ShardEntry],
        origin: Origin = "measured",
        max_open: int = MAX_OPEN,
    ) -> None:
        """Open nothing.

        `entries` are in the order of the set; `origin` is that of the sizes of samples; `max_open` shards
        remain open.
        """
        self.source, self.cache, self.entries = source, cache, entries
        self.origin, self.max_open = origin, max_open
        self.folder = source.folder  # or the URL without secrets
        self.names = [entry.name for entry in entries]
        self.shard_sizes = [entry.num_samples for entry in entries]
        self.starts = list(accumulate(self.shard_sizes, initial=0))  # samples before each shard, and all
        self.num_samples = self.starts[-1]
        self.is_streamed = is_streamed(source, self.names)
        self._failures: dict[int, tuple[float, RecordError]] = {}
        self._recent = lru_cache(max_open)(lambda number: self.shard(number).open())
        self._sidecars = lru_cache(max_open)(self._open_sidecar)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to other processes without open files."""
        return ShardIndex, (self.source, self.cache, self.entries, self.origin, self.max_open)

    def shard(self, number: int) -> Shard:
        """Return a shard."""
        entry = self.entries[number]
        return Shard(source=self.source, name=entry.name, cache=self.cache, entry=entry)

    def place(self, sample: int) -> tuple[int, int]:
        """Return the number of a sample's shard, and the sample's place in it."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"{self.folder} has {self.num_samples} samples, no sample {sample}")
        number = bisect_right(self.starts, sample) - 1
        return number, sample - self.starts[number]

    def size_of(self, sample: int) -> SampleSize:
        """Return the size of a sample: the same on every machine.

        Raises:
            ValueError: it cannot be had here, but perhaps on other machines.
        """
        number, place = self.place(sample)
        sidecar = self._sidecars(number)
        return UNKNOWN_SIZE if sidecar is None else sidecar.size(place)

    def open(self, number: int) -> OpenShard:
        """Return a shard, open; a failure is remembered for a while.

        Raises:
            RecordError: it cannot be opened.
        """
        failed_at, failure = self._failures.get(number, (-math.inf, RecordError("")))
        if time.monotonic() - failed_at < FAILURE_S:
            raise RecordError(str(failure), kind=failure.kind)
        try:
            return self._recent(number)
        except RecordError as error:
            self._failures[number] = time.monotonic(), RecordError(str(error), kind=error.kind)
            raise

    def fetch(self, number: int) -> None:
        """Fetch a shard, and the sidecar stored next to it, unless another process fetches it."""
        self._sidecars(number)  # needed first, to assign samples
        self.shard(number).open(wait_s=0.0)

    def _open_sidecar(self, number: int) -> Sidecar | None:
        """Open a sidecar with the sizes of a shard's samples; None: they are unknown on all machines."""
        shard = self.shard(number)
        if self.origin == "unknown":
            return None
        if self.origin == "stored" and not shard.in_place:
            return shard.stored_sidecar()
        try:
            return shard.find_sidecar() or shard.open().sidecar
        except RecordError:
            if shard.in_place:  # it is absent or damaged, and so for all
                return None
            raise


def is_streamed(source: Source, names: Sequence[str]) -> bool:
    """Say whether some shards must be fetched or uncompressed before they are read."""
    return not (source.is_local and all(name.endswith(".tar") for name in names))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]
