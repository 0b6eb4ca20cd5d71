"""Published data sets: parquet files as on the Hugging Face Hub, also as shards, and VLMEvalKit's TSV."""

import base64
import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from vico_pl.data.decode import IMAGE_TOKEN, bad_record, parse_conversation
from vico_pl.data.shards.build import (
    Line,
    Records,
    annotation_bytes,
    build_set,
    bytes_in_tar,
    cut_into_shards,
)
from vico_pl.data.shards.shard import ShardIndex
from vico_pl.errors import RecordError
from vico_pl.types import BadRecord

Row = dict[str, Any]  # column -> value
_ROWS_AT_ONCE = 16  # of parquet: rows with images may have megabytes
_MAX_FIELD = 2**28  # bytes of a TSV field: an image of 128 MiB as base64, and room for a few
_CAULDRON = (("human", "user"), ("gpt", "assistant"))  # role: field
_MAX_REFERENCE = 64  # letters: where an image would be, VLMEvalKit writes the index of a row that has it


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a `.parquet` or `.tsv` file; of the latter, all values are texts.

    Raises:
        ValueError: the file is damaged, or pyarrow is not installed.
    """
    try:
        yield from _parquet_rows(path) if path.suffix == ".parquet" else _tsv_rows(path)
    except (ValueError, OSError, csv.Error) as error:
        raise ValueError(f"{path}: not readable as {path.suffix[1:]} ({error})") from error


@lru_cache(maxsize=1)  # records of a shard follow each other in the file
def _row_group(path: Path, number: int) -> list[Row] | None:
    """Return the rows of one group of a parquet file; None: it has no more."""
    try:
        with _open_parquet(path) as file:
            if number < file.num_row_groups:
                return file.read_row_group(number, use_threads=False).to_pylist()
            return None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not readable as parquet ({error})") from error


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


def _parquet_rows(path: Path) -> Iterator[Row]:
    with _open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _open_parquet(path: Path) -> Any:
    try:
        return import_module("pyarrow.parquet").ParquetFile(path)
    except ImportError as error:
        raise ValueError("it needs pyarrow: pip install 'vico_pl[parquet]'") from error


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


def find_parquet(paths: Sequence[Path]) -> list[Path]:
    """Return the parquet files among paths and in the folders among them, in order."""
    found = [sorted(path.rglob("*.parquet")) if path.is_dir() else [path] for path in paths]
    return [path for files in found for path in files if path.suffix == ".parquet"]


def build_from_parquet(
    files: Sequence[Path],
    output: Path,
    *,
    max_samples: int | None = None,
    max_bytes: int | None = None,
    workers: int | None = None,
) -> tuple[ShardIndex, list[BadRecord]]:
    """Write the rows of parquet files as shards; returns their index and the bad rows.

    A row is a conversation as in LLaVA-OneVision-Data or The Cauldron. Limits are those of
    `build_from_annotations`.

    Raises:
        ValueError: a file is absent or damaged, pyarrow is not installed, or no row is usable.
    """
    lines: list[Line] = []
    faults: list[BadRecord] = []
    digest = hashlib.sha256()
    for path, group, number, row in tqdm(_rows(files), desc="read rows", unit="row", disable=None):
        try:
            text, images = _parse(row)
        except RecordError as error:
            faults.append(bad_record(f"{path.name}[{group}, {number}]", error))
            continue
        sizes = [len(image) for image in images]
        digest.update(text + json.dumps(sizes).encode())
        lines.append(Line(len(lines), path, group, number, bytes_in_tar([*sizes, len(text)])))
    parts = cut_into_shards(lines, faults, files, max_samples=max_samples, max_bytes=max_bytes)
    settings = {"parquet": [path.name for path in files], "content": digest.hexdigest()}
    times = json.dumps([int(path.stat().st_mtime) for path in files])
    return build_set(output, _records, parts, settings=settings, times=times, workers=workers), faults


def _rows(files: Sequence[Path]) -> Iterator[tuple[Path, int, int, Row]]:
    for path in files:
        for group in count():
            rows = _row_group(path, group)
            if rows is None:
                break
            yield from ((path, group, number, row) for number, row in enumerate(rows))


def _records(part: Sequence[Line]) -> Records:
    for line in part:
        rows = _row_group(line.path, line.start)
        assert rows is not None  # because it was there when the plan was made
        text, images = _parse(rows[line.length])
        files = {f"{i}." * (len(images) > 1) + _ending(image): image for i, image in enumerate(images)}
        yield f"{line.number:08d}", {**files, "json": text}


def _parse(row: Row) -> tuple[bytes, list[bytes]]:
    entry, images = conversation_of(row)
    parse_conversation(entry, num_images=len(images))
    return annotation_bytes(entry), images


def _ending(image: bytes) -> str:
    return "png" if image.startswith(b"\x89PNG") else "webp" if image[8:12] == b"WEBP" else "jpg"
