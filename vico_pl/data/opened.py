"""A tar that can be read at any place: its open file, and what lies beside it."""

import errno
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vico_pl.data.decode import RecordError
from vico_pl.data.index import (
    INDEX_NAME,
    ShardEntry,
    map_bounds,
    map_sizes,
    side_index_path,
    sizes_path,
    write_array,
)
from vico_pl.data.sizes import UNKNOWN_SIZE, SampleSize, measure_shard
from vico_pl.data.tars import scan_tar


class Contents(NamedTuple):
    """What a tar holds."""

    bounds: np.ndarray  # int64 (n + 1,): byte positions between the samples
    sizes: np.ndarray | None  # int32 (n, 4): what each will cost; None: not known


class OpenShard:
    """An open tar and what it holds; it can be read even when its files are removed meanwhile."""

    def __init__(self, descriptor: int, contents: Contents) -> None:
        """Take over an open file."""
        self.descriptor = descriptor
        self.bounds, self.sizes = contents

    def size_of(self, place: int) -> SampleSize:
        """Return what the cost of a sample follows from."""
        return UNKNOWN_SIZE if self.sizes is None else SampleSize(*self.sizes[place].tolist())

    def __del__(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


def read_contents(path: Path) -> Contents:
    """Read a tar once to find out what it holds.

    Raises:
        ValueError: it is no readable tar.
    """
    with path.open("rb") as file:
        try:
            bounds = scan_tar(file)
        except ValueError as error:
            remedy = "fetch or write it again, then run 'vico shards index'"
            raise ValueError(f"{path}: {error}; {remedy}") from error
        return Contents(bounds, measure_shard(file.fileno(), bounds))


def write_contents(path: Path) -> Contents:
    """Read a tar once and write beside it what it holds.

    Raises:
        ValueError: it is no readable tar.
    """
    contents = read_contents(path)
    write_array(contents.bounds, side_index_path(path))
    assert contents.sizes is not None  # as they were measured
    write_array(contents.sizes, sizes_path(path))
    return contents


def note_contents(path: Path) -> Contents | None:
    """Do as `write_contents`, but return what could not be written as the folder is read-only."""
    try:
        write_contents(path)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return read_contents(path)
    return None


def map_contents(path: Path, *, count: int | None, num_bytes: int) -> Contents:
    """Map what was written beside a tar.

    Raises:
        ValueError: it is of another tar.
        FileNotFoundError: nothing was written.
    """
    bounds = map_bounds(side_index_path(path), count=count, num_bytes=num_bytes)
    return Contents(bounds, map_sizes(sizes_path(path), count=len(bounds) - 1))


def open_shard(path: Path, entry: ShardEntry, *, contents: Contents | None = None) -> OpenShard:
    """Open a plain tar; `contents` are what it holds, if that is not written beside it.

    Raises:
        RecordError: it is not there, or not the one that was indexed.
        ValueError: what lies beside it is damaged.
    """
    where = f"'vico shards index {path.parent}'"
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        told = "absent" if isinstance(error, FileNotFoundError) else error.strerror
        reason = f"{path}: named in {INDEX_NAME} but {told}; restore it or run {where}"
        raise RecordError(reason, kind="shard") from error
    try:
        num_bytes = os.fstat(descriptor).st_size
        if entry.num_bytes not in (None, num_bytes):
            raise RecordError(f"{path}: its size differs from {INDEX_NAME}; run {where}", kind="shard")
        if contents is None:
            contents = map_contents(path, count=entry.num_samples, num_bytes=num_bytes)
        return OpenShard(os.dup(descriptor), contents)
    finally:
        os.close(descriptor)
