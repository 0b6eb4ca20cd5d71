"""What is written beside shards: `index.json` of the set, and of each shard NAME.idx and NAME.sizes.

    index.json    names, counts, sizes and checksums of all shards; written last, so it marks a whole set
    NAME.idx      int64 array (n + 1,) in NumPy's format: sample i is the bytes [idx[i], idx[i + 1])
    NAME.sizes    int32 array (n, 4): what each sample will cost, see `sizes.py`

Arrays are mapped, so that all processes of a machine share them; small ones are read, as each map holds a
file open.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vico_pl.data.shards.locations import SHARD_ENDINGS
from vico_pl.data.shards.sizes import are_sizes
from vico_pl.files import atomic_path, write_json

INDEX_NAME = "index.json"
PLAN_NAME = "build.json"  # of a set that `vico shards build` writes, see `build.py`
INDEX_VERSION = 1
_MIN_MAPPED_BYTES = 2**16


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A shard as `index.json` has it."""

    name: str
    num_samples: int
    num_bytes: int | None = None  # of the file as it lies there, packed or not; None: not known
    sha256: str | None = None  # of the same


def side_index_path(path: Path) -> Path:
    """Return the path of a shard's side index: beside `a.tar` and `a.tar.gz` it is `a.idx`."""
    return path.with_name(f"{shard_stem(path.name)}.idx")


def sizes_path(path: Path) -> Path:
    """Return the path of what a shard's samples cost."""
    return path.with_name(f"{shard_stem(path.name)}.sizes")


def shard_stem(name: str) -> str:
    """Return a shard's name without its ending.

    >>> shard_stem("train-v1.2-000000.tar.gz"), shard_stem("a.tgz"), shard_stem("a.tar")
    ('train-v1.2-000000', 'a', 'a')
    """
    return name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")


def write_entries(entries: list[ShardEntry], path: Path) -> None:
    """Write `index.json`; what is not known is left out."""
    shards = [{key: value for key, value in vars(entry).items() if value is not None} for entry in entries]
    write_json({"version": INDEX_VERSION, "shards": shards}, path)


def parse_entries(content: bytes, *, where: str) -> list[ShardEntry]:
    """Read `index.json`.

    Raises:
        ValueError: it is unreadable, or names a shard outside its folder.
    """
    try:
        entries = [_parse_entry(entry) for entry in json.loads(content)["shards"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = f"'vico shards index {where.rpartition('/')[0]}' writes it anew"
        raise ValueError(f"{where}: unreadable; {remedy}") from error
    names = [entry.name for entry in entries]
    for name in names:
        if "/" in name or "\0" in name or not name.endswith(SHARD_ENDINGS):
            raise ValueError(f"{where}: names '{name}', which is no file name of a shard in that folder")
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: names a shard twice")
    return entries


def write_array(array: np.ndarray, path: Path) -> None:
    """Write an array in NumPy's format in one step."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def map_bounds(path: Path, *, count: int | None = None, num_bytes: int | None = None) -> np.ndarray:
    """Map a side index.

    Raises:
        ValueError: it is no array of byte positions of `count` samples in a tar of `num_bytes`.
    """
    remedy = f"'vico shards index {path.parent}' writes it anew"
    try:
        bounds = _load_array(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: no array of byte positions; {remedy}") from error
    if not _are_positions(bounds, num_bytes) or (count is not None and len(bounds) - 1 != count):
        raise ValueError(f"{path}: does not match {INDEX_NAME} or its shard; {remedy}")
    return bounds


def map_sizes(path: Path, *, count: int) -> np.ndarray | None:
    """Map what the samples of a shard cost; None: there is no such file, or it is one of something else."""
    try:
        sizes = _load_array(path)
    except (OSError, ValueError, EOFError):
        return None
    return sizes if are_sizes(sizes, count) else None


def _load_array(path: Path) -> np.ndarray:
    is_large = path.stat().st_size >= _MIN_MAPPED_BYTES
    return np.load(path, allow_pickle=False, mmap_mode="r" if is_large else None)


def _parse_entry(entry: dict[str, Any]) -> ShardEntry:
    name, num_samples = entry["name"], entry["num_samples"]
    num_bytes, sha256 = entry.get("num_bytes"), entry.get("sha256")
    numbers = [num_samples] if num_bytes is None else [num_samples, num_bytes]
    texts = [name] if sha256 is None else [name, sha256]
    if any(type(n) is not int or not 0 <= n < 2**62 for n in numbers):
        raise TypeError("a count is no number")
    if not all(isinstance(text, str) and text for text in texts):
        raise TypeError("a name or checksum is no text")
    return ShardEntry(name=name, num_samples=num_samples, num_bytes=num_bytes, sha256=sha256)


def _are_positions(bounds: np.ndarray, num_bytes: int | None) -> bool:
    """Say whether these are rising positions in a file."""
    if bounds.ndim != 1 or bounds.dtype != np.int64 or not len(bounds) or (np.diff(bounds) <= 0).any():
        return False
    return bool(bounds[0] >= 0 and (num_bytes is None or bounds[-1] <= num_bytes))
