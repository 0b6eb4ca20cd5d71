"""The inside of a tar: where its records begin, and what is in one; nothing is ever unpacked to a file."""

import io
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from struct import Struct
from typing import BinaryIO
from zlib import adler32

import numpy as np
import webdataset as wds

from vico_pl.errors import RecordError

_PLAIN = (b"0", b"\0")  # types of members
_METADATA = re.compile(r"__[^/]*__($|/)")  # webdataset's own mark
_HEADER = Struct("100s 24x 12s 12x 8s c 100x 5s 83x c 166x")  # name, size, checksum, type, magic, prefix
MAX_RECORD_BYTES = 2**30  # members of a record together: it is read in one piece
# What tarfile raises on hostile headers; RecursionError: names longer than long, one header after the other.
TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError)


def scan_tar(file: BinaryIO) -> np.ndarray:
    """Return the byte positions between the samples of a tar, int64 (n + 1,).

    Members that webdataset passes over (folders, metadata, names without a dot) begin no sample. Links and
    devices do: their record is then a bad one, with a sentence that says so.

    Raises:
        ValueError: the file is no readable tar, is cut short, or holds something between its members.
    """
    starts: list[int] = []
    last_key = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
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
    """Return what names a sample: a member's path up to the first dot of its file name; None: of no sample.

    >>> member_key("photos/000017.0.jpg")
    'photos/000017'
    >>> member_key("README") is member_key("__meta__/x.json") is None
    True
    """
    if name.startswith("__") and _METADATA.match(name):
        return None
    begin = name.rfind("/") + 1
    dot = name.find(".", begin)
    if dot > begin and "\n" not in name:
        return name[:dot]
    key: str | None = wds.tariterators.base_plus_ext(name)[0]  # whose rule it is, of odd names too
    return key


def read_members(content: bytes) -> tuple[str, dict[str, memoryview]]:
    """Return key and files of the one record in a piece of a tar; the files are views of it, no copies.

    Raises:
        RecordError: the bytes are no readable part of a tar, or a member comes twice or is no plain file.
    """
    try:
        return _read_members(content)
    except RecordError:
        raise
    except TAR_ERRORS as error:
        raise RecordError(str(error), kind="tar") from error


def _read_members(content: bytes) -> tuple[str, dict[str, memoryview]]:
    key, files = None, {}
    for name, data in _plain_members(content) or _members(content):
        member_of = member_key(name)
        if member_of is None:
            continue
        key = key or member_of
        if member_of != key:
            raise tarfile.ReadError("members of two keys; 'vico shards index' tells them apart")
        ending = name[len(key) + 1 :].lower()
        if ending in files:
            raise RecordError(f"duplicate member '{ending}'", kind="member")
        files[ending] = data
    if key is None:
        raise tarfile.ReadError("a tar header is damaged")
    return key, files


def _plain_members(content: bytes) -> list[tuple[str, memoryview]] | None:
    """Read members as nearly all tars have them: plain files of short names; None: there is something else.

    tarfile, which knows all that a tar may be, takes ten times as long.
    """
    members, place, view = [], 0, memoryview(content)
    while place < len(content) and content[place]:
        begin = place + tarfile.BLOCKSIZE
        described = _plain_header(content[place:begin])
        if described is None:
            return None
        name, size = described
        place = begin + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if place > len(content):
            return None
        members.append((name, view[begin : begin + size]))
    return None if content[place:].strip(b"\0") else members


def _plain_header(header: bytes) -> tuple[str, int] | None:
    """Return name and size of a plain file; None: the header is of something else, damaged, or says more."""
    if len(header) < tarfile.BLOCKSIZE:
        return None
    name, size, checksum, kind, magic, prefix = _HEADER.unpack(header)
    if magic != b"ustar" or kind not in _PLAIN or prefix != b"\0":
        return None
    name, size, digits = name.partition(b"\0")[0], size.rstrip(b" \0"), checksum.rstrip(b" \0")
    if not (name.isascii() and size.isdigit() and digits.isdigit()) or name.endswith(b"/"):
        return None
    # The low half of Adler-32 is 1 + the sum of the bytes, modulo 65,521, which half a header cannot reach.
    total = (adler32(header[:256]) & 0xFFFF) + (adler32(header[256:]) & 0xFFFF) - 2
    try:
        is_whole = total - sum(checksum) + 8 * ord(" ") == int(digits, 8)
        return (name.decode(), int(size, 8)) if is_whole else None
    except ValueError:  # digits that are not octal
        return None


def _members(content: bytes) -> Iterator[tuple[str, memoryview]]:
    """Read members of any kind that a tar may hold."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            _check_progress(tar, member)
            if not member.isdir() and member_key(member.name) is not None:
                yield member.name, memoryview(_read_member(tar, member))
    if content[tar.offset :].strip(b"\0"):
        raise tarfile.ReadError("a tar header is damaged")


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Read a plain file: links could lead anywhere, and a sparse file of one block be terabytes of 0."""
    if not member.isreg() or member.issparse():
        kind = "a sparse file" if member.issparse() else f"of type {member.type!r} (a link or a device)"
        raise RecordError(f"member '{member.name}' is {kind}; expected a plain file", kind="member")
    file = tar.extractfile(member)
    assert file is not None  # as it is a plain file
    return file.read()


def _check_progress(tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Refuse a size below zero, which would lead back to where the member began, for ever."""
    if member.size < 0 or tar.offset <= member.offset:
        raise tarfile.ReadError(f"member at byte {member.offset} has a negative size")


def _check_rest(file: BinaryIO, end: int) -> None:
    """Refuse what follows the last readable member and is no padding: tarfile would stop there in silence."""
    file.seek(end)
    for chunk in iter(partial(file.read, 2**20), b""):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"neither a member nor its end at byte {end}")
