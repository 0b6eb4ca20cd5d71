"""Writing sets of shards from the parquet files of data sets on the Hugging Face Hub."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path

from tqdm import tqdm

from vico_pl.data.decode import bad_record, parse_conversation
from vico_pl.data.shards.build import (
    SAMPLES_PER_SHARD,
    Line,
    Records,
    annotation_bytes,
    build_set,
    bytes_in_tar,
    cut_into_shards,
)
from vico_pl.data.shards.shard import ShardIndex
from vico_pl.data.tables import Row, conversation_of, read_row_group
from vico_pl.errors import RecordError
from vico_pl.types import BadRecord

_row_group = lru_cache(maxsize=1)(read_row_group)  # records of a shard follow each other in the file


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
    if not lines:
        first = faults[0].reason if faults else "no row"
        raise ValueError(f"{', '.join(map(str, files))}: no usable row; the first fault: {first}")
    max_samples = max_samples or (len(lines) if max_bytes else SAMPLES_PER_SHARD)
    parts = cut_into_shards(lines, max_samples=max_samples, max_bytes=max_bytes)
    settings = {"parquet": [path.name for path in files], "content": digest.hexdigest()}
    times = json.dumps([int(path.stat().st_mtime) for path in files])
    return build_set(output, _records, parts, settings=settings, times=times, workers=workers), faults


def _rows(files: Sequence[Path]) -> Iterator[tuple[Path, int, int, Row]]:
    for path in files:
        for group in count():
            rows = read_row_group(path, group)
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
