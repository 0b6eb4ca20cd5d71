"""Rows of published data sets: parquet files as on the Hugging Face Hub, and VLMEvalKit's TSV."""

import base64
import csv
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from vico_pl.data.decode import IMAGE_TOKEN
from vico_pl.errors import RecordError

Row = dict[str, Any]  # column -> value
_MAX_FIELD = 2**28  # bytes of a TSV field: an image of 128 MiB as base64, and room for a few
_CAULDRON = (("human", "user"), ("gpt", "assistant"))  # role: field
_MAX_REFERENCE = 64  # letters: where an image would be, VLMEvalKit writes the index of a row that has it


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a `.parquet` or `.tsv` file; of the latter, all values are texts.

    Raises:
        ValueError: the file is damaged, or pyarrow is not installed.
    """
    if path.suffix == ".parquet":
        for group in range(num_row_groups(path)):
            yield from read_row_group(path, group)
        return
    try:
        yield from _tsv_rows(path)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: not readable as tsv ({error})") from error


def read_row_group(path: Path, number: int) -> list[Row]:
    """Return the rows of a group of a parquet file.

    Raises:
        ValueError: the file is damaged, or pyarrow is not installed.
    """
    with _parquet(path) as file:
        rows: list[Row] = file.read_row_group(number, use_threads=False).to_pylist()
    return rows


def num_row_groups(path: Path) -> int:
    """Count the row groups of a parquet file; raises as `read_row_group`."""
    with _parquet(path) as file:
        return int(file.num_row_groups)


def image_content(value: Any) -> bytes | None:
    """Return the bytes of an image: bytes, the Hub's structure of bytes and path, or base64.

    Raises:
        RecordError: it is a text but not base64, or anything else.
    """
    content = value.get("bytes") if isinstance(value, dict) else value
    try:
        content = base64.b64decode(content, validate=True) if isinstance(content, str) else content
    except ValueError as error:
        raise RecordError(f"image is not base64 ({error})", kind="image") from error
    if not isinstance(content, bytes | None):
        raise RecordError("image is neither bytes nor base64", kind="image")
    return content


def conversation_of(row: Row) -> tuple[dict[str, Any], list[bytes]]:
    """Return the JSON of a record, and its images, from a row of LLaVA-OneVision-Data or The Cauldron.

    These have the columns `conversations` and `image`, and `texts` (user, assistant) and `images`. Images
    that no text marks come before the first question; further columns are kept if they are no lists.

    Raises:
        RecordError: the columns are other ones.
    """
    given = row.get("images") or row.get("image")
    contents = [image_content(value) for value in (given if isinstance(given, list) else [given])]
    images = [content for content in contents if content is not None]
    texts = row.get("texts") or []
    try:
        turns = [(role, text[name]) for text in texts for role, name in _CAULDRON]
        turns = turns or [(turn["from"], turn["value"]) for turn in row["conversations"]]
        is_marked = any(IMAGE_TOKEN in text for _, text in turns)
    except (KeyError, TypeError) as error:
        expected = "expected 'conversations' (from, value) or 'texts' (user, assistant)"
        raise RecordError(f"columns {', '.join(row)}: {expected}", kind="conversation") from error
    marks = "" if is_marked else f"{IMAGE_TOKEN}\n" * len(images)
    conversations = [{"from": role, "value": text} for role, text in turns]
    conversations[:1] = [{**turn, "value": marks + turn["value"]} for turn in conversations[:1]]
    entry = {name: value for name, value in row.items() if isinstance(value, str | int | float)}
    source = row.get("data_source") or (texts and texts[0].get("source"))
    return entry | ({"source": source} if source else {}) | {"conversations": conversations}, images


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    try:
        with import_module("pyarrow.parquet").ParquetFile(path) as file:
            yield file
    except ImportError as error:
        raise ValueError(f"{path}: parquet needs pyarrow: pip install 'vico_pl[parquet]'") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not readable as parquet ({error})") from error


def _tsv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_MAX_FIELD)
    with path.open("rb") as file, path.open("rb") as again:
        names = next(_tsv_reader(file), [])
        start, starts = file.tell(), {}
        for number, values in enumerate(_tsv_reader(file), start=2):
            if len(values) != len(names):
                raise ValueError(f"row {number} has {len(values)} of {len(names)} values")
            row = dict(zip(names, values, strict=True))
            starts[row.get("index", "")], start = start, file.tell()
            shown = row.get("image", "")
            if 0 < len(shown) <= _MAX_REFERENCE:
                if shown not in starts:
                    raise ValueError(f"row {number} has the image of row {shown!r}, which is not above it")
                again.seek(starts[shown])
                row["image"] = next(_tsv_reader(again))[names.index("image")]
            yield row


def _tsv_reader(file: BinaryIO) -> Iterator[list[str]]:
    """Read line by line, so that the position of the file is where the next row begins."""
    lines = (line.decode("utf-8-sig") for line in iter(file.readline, b""))
    return csv.reader(lines, delimiter="\t", strict=True)
