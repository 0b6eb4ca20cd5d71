"""A shard, read in place if it is a local plain tar and else from its copy in the cache; a set of shards."""

import errno
import hashlib
import math
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from vico_pl.data.shards.cache import ShardCache, fetch_bytes
from vico_pl.data.shards.index import (
    INDEX_NAME,
    Contents,
    ShardEntry,
    is_foreign,
    load_sidecar,
    read_sidecar,
    read_sizes,
    rebuild_hint,
    shard_stem,
    side_index_path,
    write_sidecar,
)
from vico_pl.data.shards.locations import Source, without_secrets
from vico_pl.data.shards.tars import UNKNOWN_SIZE, SampleSize, measure_shard, scan_boundaries
from vico_pl.errors import RecordError

MAX_OPEN = 128  # shards of a set: several sets share the 1,024 files that a process may usually open
FAILURE_S = 60.0  # for which a shard that could not be opened is not tried again
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class OpenShard:
    """An open tar and where its samples are; it remains readable when its file is removed."""

    def __init__(self, descriptor: int, bounds: np.ndarray) -> None:
        self.descriptor, self.bounds = descriptor, bounds

    def span(self, place: int) -> tuple[int, int]:
        """Return the first byte of a sample, and the byte after its last."""
        return int(self.bounds[place]), int(self.bounds[place + 1])

    def __del__(self) -> None:
        os.close(self.descriptor)


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

    @property
    def original(self) -> Path:
        """The path of a local shard."""
        return Path(self.source.location(self.name))

    def open(self, *, wait_s: float = -1.0) -> OpenShard:
        """Open it, fetched if it is not in the cache; another process is waited for `wait_s` seconds.

        Raises:
            RecordError: it is absent, cannot be fetched, is damaged or not the one that was indexed.
            ValueError: its sidecar is damaged or does not match.
            TimeoutError: another process fetches it.
        """
        descriptor = self._open_file(wait_s)
        try:
            bounds = (self.contents() or self._scan(Path(f"/dev/fd/{descriptor}"))).bounds
            self._check_bounds(bounds, os.fstat(descriptor).st_size)
            return OpenShard(os.dup(descriptor), bounds)
        finally:
            os.close(descriptor)

    def check(self) -> None:
        """Open it if it is local, but do not unpack it.

        Raises:
            RecordError: it is absent, damaged or not the one that was indexed.
            ValueError: its sidecar is damaged or does not match.
        """
        if self.in_place:
            self.open()
        elif self.source.is_local:
            self._check_original()

    def counted(self) -> "Shard":
        """Return it with an entry, after counting its samples if it has none.

        Raises:
            ValueError: it cannot be fetched or is damaged.
        """
        if self.entry is not None:
            return self
        count = len((self.contents() or self.open()).bounds) - 1
        num_bytes = self.original.stat().st_size if self.in_place else None
        return replace(self, entry=ShardEntry(name=self.name, num_samples=count, num_bytes=num_bytes))

    def index(self) -> ShardEntry:
        """Write the sidecar of a local shard next to it, even if there is one, and describe the shard.

        Raises:
            ValueError: it is unreadable.
        """
        if self.in_place:
            contents = self._scan(self.original)
        else:
            self.open()
            contents = self.contents() or self._scan(self.cached)
            if not is_foreign(self.original):
                write_sidecar(contents, self.original)
        with self.original.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
            num_bytes = file.tell()
        count = len(contents.bounds) - 1
        return ShardEntry(name=self.name, num_samples=count, num_bytes=num_bytes, sha256=checksum)

    def contents(self) -> Contents | None:
        """Read its sidecar; None: there is none.

        Raises:
            ValueError: it is damaged.
        """
        found = map(read_sidecar, self._places())
        return next((contents for contents in found if contents is not None), None)

    def sizes(self) -> np.ndarray | None:
        """Return the sizes (n, 4) of the samples, as far as a sidecar has them; None: unknown."""
        if self.entry is None:
            return None
        compressed = [self.original] if self.source.is_local and not self.in_place else []
        found = (read_sizes(path, self.entry.num_samples) for path in [*self._places(), *compressed])
        return next((sizes for sizes in found if sizes is not None), None)

    def fetch_sizes(self) -> bool:
        """Fetch the sidecar of a shard at a URL, and say whether the sizes of the samples are known.

        Raises:
            ValueError: it exists but cannot be fetched: machines that could fetch it would assign otherwise.
        """
        if self.sizes() is not None:
            return True
        if self.source.is_local or self.source.commands is not None:
            return False
        content = fetch_bytes(self.source.location(f"{shard_stem(self.name)}.idx"))
        with suppress(ValueError):  # absent, foreign or of another shard
            found = load_sidecar(BytesIO(content or b""))
            if found is not None and found.sizes is not None:
                self._check_bounds(found.bounds, int(found.bounds[-1]))
                self._keep(found)
        return self.sizes() is not None

    def _open_file(self, wait_s: float) -> int:
        if not self.in_place:
            location = self.source.location(self.name)
            return self.cache.open(location, self.cached, self.entry, check=self._scan, wait_s=wait_s)
        self._check_original()
        try:
            return os.open(self.original, os.O_RDONLY)
        except OSError as error:
            raise RecordError(f"{self.original}: {error.strerror}", kind="shard") from error

    def _check_original(self) -> None:
        path, expected = self.original, self.entry and self.entry.num_bytes
        named = "" if self.entry is None else f"named in {INDEX_NAME} but "
        remedy = f"run 'vico shards index {path.parent}'"
        try:
            num_bytes = path.stat().st_size
        except OSError as error:
            reason = "absent" if isinstance(error, FileNotFoundError) else error.strerror
            raise RecordError(f"{path}: {named}{reason}; restore it or {remedy}", kind="shard") from error
        if expected not in (None, num_bytes):
            reason = f"its size differs from {INDEX_NAME} ({num_bytes} bytes, not {expected}); {remedy}"
            raise RecordError(f"{path}: {reason}", kind="shard")

    def _check_bounds(self, bounds: np.ndarray, num_bytes: int) -> None:
        found, end = len(bounds) - 1, int(bounds[-1])
        expected = found if self.entry is None else self.entry.num_samples
        if found != expected or end > num_bytes:
            path = self.original if self.in_place else self.cached
            counts = f"{found} samples in {end} bytes, expected {expected} in at most {num_bytes}"
            reason = f"does not match {INDEX_NAME} or its shard: {counts}; {rebuild_hint(path.parent)}"
            raise ValueError(f"{side_index_path(path)}: {reason}")

    def _scan(self, tar: Path) -> Contents:
        """Find its samples in a tar and write its sidecar.

        A fetched shard that index.json lists is not measured: its sizes are those that were fetched, or
        unknown, on all machines alike.
        """
        shown = without_secrets(self.source.location(self.name))
        try:
            bounds = scan_boundaries(tar)
        except ValueError as error:
            remedy = "fetch or write it again, then run 'vico shards index'"
            raise RecordError(f"{shown}: {error}; {remedy}", kind="shard") from error
        if self.in_place or self.entry is None:
            contents = Contents(bounds, measure_shard(tar, bounds))
        elif len(bounds) - 1 != self.entry.num_samples:
            counts = f"holds {len(bounds) - 1} samples, {INDEX_NAME} says {self.entry.num_samples}"
            raise RecordError(f"{shown}: {counts}", kind="shard")
        else:
            contents = Contents(bounds, self.sizes())
        self._keep(contents)
        return contents

    def _keep(self, contents: Contents) -> None:
        for path in (places := self._places()):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                return write_sidecar(contents, path)
            except OSError as error:
                if error.errno not in _READ_ONLY or path == places[-1]:
                    raise
        return None

    def _places(self) -> list[Path]:
        """Return the tars next to which the sidecar may be: the shard, and where the cache has or had it."""
        if self.in_place and not is_foreign(self.original):
            return [self.original, self.cached]
        return [self.cached]


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """A set of shards. Each shard is opened on first use, and the most recent ones remain open."""

    source: Source
    shards: Sequence[Shard]  # in the order of the set, all counted
    has_sizes: bool = True  # of streamed sets: known of all shards or of none, so that all machines agree

    @property
    def folder(self) -> Path | str:
        """The folder of the set, or its URL without secrets."""
        return self.source.folder

    @cached_property
    def is_streamed(self) -> bool:
        """Whether some shards must be fetched or uncompressed before they are read."""
        return not all(shard.in_place for shard in self.shards)

    @cached_property
    def names(self) -> list[str]:
        """File names of the shards."""
        return [shard.name for shard in self.shards]

    @cached_property
    def entries(self) -> list[ShardEntry]:
        """What is known of each shard."""
        return [shard.entry for shard in self.shards if shard.entry is not None]

    @cached_property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard."""
        return [entry.num_samples for entry in self.entries]

    @property
    def num_samples(self) -> int:
        """Samples in the whole set."""
        return self.starts[-1]

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

    def size_of(self, sample: int) -> SampleSize:
        """Return the size of a sample: the same on every machine."""
        number, place = self.place(sample)
        sizes = self._sizes(number) if self.has_sizes else None
        return UNKNOWN_SIZE if sizes is None else SampleSize(*sizes[place].tolist())

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
        except ValueError as error:
            failure = error if isinstance(error, RecordError) else RecordError(str(error), kind="shard")
            self._failures[number] = time.monotonic(), failure
            raise failure from error

    @cached_property
    def _failures(self) -> dict[int, tuple[float, RecordError]]:
        return {}

    @cached_property
    def _recent(self) -> Callable[[int], OpenShard]:
        return lru_cache(MAX_OPEN)(lambda number: self.shards[number].open())

    @cached_property
    def _sizes(self) -> Callable[[int], np.ndarray | None]:
        return lru_cache(MAX_OPEN)(self._read_sizes)

    def _read_sizes(self, number: int) -> np.ndarray | None:
        shard = self.shards[number]
        sizes = shard.sizes()
        if sizes is None and not shard.in_place:  # this machine would assign otherwise than others
            gone = f"{shard.cache.folder}: the sizes of {shard.name} were removed during the run"
            raise FileNotFoundError(f"{gone}; leave the cache alone while it is used")
        return sizes

    def __getstate__(self) -> dict[str, Any]:
        return {part.name: getattr(self, part.name) for part in fields(self)}  # no open files


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]
