"""Shards that cannot be read in place: fetched whole, unpacked, and kept in a folder of this machine.

A file comes under a temporary name, is checked, and takes its name in one step; a lock lets several processes
fetch it once. When the folder is full, the shards that were opened longest ago go; who has one open reads on.
"""

import glob
import gzip
import hashlib
import io
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, cast, runtime_checkable

import fsspec
import webdataset as wds
from filelock import FileLock

from vico_pl.data.shards.index import ShardEntry
from vico_pl.data.shards.locations import without_secrets
from vico_pl.errors import RecordError
from vico_pl.files import atomic_path

MAX_INDEX_BYTES = 2**28  # of an index.json: a million shards
TIMEOUT_S = 60.0  # without a byte from a server
TRIES = 4  # for what may pass: a lost connection, a busy server
BACKOFF_S = 1.0  # before the second try, then twice as long each time
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vico_pl"
T = TypeVar("T")
_CHUNK = 2**20
_GZIP = b"\x1f\x8b"
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True, kw_only=True)
class StreamingConfig:
    """How shards are read that must be fetched or unpacked whole: those at URLs, and compressed ones."""

    window: int = 8  # shards that are shuffled together
    cache_dir: str | None = None  # where they lie meanwhile, best on a disk of the node; none: in ~/.cache
    cache_gib: float = 100.0  # shards used longest ago go when there are more
    max_shard_gib: float = 16.0  # a larger one is refused while it is fetched
    allow_pipe: bool = False  # whether a path may be pipe:COMMAND, which runs in a shell

    def __post_init__(self) -> None:
        """Refuse windows and limits of nothing."""
        if self.window < 1:
            raise ValueError(f"data.streaming.window is {self.window}; expected at least 1")
        if min(self.cache_gib, self.max_shard_gib) <= 0:
            given = f"cache_gib is {self.cache_gib} and max_shard_gib {self.max_shard_gib}"
            raise ValueError(f"data.streaming.{given}; expected more than 0 for both")


DEFAULT_STREAMING = StreamingConfig()


@dataclass(frozen=True, kw_only=True)
class ShardCache:
    """A folder of fetched shards, shared by the processes of a machine and by all sets."""

    folder: Path
    max_gib: float  # of all shards in it
    max_shard_bytes: int  # of one, as it comes and unpacked

    def open(
        self,
        location: str,
        path: Path,
        entry: ShardEntry | None,
        *,
        check: Callable[[Path], object],
        wait_s: float = -1.0,
    ) -> int:
        """Return a descriptor of the shard that is kept at `path`, fetched if it is not there.

        `check` looks at a fetched file before it takes its name, and raises `ValueError`. Another process
        that fetches it is waited for `wait_s` seconds; -1: as long as it takes.

        Raises:
            RecordError: it cannot be fetched (kind `io`) or is not what it should be (kind `shard`).
            TimeoutError: another process fetches it.
        """
        with suppress(FileNotFoundError):
            return _open_used(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=wait_s):
            with suppress(FileNotFoundError):
                return _open_used(path)
            for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
                leftover.unlink()  # of a process that was killed, or it would hold the lock
            descriptor = _persist(location, partial(self._fetch, location, path, entry, check))
        self._make_room(path)
        return descriptor

    def _fetch(
        self, location: str, path: Path, entry: ShardEntry | None, check: Callable[[Path], object]
    ) -> int:
        """Fetch a shard once; the descriptor is opened before others see the file, and might remove it."""
        with atomic_path(path) as temporary:
            with open_location(location) as stream, temporary.open("wb") as file:
                received = _Received(stream, limit=self.max_shard_bytes, name=location)
                for chunk in _unpacked(received, self.max_shard_bytes, location):
                    file.write(chunk)
            received.compare(entry)
            try:
                check(temporary)
            except ValueError as error:
                raise RecordError(f"{without_secrets(location)}: {error}", kind="shard") from error
            return os.open(temporary, os.O_RDONLY)

    def _make_room(self, newest: Path) -> None:
        """Remove the shards that were opened longest ago, all sets taken together."""
        files = []
        for path in self.folder.glob("*/*.tar"):
            with suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in files) - self.max_gib * 2**30
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                excess -= size


@runtime_checkable
class Stream(Protocol):
    """What of a file is used; those of fsspec and of commands are no `IO`."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, none at the end."""

    def close(self) -> None:
        """Give back what was opened."""


def build_cache(config: StreamingConfig) -> ShardCache:
    """Return the cache that the settings ask for."""
    folder = Path(config.cache_dir) if config.cache_dir else CACHE / "shards"
    max_shard_bytes = int(config.max_shard_gib * 2**30)
    return ShardCache(folder=folder.expanduser(), max_gib=config.cache_gib, max_shard_bytes=max_shard_bytes)


