"""Inside a tar: where its samples begin, and the members of a sample. Nothing is extracted to a file."""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import webdataset as wds

from vico_pl.errors import RecordError

_METADATA = re.compile(r"__[^/]*__($|/)")  # webdataset's own mark
MAX_RECORD_BYTES = 2**30  # members of a record together: it is read in one piece
# What tarfile raises on hostile headers; RecursionError: a long chain of long-name headers.
TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError)


def scan_boundaries(path: Path) -> np.ndarray:
    """Return the byte positions between the samples of a tar, int64 (n + 1,).

    Members that webdataset skips (folders, metadata, names without a dot) begin no sample. Links and devices
    do: their record is then a bad one.

    Raises:
        ValueError: the file is no readable tar, is cut short, or has something between its members.
    """
    starts: list[int] = []
    last_key = None
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                _check_progress(tar, member)
                key = None if member.isdir() else member_key(member.name)
                if key is not None and key != last_key:
                    starts.append(member.offset)
                    last_key = key
            _check_rest(file, tar.offset)
    except TAR_ERRORS as error:
        raise ValueError(f"not a readable tar ({error})") from error
    return np.array([*starts, tar.offset], dtype=np.int64)


def member_key(name: str) -> str | None:
    """Return the sample key: a member's path up to the first dot of its file name; None: of no sample.

    >>> member_key("photos/000017.0.jpg")
    'photos/000017'
    >>> member_key("README") is member_key("__meta__/x.json") is None
    True
    """
    if _METADATA.match(name):
        return None
    key: str | None = wds.tariterators.base_plus_ext(name)[0]
    return key


def read_members(content: bytes) -> tuple[str, dict[str, bytes]]:
    """Return key and files of the one record in a piece of a tar.

    Raises:
        RecordError: the bytes are no readable part of a tar, or a member is a duplicate or no plain file.
    """
    key, files = None, dict[str, bytes]()
    try:
        for name, data in _members(content):
            member_of = member_key(name)
            key = key or member_of
            if member_of is None or member_of != key:
                raise tarfile.ReadError("members of two keys; 'vico shards index' separates them")
            ending = name[len(key) + 1 :].lower()
            if ending in files:
                raise RecordError(f"duplicate member '{ending}'", kind="member")
            files[ending] = data
    except TAR_ERRORS as error:
        raise RecordError(str(error), kind=getattr(error, "kind", "tar")) from error
    if key is None:
        raise RecordError("a tar header is damaged", kind="tar")
    return key, files


def _members(content: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            _check_progress(tar, member)
            if not member.isdir() and member_key(member.name) is not None:
                yield member.name, _read_member(tar, member)
    if content[tar.offset :].strip(b"\0"):
        raise tarfile.ReadError("a tar header is damaged")


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Read a plain file: links could lead anywhere, and a sparse file of one block be terabytes of zeros."""
    if not member.isreg() or member.issparse():
        kind = "a sparse file" if member.issparse() else f"of type {member.type!r} (a link or a device)"
        raise RecordError(f"member '{member.name}' is {kind}; expected a plain file", kind="member")
    file = tar.extractfile(member)
    assert file is not None  # because it is a plain file
    return file.read()


def _check_progress(tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Refuse a negative size, which would lead back to the same member in an endless loop."""
    if member.size < 0 or tar.offset <= member.offset:
        raise tarfile.ReadError(f"member at byte {member.offset} has a negative size")


def _check_rest(file: BinaryIO, end: int) -> None:
    """Refuse a tar without its end, which may have lost records, and anything but zeros in it.

    tarfile accepts both silently.
    """
    size = file.seek(0, os.SEEK_END)
    if size < end + tarfile.BLOCKSIZE or size % tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"its end is missing after byte {end}: it is cut short")
    file.seek(end)
    for chunk in iter(partial(file.read, 2**20), b""):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"neither a member nor its end at byte {end}")
