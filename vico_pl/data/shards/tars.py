"""Inside a tar: where its samples begin, the members of a sample, and its estimated size.

Nothing is extracted to a file, and no pixel is decoded.
"""

import io
import json
import os
import re
import tarfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL.Image
import webdataset as wds

from vico_pl.data.decode import IMAGE_EXTENSIONS, IMAGE_FORMATS, parsing, sort_images
from vico_pl.errors import RecordError
from vico_pl.types import Content

_METADATA = re.compile(r"__[^/]*__($|/)")  # webdataset's own mark
MAX_RECORD_BYTES = 2**30  # members of a record together: it is read in one piece
# What tarfile raises on hostile headers; RecursionError: a long chain of long-name headers.
TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError)
_PIECES = re.compile(r"[A-Za-z]{1,6}|[^\sA-Za-z]")  # a word counts once per six letters
_ORIENTATION = 0x0112  # EXIF: from 5 on, width and height are exchanged
_MAX_SIZE = np.iinfo(np.int32).max


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
            check_rest(file, tar.offset)
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


def check_rest(file: BinaryIO, end: int) -> None:
    """Refuse a tar without its end, which may have lost records, and anything but zeros in it.

    tarfile accepts both silently.

    Raises:
        tarfile.ReadError: it is refused.
    """
    size = file.seek(0, os.SEEK_END)
    if size < end + tarfile.BLOCKSIZE or size % tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"its end is missing after byte {end}: it is cut short")
    file.seek(end)
    for chunk in iter(partial(file.read, 2**20), b""):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"neither a member nor its end at byte {end}")


class SampleSize(NamedTuple):
    """What the cost of a sample is estimated from; zeros where unknown."""

    text_tokens: int  # of all turns, an estimate
    num_images: int
    width: int  # px, of the first image, after EXIF rotation
    height: int  # px


UNKNOWN_SIZE = SampleSize(0, 0, 0, 0)


def measure_record(files: Mapping[str, Content]) -> SampleSize:
    """Measure a record: member extension -> content.

    >>> measure_record({"json": b'{"conversations": [{"value": "Who?"}, {"value": "me"}]}'})
    SampleSize(text_tokens=3, num_images=0, width=0, height=0)
    """
    names = [name for name in files if name.rpartition(".")[2] in IMAGE_EXTENSIONS]
    width, height = _image_size(files[sort_images(names)[0]]) if names else (0, 0)
    return SampleSize(_text_tokens(files.get("json", b"")), len(names), width, height)


def describe_tar(path: Path) -> np.ndarray:
    """Return what the sidecar of a tar holds, see `index.py`: int64 (n + 1, 5).

    Raises:
        ValueError: as `scan_boundaries`.
    """
    bounds = scan_boundaries(path)
    table = np.zeros((len(bounds), 5), dtype=np.int64)
    table[:, 0] = bounds
    with path.open("rb") as file:
        for row, (start, end) in zip(table, pairwise(bounds.tolist()), strict=False):
            file.seek(start)
            with suppress(RecordError):
                files = read_members(file.read(min(end - start, MAX_RECORD_BYTES)))[1]
                row[1:] = np.clip(measure_record(files), 0, _MAX_SIZE)
    return table


def _text_tokens(content: Content) -> int:
    """Count roughly what a tokenizer would; used only to assign samples to ranks."""
    try:
        with parsing():
            turns = json.loads(bytes(content))["conversations"]
        return sum(1 for turn in turns for _ in _PIECES.finditer(turn["value"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0


def _image_size(content: Content) -> tuple[int, int]:
    """Return (width, height) after EXIF rotation; zeros if the header is unreadable."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd but readable metadata
            image = PIL.Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
            width, height = image.size
            turned = "exif" in image.info and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # on hostile bytes Pillow raises anything: OSError, SyntaxError, struct.error, ...
        return 0, 0
    return (height, width) if turned else (width, height)