def fetch_bytes(location: str) -> bytes | None:
    """Fetch a small file; None: there is none, or none for us: some stores say no more of one that is absent.

    Raises:
        ValueError: it cannot be fetched or is too large.
    """

    def fetch() -> bytes:
        with open_location(location) as stream:
            received = _Received(stream, limit=MAX_INDEX_BYTES, name=location)
            return b"".join(iter(partial(received.read, _CHUNK), b""))

    try:
        return _persist(location, fetch)
    except RecordError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError | PermissionError) or getattr(cause, "status", None) == 403:
            return None
        raise


@contextmanager
def open_location(location: str) -> Iterator[Stream]:
    """Open what a URL names as a stream; a command if it begins with `pipe:`, which callers have allowed."""
    if location.startswith("pipe:"):
        stream = wds.gopen(location)
    elif "://" not in location:
        stream = Path(location).open("rb")  # noqa: SIM115 - closed below
    else:
        filesystem, path = _filesystem(location)
        # Of http: one plain request; its default would ask for pieces. `size` spares it a request for that.
        plain = {"block_size": 0, "size": 1} if location.startswith(("http:", "https:")) else {}
        stream = filesystem.open(path, "rb", **plain)
    try:
        yield stream
    finally:
        stream.close()


def _filesystem(location: str) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    if location.startswith(("http:", "https:")):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S)
        # As stored: a server may not unpack or pack on the way, or no checksum would fit.
        options = {"client_kwargs": {"timeout": timeout}, "headers": {"Accept-Encoding": "identity"}}
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(location, **options)
        return found
    except (ImportError, ValueError) as error:  # a protocol whose package is not there, or none at all
        reason = without_secrets(f"{location}: cannot be opened: {error}")
        raise RecordError(reason, kind="io") from error


def _persist(location: str, fetch: Callable[[], T]) -> T:
    """Try again what may pass."""
    for attempt in range(TRIES):
        try:
            return fetch()
        except (RecordError, TypeError):
            raise
        except Exception as error:  # of fsspec's many backends, each with errors of its own
            damaged = isinstance(error, _DAMAGED)
            reason = without_secrets(f"{location}: {_reason(error)}")
            last = RecordError(reason, kind="shard" if damaged else "io")
            last.__cause__ = error
            if not _may_pass(error):
                break
        if attempt + 1 < TRIES:
            time.sleep(BACKOFF_S * 2**attempt)
    raise last


def _may_pass(error: Exception) -> bool:
    """Say whether trying again makes sense: not if a file is absent or the server refuses it."""
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    return not refused and not isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"the server answered {status} {getattr(error, 'message', '')}".rstrip()
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    command = re.search(r": exit (-?\d+) \(read\)", text)  # as webdataset words it, after the whole command
    return text if command is None else f"the command ended with exit code {command[1]}"


def _open_used(path: Path) -> int:
    """Open a shard that is there, and note that it was used."""
    descriptor = os.open(path, os.O_RDONLY)
    os.utime(descriptor)
    return descriptor


def _unpacked(received: "_Received", limit: int, name: str) -> Iterator[bytes]:
    """Yield the tar in a stream, unpacked if it is a gzip; told by its content."""
    start = received.read(1)
    start += received.read(1)  # a stream may give less than is asked for
    if start != _GZIP:
        yield start
        yield from iter(partial(received.read, _CHUNK), b"")
        return
    received.put_back(start)
    num_bytes = 0
    with gzip.GzipFile(fileobj=cast(IO[bytes], received), mode="rb") as packed:
        for chunk in iter(partial(packed.read, _CHUNK), b""):
            num_bytes += len(chunk)
            if num_bytes > limit:
                reason = f"{without_secrets(name)}: unpacks to more than max_shard_bytes ({limit})"
                raise RecordError(reason, kind="shard")
            yield chunk


class _Received(io.RawIOBase):
    """A stream of which is known how many bytes came and what their checksum is; too many are refused."""

    def __init__(self, stream: Stream, *, limit: int, name: str) -> None:
        self._stream, self._limit, self._name = stream, limit, name
        self._pending = b""
        self._num_bytes = 0
        self._digest = hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        if self._pending:
            start, self._pending = self._pending[:size], self._pending[size:]
            return start
        chunk: bytes = self._stream.read(size)
        self._num_bytes += len(chunk)
        self._digest.update(chunk)
        if self._num_bytes > self._limit:
            reason = f"{without_secrets(self._name)}: larger than max_shard_bytes ({self._limit})"
            raise RecordError(reason, kind="shard")
        return chunk

    def put_back(self, start: bytes) -> None:
        """Give these bytes once more: gzip reads its mark itself."""
        self._pending = start

    def compare(self, entry: ShardEntry | None) -> None:
        """Raise `EOFError` if this is not what the index has."""
        if entry is None:
            return
        if entry.num_bytes not in (None, self._num_bytes):
            raise EOFError(f"{self._num_bytes} bytes came, index.json has {entry.num_bytes}")
        if entry.sha256 not in (None, self._digest.hexdigest()):
            raise EOFError("its checksum differs from index.json")
