"""One shard of a set: a local plain tar is read in place, any other one from its copy in the cache."""

import errno
import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np

from vico_pl.data.shards.cache import ShardCache, fetch_bytes
from vico_pl.data.shards.index import (
    INDEX_NAME,
    Contents,
    ShardEntry,
    check_contents,
    is_foreign,
    load_sidecar,
    read_sidecar,
    read_sizes,
    shard_stem,
    write_sidecar,
)
from vico_pl.data.shards.locations import Source, without_secrets
from vico_pl.data.shards.sizes import measure_shard
from vico_pl.data.shards.tars import scan_boundaries
from vico_pl.errors import RecordError

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


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


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard and its sidecar."""

    source: Source
    name: str
    cache: ShardCache
    entry: ShardEntry | None  # None: it is not in index.json, so its samples are counted

    @property
    def in_place(self) -> bool:
        """Whether it is read where it is."""
        return self.source.is_in_place(self.name)

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
            contents = self.contents() or self._scan(Path(f"/dev/fd/{descriptor}"))
            count = len(contents.bounds) - 1 if self.entry is None else self.entry.num_samples
            path = self.original if self.in_place else self.cached
            check_contents(contents, path, count=count, num_bytes=os.fstat(descriptor).st_size)
            return OpenShard(os.dup(descriptor), contents.bounds)
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
        contents = self.contents()
        count = len(self.open().bounds if contents is None else contents.bounds) - 1
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
        num_bytes = self.original.stat().st_size
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
        try:
            found = None if content is None else load_sidecar(BytesIO(content))
        except ValueError:
            return False
        if found is None or found.sizes is None:
            return False
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
        try:
            num_bytes = path.stat().st_size
        except OSError as error:
            reason = "absent" if isinstance(error, FileNotFoundError) else error.strerror
            remedy = f"restore it or run 'vico shards index {path.parent}'"
            raise RecordError(f"{path}: {named}{reason}; {remedy}", kind="shard") from error
        if expected not in (None, num_bytes):
            sizes = f"{num_bytes} bytes, not {expected}"
            reason = f"its size differs from {INDEX_NAME} ({sizes}); run 'vico shards index {path.parent}'"
            raise RecordError(f"{path}: {reason}", kind="shard")

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
        """Write the sidecar to the first place that can be written."""
        *_, last = places = self._places()
        for path in places:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                return write_sidecar(contents, path)
            except OSError as error:
                if error.errno not in _READ_ONLY or path == last:
                    raise
        return None

    def _places(self) -> list[Path]:
        """Return the tars next to which the sidecar may be: the shard, and where the cache has or had it."""
        if self.in_place and not is_foreign(self.original):
            return [self.original, self.cached]
        return [self.cached]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]
