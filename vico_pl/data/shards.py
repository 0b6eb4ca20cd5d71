"""Shards on disk: WebDataset tars, and beside each a small index of where its samples lie.

    train-000000.tar    members KEY.jpg, KEY.json, KEY.jpg, ... ; the members of a sample are neighbours
    train-000000.idx    int64 array (n + 1,) in NumPy's format: sample i is the bytes [idx[i], idx[i + 1])
    index.json          names, counts, sizes and checksums of all shards; written last, so it marks a whole
                        set

Because a sample is one range of bytes, any sample is one read away, whatever came before it.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds

from vico_pl.data.decode import RecordError
from vico_pl.data.sizes import SampleSize
from vico_pl.types import Record

INDEX_NAME = "index.json"
INDEX_VERSION = 1
MAX_RECORD_BYTES = 2**30  # members of a record together: it is read in one piece
# What tarfile raises on hostile headers; RecursionError: names longer than long, one header after the other.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError)


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Where every sample of a folder of shards lies."""

    folder: Path
    names: list[str]  # tar files, in the order of the set
    boundaries: list[np.ndarray]  # of each shard, int64 (n + 1,): byte positions between samples

    @property
    def num_samples(self) -> int:
        """Samples in the whole set."""
        return self._starts[-1]

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard."""
        return [len(bounds) - 1 for bounds in self.boundaries]

    @property
    def is_streamed(self) -> bool:
        """Whether shards are fetched whole."""
        return False

    def size_of(self, sample: int) -> SampleSize:
        """Return what the cost of a sample follows from."""
        return SampleSize(0, 0, 0, 0)

    def locate(self, sample: int) -> tuple[str, int, int]:
        """Return (shard, first byte, byte after the last) of a sample of the set."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"{self.folder} has {self.num_samples} samples, no sample {sample}")
        shard = bisect_right(self._starts, sample) - 1
        bounds, place = self.boundaries[shard], sample - self._starts[shard]
        return self.names[shard], int(bounds[place]), int(bounds[place + 1])

    @cached_property
    def _starts(self) -> list[int]:
        """Number of the first sample of each shard, and the number of samples."""
        return list(accumulate((len(bounds) - 1 for bounds in self.boundaries), initial=0))


def write_shard(path: Path, records: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write `(key, {extension: content})` records as one tar and its index, each whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_path(path) as temporary,
        wds.TarWriter(str(temporary), encoder=False, mtime=0, user="", group="") as tar,
    ):
        for key, files in records:
            tar.write({"__key__": key, **files})
    write_side_index(path)


def write_side_index(path: Path) -> np.ndarray:
    """Read the headers of a tar once and write where its samples begin and end."""
    bounds = scan_boundaries(path)
    with atomic_path(side_index_path(path)) as temporary, temporary.open("wb") as file:
        np.save(file, bounds, allow_pickle=False)
    return bounds


def scan_boundaries(path: Path) -> np.ndarray:
    """Return the byte positions between the samples of a tar, int64 (n + 1,).

    Members that webdataset passes over (folders, metadata, names without a dot) begin no sample. Links and
    devices do: their record is then a bad one, with a sentence that says so.

    Raises:
        ValueError: the file is no readable tar, is cut short, or holds something between its members.
    """
    starts: list[int] = []
    last_key = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                _check_progress(tar, member)
                key = None if member.isdir() else member_key(member.name)
                if key is not None and key != last_key:
                    starts.append(member.offset)
                    last_key = key
        _check_rest(path, tar.offset)
    except _TAR_ERRORS as error:
        remedy = "fetch or write it again, then run 'vico shards index'"
        raise ValueError(f"{path}: not a readable tar ({error}); {remedy}") from error
    return np.array([*starts, tar.offset], dtype=np.int64)


