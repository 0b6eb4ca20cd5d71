"""LLaVA / InternVL annotation files -> records of shards."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from vico_pl.data.build import build_set
from vico_pl.data.decode import IMAGE_EXTENSIONS, RecordError, parse_conversation
from vico_pl.data.shards import ShardIndex, write_shard
from vico_pl.types import BadRecord

IMAGE_FIELDS = ("image", "images")  # one path or a list of paths, relative to the image folder


def build_from_annotations(
    annotations: Path, images: Path, output: Path, *, samples_per_shard: int
) -> tuple[ShardIndex, list[BadRecord]]:
    """Pack a JSONL file and its images into shards; returns their index and the lines that were left out.

    Raises:
        ValueError: the file or the image folder is absent, or no line can be packed.
    """
    if not annotations.is_file():
        raise ValueError(
            f"{annotations}: no such file; expected JSONL with 'conversations' and 'image' in each line"
        )
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder; image paths of the annotations start from it")
    offsets, faults = _usable_lines(annotations, images)
    if not offsets:
        raise ValueError(
            f"{annotations}: no usable line; the first fault: {faults[0].reason if faults else 'empty'}"
        )
    write = partial(_write_shard, annotations=annotations, images=images, offsets=offsets)
    index = build_set(output, write, num_samples=len(offsets), samples_per_shard=samples_per_shard)
    return index, faults


def _usable_lines(annotations: Path, images: Path) -> tuple[list[int], list[BadRecord]]:
    """Return where usable lines begin, and what is wrong with the others."""
    offsets, faults, position = [], [], 0
    with annotations.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    _parse_line(line, images)
                    offsets.append(position)
            except RecordError as error:
                faults.append(BadRecord(id=f"{annotations.name}:{number}", reason=str(error)))
            position += len(line)
    return offsets, faults


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
        raise RecordError(f"image path {name!r} is no path")
    path = (images / name).resolve()
    if not path.is_relative_to(images.resolve()):
        raise RecordError(f"image path '{name}' leads out of {images}")
    if path.suffix.lower().lstrip(".") not in IMAGE_EXTENSIONS:
        raise RecordError(f"image '{name}': expected one of {', '.join(IMAGE_EXTENSIONS)}")
    if not path.is_file():
        raise RecordError(f"image '{name}' is absent")
    return path


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _write_shard(
    path: Path, start: int, count: int, *, annotations: Path, images: Path, offsets: list[int]
) -> None:
    with annotations.open("rb") as file:
        write_shard(path, (_record(file, offsets[i], i, images) for i in range(start, start + count)))


def _record(file: Any, offset: int, number: int, images: Path) -> tuple[str, dict[str, bytes]]:
    file.seek(offset)
    entry, paths = _parse_line(file.readline(), images)
    names = [path.suffix.lower().lstrip(".") for path in paths]
    if len(paths) > 1:
        names = [f"{i}.{name}" for i, name in enumerate(names)]
    files = {name: path.read_bytes() for name, path in zip(names, paths, strict=True)}
    annotation = json.dumps(entry, ensure_ascii=False).encode(errors="surrogatepass")
    return f"{number:08d}", {**files, "json": annotation}
