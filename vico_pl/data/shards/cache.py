"""Files that cannot be read in place: fetched whole, uncompressed, checked, and kept in a local folder.

A file is written under a temporary name, checked and renamed; a lock lets several processes fetch it once.
When the folder is full, the least recently opened shards are removed; who has one open can still read it.
"""

import glob
import gzip
import hashlib
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import webdataset as wds
from filelock import FileLock

from vico_pl.data.shards.index import ShardEntry
from vico_pl.data.shards.locations import without_secrets
from vico_pl.errors import RecordError, check_settings, is_out_of_files
from vico_pl.files import atomic_path

MAX_INDEX_BYTES = 2**28  # of an index.json: a million shards
TIMEOUT_S = 60.0  # without a byte from a server
MIN_BYTES_PER_S = 1024  # on average after that time
TRIES = 4  # for temporary faults: a lost connection, a busy server
BACKOFF_S = 1.0  # before the second try, then doubled each time
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vico_pl"
T = TypeVar("T")
_CHUNK = 2**20
_GZIP = b"\x1f\x8b"
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True, kw_only=True)
class StreamingConfig:
    """How shards are read that must be fetched first: those at URLs, and compressed ones."""

    window: int = 8  # shards that are shuffled together
    cache_dir: str | None = None  # of fetched shards, best on a disk of the node; none: in ~/.cache
    cache_gib: float = 100.0  # above this, the least recently used shards are removed
    max_shard_gib: float = 16.0  # a larger one is refused while it is fetched
    allow_pipe: bool = False  # whether a path may be pipe:COMMAND, which runs in a shell

    def __post_init__(self) -> None:
        window = (self.window >= 1, "at least 1")
        cache, shard = ((value > 0, "more than 0") for value in (self.cache_gib, self.max_shard_gib))
        check_settings("data.streaming", self, window=window, cache_gib=cache, max_shard_gib=shard)


DEFAULT_STREAMING = StreamingConfig()


@dataclass(frozen=True)
class ShardCache:
    """A folder of fetched shards, shared by the processes of a machine and by all sets."""

    config: StreamingConfig

    @property
    def folder(self) -> Path:
        """Where the shards of all sets are."""
        return Path(self.config.cache_dir or CACHE / "shards").expanduser()

    def open(
        self,
        location: str,
        path: Path,
        entry: ShardEntry | None,
        *,
        check: Callable[[Path], object],
        wait_s: float = -1.0,
    ) -> int:
        """Return a descriptor of the shard kept at `path`, fetched if it is not there.

        `check` is called with a fetched file before it is renamed, and raises `RecordError`. Another process
        that fetches it is waited for `wait_s` seconds; -1: forever.

        Raises:
            RecordError: it cannot be fetched (kind `io`) or is not the right one (kind `shard`).
            TimeoutError: another process fetches it.
            ValueError: the folder's file system has no locks.
        """
        with suppress(FileNotFoundError):
            return _open_used(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path, wait_s):
            with suppress(FileNotFoundError):
                return _open_used(path)
            for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
                leftover.unlink()  # of a process that was killed, or it would hold the lock
            descriptor = _retry(location, partial(self._fetch, location, path, entry, check))
        self._make_room(path)
        return descriptor

    def _fetch(
        self, location: str, path: Path, entry: ShardEntry | None, check: Callable[[Path], object]
    ) -> int:
        """Fetch a shard; the descriptor is opened before other processes see the file and may remove it."""
        shown, limit = without_secrets(location), int(self.config.max_shard_gib * 2**30)
        with atomic_path(path) as temporary:
            with open_location(location) as stream, temporary.open("wb") as file:
                received = _copy(stream, file, limit, shown)
            if entry is not None:
                _compare(*received, entry)
            with temporary.open("rb") as file:
                if file.read(2) == _GZIP:
                    file.seek(0)
                    temporary.unlink()  # the open file remains readable
                    with gzip.open(file) as packed, temporary.open("wb") as tar:
                        _copy(packed, tar, limit, f"{shown}, unpacked")
            check(temporary)
            return os.open(temporary, os.O_RDONLY)

    def _make_room(self, newest: Path) -> None:
        """Remove the least recently opened shards of all sets together."""
        files = []
        for path in self.folder.glob("*/*.tar"):
            with suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in files) - self.config.cache_gib * 2**30
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                excess -= size


def _lock(path: Path, wait_s: float) -> AbstractContextManager[Any]:
    """Keep other processes from fetching a shard, after waiting for one that does."""
    try:
        return FileLock(f"{path}.lock", timeout=wait_s).acquire()
    except TimeoutError:
        raise
    except OSError as error:  # Lustre without -o flock, some NFS
        remedy = "set data.streaming.cache_dir to a folder on a disk of the node"
        raise ValueError(f"{path.parent}: its file system has no locks ({error}); {remedy}") from error


