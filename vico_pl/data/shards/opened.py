"""A tar that can be read at any place: its open file, and what lies beside it."""

import errno
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vico_pl.data.shards.index import (
    INDEX_NAME,
    ShardEntry,
    map_bounds,
    map_sizes,
    side_index_path,
    sizes_path,
    write_array,
)
from vico_pl.data.shards.sizes import measure_shard
from vico_pl.data.shards.tars import scan_tar
from vico_pl.errors import RecordError

MAX_OPEN = 128  # shards of a set: several sets must do with the 1,024 files that a process may usually open
FAILURE_S = 60.0  # for which a shard that could not be opened is not tried again


class Contents(NamedTuple):
    """What a tar holds."""

    bounds: np.ndarray  # int64 (n + 1,): byte positions between the samples
    sizes: np.ndarray | None  # int32 (n, 4): what each will cost; None: not known


class OpenShard:
    """An open tar and where its samples lie; it can be read even when its files are removed meanwhile."""

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
    """Opens shards by their number and keeps those used last open; a failure is remembered for a while."""

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
            self._recent[number] = self._open_anew(number)
            if len(self._recent) > MAX_OPEN:
                self._recent.popitem(last=False)
        self._recent.move_to_end(number)
        return self._recent[number]

    def _open_anew(self, number: int) -> OpenShard:
        failed_at, failure = self._failures.get(number, (0.0, None))
        if failure is not None and time.monotonic() - failed_at < FAILURE_S:
            raise RecordError(str(failure), kind=failure.kind)
        try:
            return self._open(number)
        except RecordError as error:
            self._failures[number] = time.monotonic(), error
            raise
        except ValueError as error:  # what lies beside it is damaged
            raise RecordError(str(error), kind="shard") from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to other processes without what is open."""
        return OpenShards, (self._open,)


def scan_boundaries(path: Path) -> np.ndarray:
    """Return the byte positions between the samples of a tar, int64 (n + 1,).

    Raises:
        ValueError: it is no readable tar.
    """
    with path.open("rb") as file:
        try:
            return scan_tar(file)
        except ValueError as error:
            remedy = "fetch or write it again, then run 'vico shards index'"
            raise ValueError(f"{path}: {error}; {remedy}") from error


def read_contents(path: Path) -> Contents:
    """Read a tar once to find out what it holds.

    Raises:
        ValueError: it is no readable tar.
    """
    bounds = scan_boundaries(path)
    with path.open("rb") as file:
        return Contents(bounds, measure_shard(file.fileno(), bounds))


def write_contents(contents: Contents, path: Path) -> None:
    """Write beside a tar what it holds: the sizes first, so that whoever finds the positions finds both."""
    if contents.sizes is not None:
        write_array(contents.sizes, sizes_path(path))
    write_array(contents.bounds, side_index_path(path))


def note_contents(path: Path) -> Contents | None:
    """Read a tar once and write beside it what it holds; where the folder is read-only, return it.

    Raises:
        ValueError: it is no readable tar.
    """
    contents = read_contents(path)
    try:
        write_contents(contents, path)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return contents
    return None


def map_contents(path: Path, *, count: int | None, num_bytes: int) -> Contents:
    """Map what was written beside a tar.

    Raises:
        ValueError: it is of another tar.
        FileNotFoundError: nothing was written.
    """
    bounds = map_bounds(side_index_path(path), count=count, num_bytes=num_bytes)
    return Contents(bounds, map_sizes(sizes_path(path), count=len(bounds) - 1))


def open_in_place(path: Path, entry: ShardEntry, *, contents: Contents | None = None) -> OpenShard:
    """Open a plain tar; `contents` are what it holds, if that is not written beside it.

    Raises:
        RecordError: it is not there, or not the one that was indexed.
        ValueError: what lies beside it is damaged.
        FileNotFoundError: nothing lies beside it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _not_there(path, error) from error
    try:
        num_bytes = check_size(path, entry)
        if contents is None:
            contents = map_contents(path, count=entry.num_samples, num_bytes=num_bytes)
        elif len(contents.bounds) - 1 != entry.num_samples:
            told = f"holds {len(contents.bounds) - 1} samples, {INDEX_NAME} says {entry.num_samples}"
            raise ValueError(f"{path}: {told}; 'vico shards index {path.parent}' writes it anew")
    except BaseException:
        os.close(descriptor)
        raise
    return OpenShard(descriptor, contents.bounds)


def check_size(path: Path, entry: ShardEntry) -> int:
    """Return the bytes of a shard.

    Raises:
        RecordError: it is not there, or not the one that was indexed.
    """
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise _not_there(path, error) from error
    if entry.num_bytes not in (None, num_bytes):
        reason = f"{path}: its size differs from {INDEX_NAME}; run 'vico shards index {path.parent}'"
        raise RecordError(reason, kind="shard")
    return num_bytes


def _not_there(path: Path, error: OSError) -> RecordError:
    told = "absent" if isinstance(error, FileNotFoundError) else error.strerror
    remedy = f"restore it or run 'vico shards index {path.parent}'"
    return RecordError(f"{path}: named in {INDEX_NAME} but {told}; {remedy}", kind="shard")
