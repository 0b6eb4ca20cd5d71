"""`index.json` of a set of shards, and the sidecar file of each shard.

    index.json   names, counts, sizes and checksums of all shards; written last, so it marks a complete set
    NAME.idx     int64 array (n + 1, 5) in NumPy's format. Row i: where sample i begins in the uncompressed
                 tar, then its `SampleSize` (-1: unknown). The last row: where the last sample ends, zeros.

Large arrays are memory-mapped, so that the processes of a machine share them; small ones are read, because
each map holds a file open.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

import numpy as np

from vico_pl.data.decode import parsing
from vico_pl.data.shards.locations import SHARD_ENDINGS
from vico_pl.files import atomic_path, write_json

INDEX_NAME = "index.json"
PLAN_NAME = "build.json"  # of a set that `vico shards build` writes, see `build.py`
INDEX_VERSION = 1
_MIN_MAPPED_BYTES = 2**16
_MAGIC = b"\x93NUMPY"
_PARSING = Lock()  # NumPy parses headers with `ast`, which fails in threads of 3.11 (python/cpython#106905)


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A shard as listed in `index.json`."""

    name: str
    num_samples: int
    num_bytes: int | None = None  # of the file as stored, compressed or not; None: unknown
    sha256: str | None = None  # of the same


class Contents(NamedTuple):
    """Where the samples of a tar are, and their sizes."""

    bounds: np.ndarray  # int64 (n + 1,): byte positions between the samples
    sizes: np.ndarray | None  # (n, 4), see `SampleSize`; None: unknown


def side_index_path(path: Path) -> Path:
    """Return the path of a shard's sidecar: `a.idx` next to `a.tar` or `a.tar.gz`."""
    return path.with_name(f"{shard_stem(path.name)}.idx")


def shard_stem(name: str) -> str:
    """Return a shard's name without its ending.

    >>> shard_stem("train-v1.2-000000.tar.gz"), shard_stem("a.tgz"), shard_stem("a.tar")
    ('train-v1.2-000000', 'a', 'a')
    """
    return name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")


def rebuild_hint(folder: object) -> str:
    """Return the remedy for a damaged index."""
    return f"'vico shards index {folder}' rebuilds it"


def write_entries(entries: list[ShardEntry], path: Path) -> None:
    """Write `index.json`; unknown values are left out."""
    shards = [{key: value for key, value in vars(entry).items() if value is not None} for entry in entries]
    write_json({"version": INDEX_VERSION, "shards": shards}, path)


def parse_entries(content: bytes, *, where: str) -> list[ShardEntry]:
    """Parse `index.json`.

    Raises:
        ValueError: it is unreadable, or lists a shard outside its folder.
    """
    try:
        with parsing():
            shards = json.loads(content)["shards"]
        of_mosaic = bool(shards) and "raw_data" in shards[0]
        entries = [] if of_mosaic else [_parse_entry(entry) for entry in shards]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: unreadable; {rebuild_hint(where.rpartition('/')[0])}") from error
    if of_mosaic:
        raise ValueError(f"{where}: lists shards of MosaicML; expected WebDataset tars (see data/README.md)")
    names = [entry.name for entry in entries]
    for name in names:
        if "/" in name or "\0" in name or not name.endswith(SHARD_ENDINGS):
            raise ValueError(f"{where}: names '{name}', which is no file name of a shard in that folder")
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: names a shard twice")
    return entries


def _parse_entry(entry: dict[str, Any]) -> ShardEntry:
    known = {key: entry[key] for key in ("num_bytes", "sha256") if entry.get(key) is not None}
    parsed = ShardEntry(name=entry["name"], num_samples=entry["num_samples"], **known)
    for key, value in vars(parsed).items():
        is_count = type(value) is int and 0 <= value < 2**62
        is_text = isinstance(value, str) and value != ""
        if value is not None and not (is_count if key.startswith("num_") else is_text):
            raise TypeError(f"'{key}' is {value!r}")
    return parsed


def write_sidecar(contents: Contents, path: Path) -> None:
    """Write the sidecar of the shard at `path` in one step."""
    table = np.zeros((len(contents.bounds), 5), dtype=np.int64)
    table[:, 0] = contents.bounds
    table[:-1, 1:] = -1 if contents.sizes is None else contents.sizes
    with atomic_path(side_index_path(path)) as temporary, temporary.open("wb") as file:
        np.save(file, table, allow_pickle=False)


def read_sidecar(path: Path) -> Contents | None:
    """Read the sidecar of the shard at `path`; None: there is none, or it is foreign or of an older version.

    Raises:
        ValueError: it is damaged.
    """
    sidecar = side_index_path(path)
    try:
        is_large = sidecar.stat().st_size >= _MIN_MAPPED_BYTES
        return load_sidecar(sidecar, mmap_mode="r" if is_large else None)
    except FileNotFoundError:
        return None
    except ValueError as error:
        if is_foreign(path):
            return None
        raise ValueError(f"{sidecar}: {error}; {rebuild_hint(path.parent)}") from error


def is_foreign(path: Path) -> bool:
    """Say whether another tool wrote the file with the name of a shard's sidecar, as that of DALI does."""
    with suppress(OSError), side_index_path(path).open("rb") as file:
        return not _MAGIC.startswith(file.read(len(_MAGIC)))
    return False


def load_sidecar(file: Path | BytesIO, *, mmap_mode: Literal["r"] | None = None) -> Contents | None:
    """Return the contents of a sidecar; None: it is of an older version, (n + 1,) without sizes.

    Raises:
        ValueError: it is no sidecar.
    """
    try:
        with _PARSING:
            table: np.ndarray = np.load(file, allow_pickle=False, mmap_mode=mmap_mode)
    except EOFError as error:
        raise ValueError(str(error)) from error
    if table.dtype != np.int64 or table.ndim not in (1, 2) or table.shape[1:] not in ((), (5,)):
        raise ValueError("not an int64 array (n + 1, 5)")
    if table.ndim == 1:
        return None
    bounds, sizes = table[:, 0], table[:-1, 1:]
    if not len(bounds) or bounds[0] < 0 or (np.diff(bounds) <= 0).any():
        raise ValueError("its byte positions do not rise")
    return Contents(bounds, None if (sizes < 0).any() else sizes)


def read_sizes(path: Path, count: int) -> np.ndarray | None:
    """Return the sizes (count, 4) of the samples of the shard at `path`, see `SampleSize`; None: unknown."""
    with suppress(OSError, ValueError):
        contents = read_sidecar(path)
        if contents is not None and contents.sizes is not None and len(contents.sizes) == count:
            return contents.sizes
    return None