def _check_progress(tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Refuse a size below zero, which would lead back to where the member began, for ever."""
    if member.size < 0 or tar.offset <= member.offset:
        raise tarfile.ReadError(f"member at byte {member.offset} has a negative size")


def _check_rest(path: Path, end: int) -> None:
    """Refuse what follows the last readable member and is no padding: tarfile would stop there in silence."""
    with path.open("rb") as file:
        file.seek(end)
        for chunk in iter(partial(file.read, 2**20), b""):
            if chunk.strip(b"\0"):
                raise tarfile.ReadError(f"neither a member nor its end at byte {end}")


def member_key(name: str) -> str | None:
    """Return what names a sample: a member's path up to the first dot of its file name; None: of no sample.

    >>> member_key("photos/000017.0.jpg")
    'photos/000017'
    >>> member_key("README") is member_key("__meta__/x.json") is None
    True
    """
    if re.match(r"__[^/]*__($|/)", name):  # webdataset's own mark of metadata
        return None
    key: str | None = wds.tariterators.base_plus_ext(name)[0]
    return key


def write_index(folder: Path) -> ShardIndex:
    """Write `index.json` and the side indexes of the tars of a folder anew, whatever was there."""
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ValueError(
            f"{folder}: no shard found; expected names such as train-000000.tar (see data/README.md)"
        )
    entries = []
    for path in paths:
        bounds = write_side_index(path)
        entries.append(
            {
                "name": path.name,
                "num_samples": len(bounds) - 1,
                "num_bytes": path.stat().st_size,
                "sha256": _sha256(path),
            }
        )
    content = {"version": INDEX_VERSION, "shards": entries}
    write_json(content, folder / INDEX_NAME)
    return read_index(folder)


def read_index(folder: Path | str) -> ShardIndex:
    """Open a folder of shards.

    Raises:
        ValueError: the folder is absent, empty or a URL, or a shard is missing or has changed since it was
            indexed.
    """
    _check_local(str(folder))
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder of shards; make one with 'vico shards build' or 'make shards'"
        )
    if not (folder / INDEX_NAME).exists():
        return write_index(folder)
    entries = _read_entries(folder / INDEX_NAME)
    for entry in entries:
        path = folder / entry["name"]
        if not path.exists():
            raise ValueError(
                f"{path}: named in {INDEX_NAME} but absent; restore it or run 'vico shards index {folder}'"
            )
        if path.stat().st_size != entry["num_bytes"]:
            raise ValueError(f"{path}: its size differs from {INDEX_NAME}; run 'vico shards index {folder}'")
    boundaries = [_read_side_index(folder / entry["name"]) for entry in entries]
    for entry, bounds in zip(entries, boundaries, strict=True):
        if len(bounds) - 1 != entry["num_samples"] or not _fits(bounds, entry["num_bytes"]):
            path = side_index_path(folder / entry["name"])
            raise ValueError(f"{path}: does not match {INDEX_NAME}; run 'vico shards index {folder}'")
    return ShardIndex(folder=folder, names=[entry["name"] for entry in entries], boundaries=boundaries)


class RecordReader:
    """Reads any record of a set with one positioned read; files stay open for the reader's life."""

    def __init__(self, index: ShardIndex) -> None:
        """Open nothing yet: a reader travels to worker processes before its first read."""
        self._index = index
        self._files: dict[str, int] = {}

    def __call__(self, sample: int) -> Record:
        """Return a record as raw bytes.

        Raises:
            RecordError: the bytes cannot be read or are no readable part of a tar, or a member comes twice or
                is no plain file.
        """
        shard, start, end = self._index.locate(sample)
        place = f"bytes {start} to {end} of {shard}"
        if end - start > MAX_RECORD_BYTES:
            raise RecordError(f"{place} are more than a record may have ({MAX_RECORD_BYTES})", kind="tar")
        try:
            content = os.pread(self._open(shard), end - start, start)
            key, files = _read_members(content)
        except OSError as error:
            raise RecordError(f"{place} cannot be read: {error.strerror}", kind="io") from error
        except RecordError as error:
            raise RecordError(f"{place} are no record: {error}", kind=error.kind) from error
        except _TAR_ERRORS as error:
            raise RecordError(f"{place} are no record: {error}", kind="tar") from error
        return Record(shard=shard, key=key, files=files)

    def expect(self, shards: Sequence[int]) -> None:
        """Fetch these shards ahead."""

    def _open(self, shard: str) -> int:
        if shard not in self._files:
            self._files[shard] = os.open(self._index.folder / shard, os.O_RDONLY)
        return self._files[shard]

    def __del__(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            os.close(descriptor)


def side_index_path(path: Path) -> Path:
    """Return the path of a tar's side index."""
    return path.with_suffix(".idx")


def write_json(content: Any, path: Path) -> None:
    """Write a JSON file in one step."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; on success it is synced and takes `path`'s place in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_members(content: bytes) -> tuple[str, dict[str, bytes]]:
    """Return key and files of the one record in a piece of a tar; nothing is ever unpacked."""
    key, files = None, {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            _check_progress(tar, member)
            member_of = None if member.isdir() else member_key(member.name)
            if member_of is None:
                continue
            key = key or member_of
            if member_of != key:
                raise tarfile.ReadError("members of two keys; 'vico shards index' tells them apart")
            name = member.name[len(key) + 1 :].lower()
            if name in files:
                raise RecordError(f"duplicate member '{name}'", kind="member")
            files[name] = _read_member(tar, member)
    if key is None or content[tar.offset :].strip(b"\0"):
        raise tarfile.ReadError("a tar header is damaged")
    return key, files


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Read a plain file: links could lead anywhere, and a sparse file of one block be terabytes of 0."""
    if not member.isreg() or member.issparse():
        kind = "a sparse file" if member.issparse() else f"of type {member.type!r} (a link or a device)"
        raise RecordError(f"member '{member.name}' is {kind}; expected a plain file", kind="member")
    file = tar.extractfile(member)
    assert file is not None  # as it is a plain file
    return file.read()


def _check_local(folder: str) -> None:
    """Refuse URLs: webdataset would run what follows `pipe:` as a shell command."""
    if re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*:/", folder):
        raise ValueError(
            f"{folder}: only folders are read, for 'pipe:' runs shell commands and a URL cannot be read at "
            "any position; copy or mount the shards and name their folder"
        )


def _read_entries(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text())["shards"]
        entries = [{key: entry[key] for key in ("name", "num_samples", "num_bytes")} for entry in entries]
        outside = [entry["name"] for entry in entries if Path(entry["name"]).name != entry["name"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: unreadable; 'vico shards index {path.parent}' writes it anew") from error
    if outside:
        raise ValueError(f"{path}: names '{outside[0]}', which is no file name of that folder")
    return entries


def _read_side_index(path: Path) -> np.ndarray:
    side = side_index_path(path)
    if not side.exists():
        return write_side_index(path)
    try:
        return np.load(side, allow_pickle=False)
    except (ValueError, EOFError) as error:
        remedy = f"'vico shards index {side.parent}' writes it anew"
        raise ValueError(f"{side}: no array of byte positions; {remedy}") from error


def _fits(bounds: np.ndarray, num_bytes: int) -> bool:
    """Say whether these are rising positions in a file."""
    if bounds.ndim != 1 or bounds.dtype != np.int64 or (np.diff(bounds) <= 0).any():
        return False
    return bool(bounds[0] >= 0 and bounds[-1] <= num_bytes)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
