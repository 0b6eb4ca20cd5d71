"""Rows of published data sets: parquet files as on the Hugging Face Hub, and VLMEvalKit's TSV."""

import csv
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

ROWS_AT_ONCE = 16  # of parquet: rows with images may have megabytes
_MAX_FIELD = 2**28  # bytes of a TSV field: an image of 128 MiB as base64, and room for a few
_MAX_REFERENCE = 64  # letters: where an image would be, VLMEvalKit writes the index of a row that has it


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a `.parquet` or `.tsv` file; of the latter, all values are texts.

    Raises:
        ValueError: the file is damaged, or pyarrow is not installed.
    """
    try:
        yield from _parquet_rows(path) if path.suffix == ".parquet" else _tsv_rows(path)
    except (ValueError, OSError, csv.Error) as error:
        raise ValueError(f"{path}: not readable as {path.suffix[1:]} ({error})") from error


def open_parquet(path: Path) -> Any:
    """Open a parquet file.

    Raises:
        ValueError: it is none, or pyarrow is not installed.
    """
    try:
        return import_module("pyarrow.parquet").ParquetFile(path)
    except ImportError as error:
        raise ValueError("it needs pyarrow: pip install 'vico_pl[parquet]'") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _tsv_rows(path: Path) -> Iterator[dict[str, Any]]:
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
