"""Writing sets of shards, from GlyphDocs or from LLaVA / InternVL annotation files.

The plan of a set is written first, as `build.json`: how it was asked for, and how many samples each shard
gets. Shards are written by several processes, whole or not at all; the same command completes an interrupted
set. A build with another plan into the same folder is refused, or the set would be of two kinds.
"""

import codecs
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from vico_pl.data.decode import IMAGE_EXTENSIONS, bad_record, parse_conversation, parsing
from vico_pl.data.glyphs import GlyphsConfig, draw_records
from vico_pl.data.shards.index import INDEX_NAME, PLAN_NAME, side_index_path
from vico_pl.data.shards.reader import read_index, run_parallel, write_index, write_shard
from vico_pl.data.shards.shard import ShardIndex
from vico_pl.data.tables import Row, conversation_of, num_row_groups, read_row_group
from vico_pl.errors import RecordError
from vico_pl.files import write_json
from vico_pl.types import BadRecord

IMAGE_FIELDS = ("image", "images")  # one path or a list of paths, relative to the image folder
SAMPLES_PER_SHARD = 1000  # of annotations, by default
_MAX_META_BYTES = 2**20
_BLOCK = 512  # bytes of a tar block: a header takes one, contents are padded to whole ones

_row_group = lru_cache(maxsize=1)(read_row_group)  # records of a shard follow each other in the file
Part = TypeVar("Part", bound=Sized)  # what a shard is made of; its length is the number of samples
Records = Iterable[tuple[str, dict[str, bytes]]]  # key and files of each record


class Line(NamedTuple):
    """A usable record of an annotation file: its number in the set, its JSON's place, its size in a tar."""

    number: int
    path: Path
    start: int  # byte; of parquet: row group
    length: int  # of parquet: row of the group
    num_bytes: int


def build_glyphs(
    folder: Path, config: GlyphsConfig, *, num_samples: int, seed: int, samples_per_shard: int
) -> ShardIndex:
    """Draw GlyphDocs shards."""
    starts = range(0, num_samples, samples_per_shard)
    parts = [range(start, min(start + samples_per_shard, num_samples)) for start in starts]
    records = partial(_glyphs, config=config, seed=seed)
    return build_set(folder, records, parts, settings={**vars(config), "seed": seed})


def build_from_annotations(
    annotations: Sequence[Path],
    images: Path,
    output: Path,
    *,
    max_samples: int | None = None,
    max_bytes: int | None = None,
    workers: int | None = None,
) -> tuple[ShardIndex, list[BadRecord]]:
    """Write annotation files and their images as shards; returns their index and the bad records.

    A file is JSONL, one JSON list or parquet (columns: see `conversation_of`); a folder means the parquet
    files in it. Records keep the order of the files and of their lines. A shard has at most `max_samples` and
    `max_bytes`, by default 1,000 samples; a larger sample gets its own shard.

    Raises:
        ValueError: a file or the image folder is absent, a list is unreadable, or no record is usable.
    """
    annotations = [file for path in annotations for file in sorted(path.rglob("*.parquet")) or [path]]
    for path in annotations:
        if not path.is_file():
            expected = "JSONL or a JSON list with 'conversations', or parquet or a folder of it"
            raise ValueError(f"{path}: no such file; expected {expected}")
        _refuse_meta_file(path)
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder; image paths of the annotations start from it")
    lines, faults, checksum, times = _usable_lines(annotations, images)
    if not lines:
        first = faults[0].reason if faults else "empty"
        raise ValueError(f"{', '.join(map(str, annotations))}: no usable line; the first fault: {first}")
    max_samples = max_samples or (len(lines) if max_bytes else SAMPLES_PER_SHARD)
    parts = _cut(lines, max_samples=max_samples, max_bytes=max_bytes)
    settings = {"annotations": [path.name for path in annotations], "content": checksum}
    records = partial(_records, images=images)
    return build_set(output, records, parts, settings=settings, times=times, workers=workers), faults


