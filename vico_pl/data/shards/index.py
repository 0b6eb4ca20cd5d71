"""`index.json` of a set of shards, and the sidecar file of each shard.

    index.json   names, counts, sizes and checksums of all shards; written last, so it marks a complete set
    NAME.idx     int64 array (n + 1, 5) in NumPy's format. Row i: where sample i begins in the uncompressed
                 tar, then its `SampleSize` (-1: unknown). The last row: where the last sample ends, zeros.

Of a sidecar single rows are read, so that a set of any size costs neither time nor memory when it is opened.
"""

import json
import os
import re
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vico_pl.data.decode import parsing
from vico_pl.data.shards.locations import SHARD_ENDINGS
from vico_pl.data.shards.tars import UNKNOWN_SIZE, SampleSize
from vico_pl.errors import is_out_of_files
from vico_pl.files import atomic_path, write_json

INDEX_NAME = "index.json"
PLAN_NAME = "build.json"  # of a set that `vico shards build` writes, see `build.py`
INDEX_VERSION = 1
_MAGIC = b"\x93NUMPY"
_SHAPE = rb"{'descr': '<i8', 'fortran_order': False, 'shape': \((\d+), 5\), } *\n"
_HEADER = re.compile(_MAGIC + rb"\x01\x00v\x00" + _SHAPE)
_HEADER_BYTES = 128
_ROW, _STARTS = struct.Struct("<5q"), struct.Struct("<q32xq")  # a row; the first column of two


class ShardEntry(NamedTuple):
    """A shard as listed in `index.json`."""

    name: str
    num_samples: int
    num_bytes: int | None = None  # of the file as stored, compressed or not; None: unknown
    sha256: str | None = None  # of the same


class OpenFile:
    """A file that is open as long as this object exists; it remains readable when it is removed."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class Sidecar:
    """An open sidecar file.

    Raises:
        ValueError: it is damaged, of an older version, or of another tool.
    """

    def __init__(self, descriptor: int) -> None:
        """Take over an open file."""
        self._file = OpenFile(descriptor)
        header = _HEADER.fullmatch(os.pread(descriptor, _HEADER_BYTES, 0))
        num_rows = 0 if header is None else int(header[1])
        if not num_rows or os.fstat(descriptor).st_size != _HEADER_BYTES + num_rows * _ROW.size:
            raise ValueError("not an int64 array (n + 1, 5)")
        self.num_samples = num_rows - 1
        (self.end, *_) = self._read(_ROW, self.num_samples)  # byte after the last sample

    def span(self, place: int) -> tuple[int, int]:
        """Return the first byte of a sample in the uncompressed tar, and the byte after its last."""
        start, end = self._read(_STARTS, place)
        return start, end

    def size(self, place: int) -> SampleSize:
        """Return the size of a sample."""
        size = SampleSize(*self._read(_ROW, place)[1:])
        return UNKNOWN_SIZE if min(size) < 0 else size

    def _read(self, what: struct.Struct, row: int) -> tuple[int, ...]:
        start = _HEADER_BYTES + row * _ROW.size
        return what.unpack(os.pread(self._file.descriptor, what.size, start))


def side_index_path(path: Path) -> Path:
    """Return the path of a shard's sidecar: `a.idx` next to `a.tar` or `a.tar.gz`."""
    return path.with_name(f"{shard_stem(path.name)}.idx")


def shard_stem(name: str) -> str:
    """Return a shard's name without its ending.

    >>> shard_stem("train-v1.2-000000.tar.gz"), shard_stem("a.tgz"), shard_stem("a.tar")
    ('train-v1.2-000000', 'a', 'a')
    """
    return name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")


def write_entries(entries: Sequence[ShardEntry], path: Path, *, has_sizes: bool = False) -> None:
    """Write `index.json`; unknown values are left out. `has_sizes`: each shard has its sidecar next to it."""
    shards = [
        {key: value for key, value in entry._asdict().items() if value is not None} for entry in entries
    ]
    write_json({"version": INDEX_VERSION, "has_sizes": has_sizes, "shards": shards}, path)


def parse_entries(content: bytes, *, where: str) -> tuple[list[ShardEntry], bool]:
    """Parse `index.json`; also return whether each shard has its sidecar next to it.

    Raises:
        ValueError: it is unreadable, or lists a shard outside its folder.
    """
    try:
        with parsing():
            found = json.loads(content)
        shards = found["shards"]
        of_mosaic = bool(shards) and "raw_data" in shards[0]
        names = () if of_mosaic else ShardEntry._fields
        entries = [ShardEntry(*map(shard.get, names)) for shard in shards] if names else []
        if not all(map(_is_valid, entries)):
            raise TypeError("a value is of another kind")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = f"'vico shards index {where.rpartition('/')[0]}' rebuilds it"
        raise ValueError(f"{where}: unreadable; {remedy}") from error
    if of_mosaic:
        raise ValueError(f"{where}: lists shards of MosaicML; expected WebDataset tars (see data/README.md)")
    for name, *_ in entries:
        if "/" in name or "\0" in name or not name.endswith(SHARD_ENDINGS):
            raise ValueError(f"{where}: names '{name}', which is no file name of a shard in that folder")
    if len({entry.name for entry in entries}) < len(entries):
        raise ValueError(f"{where}: names a shard twice")
    return entries, found.get("has_sizes") is True


def _is_valid(entry: tuple[Any, ...]) -> bool:
    name, num_samples, num_bytes, sha256 = entry
    counts = (num_samples, 0 if num_bytes is None else num_bytes)
    texts = (name, "-" if sha256 is None else sha256)
    are_counts = all(type(count) is int and 0 <= count < 2**62 for count in counts)
    return are_counts and all(isinstance(text, str) and text != "" for text in texts)


def write_sidecar(table: np.ndarray, path: Path) -> Sidecar:
    """Write the sidecar, int64 (n + 1, 5), of the shard at `path` in one step, and open it."""
    with atomic_path(side_index_path(path)) as temporary:
        with temporary.open("wb") as file:
            np.save(file, table, allow_pickle=False)
        return Sidecar(os.open(temporary, os.O_RDONLY))


def open_sidecar(path: Path) -> Sidecar | None:
    """Open a sidecar; None: it is absent, damaged, of an older version or of another tool."""
    try:
        return Sidecar(os.open(path, os.O_RDONLY))
    except (OSError, ValueError) as error:
        if is_out_of_files(error):
            raise
        return None


def is_foreign(path: Path) -> bool:
    """Say whether another tool wrote the file with the name of a shard's sidecar, as that of DALI does."""
    with suppress(OSError), side_index_path(path).open("rb") as file:
        return not _MAGIC.startswith(file.read(len(_MAGIC)))
    return False
