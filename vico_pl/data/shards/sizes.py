"""The size of a sample, estimated from its text and its image headers; no pixel is decoded."""

import io
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image

from vico_pl.data.decode import IMAGE_EXTENSIONS, IMAGE_FORMATS, parsing, sort_images
from vico_pl.data.shards.tars import MAX_RECORD_BYTES, read_members
from vico_pl.errors import RecordError
from vico_pl.types import Content

_PIECES = re.compile(r"[A-Za-z]{1,6}|[^\sA-Za-z]")  # a word counts once per six letters
_ORIENTATION = 0x0112  # EXIF: from 5 on, width and height are exchanged
_MAX_SIZE = np.iinfo(np.int32).max


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


def measure_shard(path: Path, bounds: np.ndarray) -> np.ndarray:
    """Measure all records of a tar: (n, 4)."""
    sizes = np.zeros((len(bounds) - 1, 4), dtype=np.int64)
    with path.open("rb") as file:
        for place, (start, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            file.seek(start)
            sizes[place] = _measure_bytes(file.read(min(end - start, MAX_RECORD_BYTES)))
    return sizes.clip(0, _MAX_SIZE)


def _measure_bytes(content: bytes) -> SampleSize:
    try:
        return measure_record(read_members(content)[1])
    except RecordError:
        return UNKNOWN_SIZE


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
