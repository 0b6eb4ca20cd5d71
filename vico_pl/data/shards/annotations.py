"""LLaVA / InternVL annotation files -> records of shards."""

import codecs
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from vico_pl.data.decode import IMAGE_EXTENSIONS, parse_conversation
from vico_pl.data.shards.build import build_set
from vico_pl.data.shards.reader import ShardIndex, write_shard
from vico_pl.errors import RecordError
from vico_pl.types import BadRecord

IMAGE_FIELDS = ("image", "images")  # one path or a list of paths, relative to the image folder
SAMPLES_PER_SHARD = 1000  # by default
_BLOCK = 512  # bytes of a tar block: a header takes one, contents are padded to whole ones


class Piece(NamedTuple):
    """Position of a record's JSON in an annotation file."""

    path: Path
    start: int  # byte
    length: int


class Line(NamedTuple):
    """A record to write: its number in the set, its JSON, and its size in a tar."""

    number: int
    piece: Piece
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class ShardLimits:
    """Limits of a shard; by default 1,000 samples."""

    max_samples: int | None = None
    max_bytes: int | None = None  # a larger sample gets its own shard

    def cut(self, lines: Sequence[Line]) -> list[list[Line]]:
        """Cut records into shards, in their order."""
        max_samples = self.max_samples or (len(lines) if self.max_bytes else SAMPLES_PER_SHARD)
        parts: list[list[Line]] = []
        num_bytes = 0
        for line in lines:
            is_over = self.max_bytes is not None and _tar_bytes(num_bytes + line.num_bytes) > self.max_bytes
            if not parts or is_over or len(parts[-1]) == max_samples:
                parts.append([])
                num_bytes = 0
            parts[-1].append(line)
            num_bytes += line.num_bytes
        return parts


def build_from_annotations(
    annotations: Sequence[Path],
    images: Path,
    output: Path,
    *,
    limits: ShardLimits = ShardLimits(),
    workers: int | None = None,
) -> tuple[ShardIndex, list[BadRecord]]:
    """Write annotation files and their images as shards; returns their index and the bad records.

    A file is JSONL, or one JSON list. Records keep the order of the files and of their lines.

    Raises:
        ValueError: a file or the image folder is absent, a list is unreadable, or no record is usable.
    """
    for path in annotations:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; expected JSONL or a JSON list with 'conversations'")
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder; image paths of the annotations start from it")
    lines, faults, checksum = _usable_lines(annotations, images)
    if not lines:
        first = faults[0].reason if faults else "empty"
        raise ValueError(f"{', '.join(map(str, annotations))}: no usable line; the first fault: {first}")
    write = partial(_write_shard, images=images)
    settings = {"annotations": [path.name for path in annotations], "content": checksum}
    return build_set(output, write, limits.cut(lines), settings=settings, workers=workers), faults


def _tar_bytes(num_bytes: int) -> int:
    """Return the size of a tar whose members take `num_bytes`, with its end blocks and padding."""
    return -(-(num_bytes + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _usable_lines(paths: Sequence[Path], images: Path) -> tuple[list[Line], list[BadRecord], str]:
    """Return usable records, bad records, and a checksum of everything that will be written."""
    lines: list[Line] = []
    faults: list[BadRecord] = []
    digest = hashlib.sha256()
    pieces = (item for path in paths for item in _pieces(path))
    for name, piece, content in tqdm(pieces, desc="read annotations", unit="record", disable=None):
        try:
            entry, found = _parse_line(content, images)
        except RecordError as error:
            faults.append(BadRecord(id=name, reason=str(error)))
            continue
        sizes = [os.stat(path).st_size for path in found]
        digest.update(content + json.dumps([str(path.name) for path in found] + sizes).encode())
        members = [*sizes, len(_annotation(entry))]
        num_bytes = sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in members)
        lines.append(Line(len(lines), piece, num_bytes))
    return lines, faults, digest.hexdigest()


def _pieces(path: Path) -> Iterator[tuple[str, Piece, bytes]]:
    """Yield name, position and JSON of each record of a file."""
    if path.suffix != ".jsonl" and _is_list(path):
        yield from _list_items(path)
        return
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path.name}:{number}", Piece(path, position, len(line)), line
            position += len(line)


def _is_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _list_items(path: Path) -> Iterator[tuple[str, Piece, bytes]]:
    """Yield the items of a JSON list with their byte positions, so that each can be read alone later."""
    try:
        text = path.read_bytes().decode("utf-8")  # read_text() would turn \r\n into \n and shift positions
        place, position, decoder = text.index("[") + 1, 0, json.JSONDecoder()
        position = len(text[:place].encode())
        number = 0
        while (start := _next_item(text, place)) is not None:
            _, end = decoder.raw_decode(text, start)
            content = text[start:end].encode()
            position += len(text[place:start].encode())
            yield f"{path.name}[{number}]", Piece(path, position, len(content)), content
            place, position, number = end, position + len(content), number + 1
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable JSON list ({error})") from error


def _next_item(text: str, place: int) -> int | None:
    """Return the start of the next item of a list, or None at its end."""
    while text[place : place + 1] in (" ", "\n", "\r", "\t", ","):
        place += 1
    if place == len(text):
        raise ValueError("it is truncated")
    return None if text[place] == "]" else place


def _parse_line(line: bytes, images: Path) -> tuple[dict[str, Any], list[Path]]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"JSON: {error}") from error
    if not isinstance(entry, dict):
        raise RecordError("expected a JSON object in each line")
    named = [name for field in IMAGE_FIELDS for name in _as_list(entry.get(field))]
    paths = [_image_path(name, images) for name in named]
    parse_conversation(entry, num_images=len(paths))
    return {k: v for k, v in entry.items() if k not in IMAGE_FIELDS}, paths


def _image_path(name: Any, images: Path) -> Path:
    if not isinstance(name, str) or "\0" in name:
        raise RecordError(f"image path {name!r} is not a path")
    path = Path(os.path.abspath(images / name))  # not resolve(): links may lead elsewhere
    if not path.is_relative_to(os.path.abspath(images)):
        raise RecordError(f"image path '{name}' leads out of {images}")
    if path.suffix.lower().lstrip(".") not in IMAGE_EXTENSIONS:
        raise RecordError(f"image '{name}': expected one of {', '.join(IMAGE_EXTENSIONS)}")
    if not path.is_file():
        raise RecordError(f"image '{name}' is absent")
    return path


def _as_list(value: Any) -> list[Any]:
    if value is None or value == "":  # both mark a text-only record
        return []
    return value if isinstance(value, list) else [value]


def _write_shard(path: Path, part: Sequence[Line], *, images: Path) -> None:
    write_shard(path, (_record(line, images) for line in part))


def _record(line: Line, images: Path) -> tuple[str, dict[str, bytes]]:
    with line.piece.path.open("rb") as file:
        content = os.pread(file.fileno(), line.piece.length, line.piece.start)
    entry, paths = _parse_line(content, images)
    names = [path.suffix.lower().lstrip(".") for path in paths]
    if len(paths) > 1:
        names = [f"{i}.{name}" for i, name in enumerate(names)]
    files = {name: path.read_bytes() for name, path in zip(names, paths, strict=True)}
    return f"{line.number:08d}", {**files, "json": _annotation(entry)}


def _annotation(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode(errors="surrogatepass")