def build_set(
    folder: Path,
    records: Callable[[Part], Records],
    parts: Sequence[Part],
    *,
    settings: Mapping[str, Any],
    times: str | None = None,
    workers: int | None = None,
) -> ShardIndex:
    """Write `records(part)` as a shard for each part; shards that are already whole are kept.

    `settings` say what else the records depend on, and `times` is a checksum of when the files changed that
    they are read from. The bytes do not depend on the number of `workers`.

    Raises:
        ValueError: the folder already holds a set, or a part of one, that was asked for otherwise.
    """
    plan = {"version": 1, "settings": dict(settings), "num_samples": [len(part) for part in parts]}
    plan["sha256"] = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    plan |= {} if times is None else {"times": times}
    if _is_whole(folder, plan):
        return read_index(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.partial"):  # of a process that was killed
        leftover.unlink()
    write_json(plan, folder / PLAN_NAME)
    jobs = [(folder / f"{folder.name}-{number:06d}.tar", part) for number, part in enumerate(parts)]
    # A shard is whole if it has a sidecar, which is written after it.
    missing = [job for job in jobs if not (job[0].exists() and side_index_path(job[0]).exists())]
    write, done = partial(_write, records=records), len(jobs) - len(missing)
    list(run_parallel(write, missing, workers=workers, title=str(folder), done=done))
    return write_index(folder, workers=workers)


def _write(job: tuple[Path, Part], *, records: Callable[[Part], Records]) -> None:
    path, part = job
    write_shard(path, records(part))


def _glyphs(part: range, *, config: GlyphsConfig, seed: int) -> Records:
    return draw_records(config, seed=seed, start=part.start, count=len(part))


def _is_whole(folder: Path, plan: dict[str, Any]) -> bool:
    """Return whether a folder holds the set of a plan; another one, or a part of another, is refused."""
    is_whole, path, fault = (folder / INDEX_NAME).exists(), folder / PLAN_NAME, ""
    if path.exists():
        # Earlier versions stored no times.
        if _read_json(path) not in (plan, {key: plan[key] for key in plan if key != "times"}):
            state = "already holds" if is_whole else "already holds a part of"
            fault = f"{state} a set of other annotations, images or settings, or {PLAN_NAME} is damaged"
    elif is_whole:
        found, expected = read_index(folder).num_samples, sum(plan["num_samples"])
        if found != expected:
            fault = f"already holds {found} samples, not {expected}"
    elif any(folder.glob("*.tar")):
        fault = f"holds tars of which no {PLAN_NAME} tells the origin"
    if fault:
        raise ValueError(f"{folder}: {fault}; remove it or choose another folder")
    return is_whole


def _read_json(path: Path) -> Any:
    """Return the content of a JSON file; None: it is none."""
    with suppress(ValueError), parsing():
        return json.loads(path.read_bytes())


def _cut(lines: Sequence[Line], *, max_samples: int, max_bytes: int | None) -> list[list[Line]]:
    """Cut records into shards, in their order."""
    parts: list[list[Line]] = []
    num_bytes = 0
    for line in lines:
        # A tar ends with two empty blocks and is padded to whole tar records.
        size = -(-(num_bytes + line.num_bytes + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
        if not parts or len(parts[-1]) == max_samples or (max_bytes is not None and size > max_bytes):
            parts.append([])
            num_bytes = 0
        parts[-1].append(line)
        num_bytes += line.num_bytes
    return parts


def _usable_lines(paths: Sequence[Path], images: Path) -> tuple[list[Line], list[BadRecord], str, str]:
    """Return usable and bad records, a checksum of texts, image names and sizes, one of the images' times.

    A time, of the last change, counts in whole seconds: an archive keeps no more of it.
    """
    lines: list[Line] = []
    faults: list[BadRecord] = []
    digest, times = hashlib.sha256(), hashlib.sha256()
    found = ((path, *item) for path in paths for item in _pieces(path))
    for path, name, place, content in tqdm(found, desc="read annotations", unit="record", disable=None):
        try:
            entry, files = _parse(content, images)
        except RecordError as error:
            faults.append(bad_record(f"{path.name}{name}", error))
            continue
        on_disk = [file for file in files if isinstance(file, Path)]
        changed = on_disk if isinstance(content, bytes) else [path]
        times.update(json.dumps([int(file.stat().st_mtime) for file in changed]).encode())
        sizes = [file.stat().st_size if isinstance(file, Path) else len(file) for file in files]
        text = _annotation(entry)
        source = content if isinstance(content, bytes) else text
        digest.update(source + json.dumps([*(file.name for file in on_disk), *sizes]).encode())
        num_bytes = sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in (*sizes, len(text)))
        lines.append(Line(len(lines), path, place[0], place[1], num_bytes))
    return lines, faults, digest.hexdigest(), times.hexdigest()


def _refuse_meta_file(path: Path) -> None:
    if path.stat().st_size > _MAX_META_BYTES:
        return
    entries = _read_json(path)
    if not isinstance(entries, dict) or not all(
        isinstance(e, dict) and "annotation" in e for e in entries.values()
    ):
        return
    for entry in entries.values():
        files = f"--annotations {entry['annotation']} --images {entry.get('root', 'FOLDER')}"
        what = "a meta file of InternVL, which lists sets of annotations"
        raise ValueError(f"{path}: {what}; give the files of a set instead: {files}")


def _pieces(path: Path) -> Iterator[tuple[str, tuple[int, int], bytes | Row]]:
    """Yield the name within the file, place (as in `Line`) and JSON or row of each record."""
    if path.suffix == ".parquet":
        for group in range(num_row_groups(path)):
            for number, row in enumerate(read_row_group(path, group)):
                yield f"[{group}, {number}]", (group, number), row
        return
    position = 0
    with path.open("rb") as file:
        is_list = file.peek(1024).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        if is_list and path.suffix != ".jsonl":
            yield from ((name, (at, len(item)), item) for name, at, item in _list_items(path))
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f":{number}", (position, len(line)), line
            position += len(line)


def _list_items(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """Yield the items of a JSON list with their byte positions, so that each can be read alone later."""
    try:
        text = path.read_bytes().decode("utf-8")  # read_text() would turn \r\n into \n and shift positions
        decoder, end = json.JSONDecoder(), text.index("[") + 1
        position = len(text[:end].encode())
        for number in count():
            start = end
            while text[start : start + 1] in (" ", "\n", "\r", "\t", ","):
                start += 1
            if start == len(text):
                raise ValueError("it is truncated")
            if text[start] == "]":
                return
            position += start - end  # spaces and commas take one byte each
            with parsing():
                _, end = decoder.raw_decode(text, start)
            content = text[start:end].encode()
            yield f"[{number}]", position, content
            position += len(content)
    except ValueError as error:
        raise ValueError(f"{path}: not a readable JSON list ({error})") from error


def _parse(content: bytes | Row, images: Path) -> tuple[dict[str, Any], Sequence[Path | bytes]]:
    """Return a record without its images or image paths, and the images or image files."""
    if isinstance(content, bytes):
        return _parse_line(content, images)
    entry, pictures = conversation_of(content)
    parse_conversation(entry, num_images=len(pictures))
    return entry, pictures


def _parse_line(line: bytes, images: Path) -> tuple[dict[str, Any], list[Path]]:
    """Return a record without its image paths, and the image files."""
    try:
        with parsing():
            entry = json.loads(line)
    except ValueError as error:
        raise RecordError(f"JSON: {error}") from error
    if not isinstance(entry, dict):
        raise RecordError("expected a JSON object in each line")
    fields = [entry[name] for name in IMAGE_FIELDS if entry.get(name) not in (None, "")]  # "": text only
    named = [name for given in fields for name in (given if isinstance(given, list) else [given])]
    paths = [_image_path(name, images) for name in named]
    parse_conversation(entry, num_images=len(paths))
    return {k: v for k, v in entry.items() if k not in IMAGE_FIELDS}, paths


def _image_path(name: Any, images: Path) -> Path:
    if not isinstance(name, str) or "\0" in name:
        raise RecordError(f"image path {name!r} is not a path")
    path = Path(os.path.abspath(images / name))  # not resolve(): links may lead elsewhere
    if not path.is_relative_to(os.path.abspath(images)):
        raise RecordError(f"image path '{name}' leads out of {images}")
    if _ending(path) not in IMAGE_EXTENSIONS:
        raise RecordError(f"image '{name}': expected one of {', '.join(IMAGE_EXTENSIONS)}")
    if not path.is_file():
        raise RecordError(f"image '{name}' is absent")
    return path


def _records(part: Sequence[Line], *, images: Path) -> Records:
    for line in part:
        entry, found = _parse(_content(line), images)
        contents = [file.read_bytes() if isinstance(file, Path) else file for file in found]
        endings = [f"{i}." * (len(found) > 1) + _ending(file) for i, file in enumerate(found)]
        yield f"{line.number:08d}", {**dict(zip(endings, contents, strict=True)), "json": _annotation(entry)}


def _content(line: Line) -> bytes | Row:
    if line.path.suffix == ".parquet":
        return _row_group(line.path, line.start)[line.length]
    with line.path.open("rb") as file:
        return os.pread(file.fileno(), line.length, line.start)


def _ending(file: Path | bytes) -> str:
    if isinstance(file, Path):
        return file.suffix.lower().lstrip(".")
    return "png" if file.startswith(b"\x89PNG") else "webp" if file[8:12] == b"WEBP" else "jpg"


def _annotation(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode(errors="surrogatepass")