def fetch_bytes(location: str) -> bytes | None:
    """Fetch a small file; None: it is absent, or refused: some stores refuse what is absent.

    Raises:
        ValueError: it cannot be fetched or is too large.
    """

    def fetch() -> bytes:
        with BytesIO() as content, open_location(location) as stream:
            _copy(stream, content, MAX_INDEX_BYTES, without_secrets(location))
            return content.getvalue()

    try:
        return _retry(location, fetch)
    except RecordError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError | PermissionError) or getattr(cause, "status", None) == 403:
            return None
        raise


@contextmanager
def open_location(location: str) -> Iterator[Any]:
    """Open a URL, a path, or a command that begins with `pipe:` (callers check that it is allowed)."""
    if location.startswith("pipe:"):
        stream = wds.gopen(location)
    elif "://" in location:
        stream = _open_url(location)
    else:
        stream = Path(location).open("rb")  # noqa: SIM115 - closed below
    try:
        yield stream
    finally:
        stream.close()


def _open_url(location: str) -> Any:
    connection: dict[str, Any] = {}
    plain: dict[str, int] = {}
    if location.startswith(("http:", "https:")):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S)
        # As stored: if the server compressed or uncompressed it on the way, no checksum would match.
        connection = {"client_kwargs": {"timeout": timeout}, "headers": {"Accept-Encoding": "identity"}}
        # One plain request instead of range requests; `size` saves the request that asks for it.
        plain = {"block_size": 0, "size": 1}
    try:
        filesystem, path = fsspec.core.url_to_fs(location, **connection)
    except (ImportError, ValueError) as error:  # a protocol that is unknown or whose package is missing
        raise RecordError(without_secrets(f"{location}: cannot be opened: {error}"), kind="io") from error
    return filesystem.open(path, "rb", **plain)


def _copy(stream: Any, file: Any, limit: int, shown: str) -> tuple[int, str]:
    """Copy a stream, of any kind that fsspec has, to a file; return its size and SHA-256."""
    num_bytes, digest, begun = 0, hashlib.sha256(), time.monotonic()
    for chunk in iter(partial(stream.read, _CHUNK), b""):
        num_bytes += len(chunk)
        elapsed_s = time.monotonic() - begun
        if elapsed_s > TIMEOUT_S and num_bytes < MIN_BYTES_PER_S * elapsed_s:
            raise RecordError(f"{shown}: only {num_bytes} bytes came in {elapsed_s:.0f} s", kind="io")
        if num_bytes > limit:
            raise RecordError(f"{shown}: more than the limit, {limit} bytes", kind="shard")
        digest.update(chunk)
        file.write(chunk)
    return num_bytes, digest.hexdigest()


def _compare(num_bytes: int, sha256: str, entry: ShardEntry) -> None:
    """Raise `EOFError`, after which it is fetched again, if this is not the shard that was indexed."""
    if entry.num_bytes not in (None, num_bytes):
        raise EOFError(f"{num_bytes} bytes came, index.json has {entry.num_bytes}")
    if entry.sha256 not in (None, sha256):
        raise EOFError("its checksum differs from index.json")


def _retry(location: str, fetch: Callable[[], T]) -> T:
    for attempt in range(TRIES):
        try:
            return fetch()
        except (RecordError, TypeError):
            raise
        except Exception as error:  # each fsspec backend has its own exceptions
            if is_out_of_files(error):
                raise
            reason = without_secrets(f"{location}: {_reason(error)}")
            last = RecordError(reason, kind="shard" if isinstance(error, _DAMAGED) else "io")
            last.__cause__ = error
            if not _may_pass(error):
                break
        if attempt + 1 < TRIES:
            time.sleep(BACKOFF_S * 2**attempt)
    raise last


def _may_pass(error: Exception) -> bool:
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    return not refused and not isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    status = getattr(error, "status", None)
    if isinstance(status, int):
        message, *_ = [*str(getattr(error, "message", "")).splitlines(), ""]
        return f"the server answered {status} {message}".rstrip(" :")
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    command = re.search(r": exit (-?\d+) \(read\)", text)  # webdataset's message contains the whole command
    return text if command is None else f"the command ended with exit code {command[1]}"


def _open_used(path: Path) -> int:
    """Open a cached shard and record that it was used."""
    descriptor = os.open(path, os.O_RDONLY)
    os.utime(descriptor)
    return descriptor
