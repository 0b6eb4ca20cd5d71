"""Shards that are fetched or unpacked whole into a cache, and read there as any tar of this machine is."""

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vico_pl.data.shards.index import (
    INDEX_NAME,
    ShardEntry,
    map_bounds,
    map_sizes,
    shard_stem,
    side_index_path,
    sizes_path,
    write_array,
)
from vico_pl.data.shards.local import LocalShards
from vico_pl.data.shards.locations import Source, parse_source
from vico_pl.data.shards.opened import Contents, OpenShard, check_size, write_contents
from vico_pl.data.shards.remote import ShardCache, StreamingConfig, build_cache, fetch_bytes
from vico_pl.data.shards.sizes import are_sizes, measure_shard
from vico_pl.data.shards.tars import scan_tar
from vico_pl.errors import RecordError

_AT_A_TIME = 4  # shards that are counted together, and small files that are fetched


@dataclass(frozen=True, kw_only=True)
class CachedShards:
    """Opens the shards of a set of which some or all are fetched.

    What samples cost is known of all shards or of none, so that ranks on several machines know the same.
    """

    source: Source
    entries: Sequence[ShardEntry]
    cache: ShardCache
    in_place: LocalShards | None  # of a local folder: those shards that are not packed
    has_sizes: bool = False

    def open(self, number: int) -> OpenShard:
        """Open a shard, fetched if it is not in the cache.

        Raises:
            RecordError: it cannot be fetched, is damaged or not the one that was indexed.
            ValueError: what lies beside it is damaged.
        """
        entry = self.entries[number]
        if self.in_place is not None and entry.name in self._places:
            return self.in_place.open(self._places[entry.name])
        return _open_kept(self.source, entry.name, self.cache, entry)

    def sizes(self, number: int) -> np.ndarray | None:
        """Return what the samples of a shard cost, int32 (n, 4); None: unknown.

        Raises:
            FileNotFoundError: it was known and is gone; this machine would deal otherwise than others.
        """
        if not self.has_sizes:
            return None
        entry = self.entries[number]
        sizes = _known_sizes(self.source, entry, self.cache)
        if sizes is None:
            path = sizes_path(_kept_path(self.source, entry.name, self.cache, entry))
            raise FileNotFoundError(f"{path}: removed during the run; leave the cache alone while it is used")
        return sizes

    def fetch(self, number: int) -> None:
        """Fetch a shard that will be read, unless another process is about it.

        A fault is left to whoever reads the shard.
        """
        entry = self.entries[number]
        if entry.name not in self._places:
            with suppress(RecordError, TimeoutError, OSError):
                _open_kept(self.source, entry.name, self.cache, entry, wait_s=0.0)

    def look(self, number: int) -> None:
        """Raise `RecordError` for a shard of this machine that is absent, damaged or of another size."""
        entry = self.entries[number]
        if self.in_place is not None and entry.name in self._places:
            self.in_place.look(self._places[entry.name])
        elif self.source.is_local:
            check_size(Path(self.source.location(entry.name)), entry)

    @cached_property
    def _places(self) -> dict[str, int]:
        """Numbers of the shards that are read in place, among those."""
        return {} if self.in_place is None else {e.name: i for i, e in enumerate(self.in_place.entries)}


def open_streamed(
    source: Source,
    names: Sequence[str],
    known: Mapping[str, ShardEntry],
    cache: ShardCache,
    *,
    in_place: LocalShards | None = None,
) -> CachedShards:
    """Open shards; those that `index.json` does not count are fetched once to count them.

    Raises:
        ValueError: one that is not counted cannot be fetched or is damaged, so that nobody can tell how many
            samples it has.
    """
    known = {**known, **_count_all(source, [name for name in names if name not in known], cache)}
    shards = CachedShards(
        source=source, entries=[known[name] for name in names], cache=cache, in_place=in_place
    )
    return replace(shards, has_sizes=_fetch_sizes(source, shards.entries, cache))


def unpack_contents(path: Path, streaming: StreamingConfig) -> Contents:
    """Unpack a shard of this machine once to find out what it holds.

    Raises:
        ValueError: it is no packed tar.
    """
    source, cache = parse_source(str(path)), build_cache(streaming)
    opened = _open_kept(source, path.name, cache, None)
    return Contents(opened.bounds, measure_shard(opened.descriptor, opened.bounds))


def _count_all(source: Source, names: Sequence[str], cache: ShardCache) -> dict[str, ShardEntry]:
    """Count shards; what came out of it stays in the cache."""
    new = [name for name in names if not side_index_path(_kept_path(source, name, cache)).exists()]
    if new:
        warnings.warn(
            f"{source.folder}: {len(new)} of its shards are in no {INDEX_NAME}, so each is fetched once to "
            f"count its samples; an {INDEX_NAME} beside them spares that ('vico shards index' writes it)",
            stacklevel=2,
        )
    count = partial(_count, source=source, cache=cache)
    pool = ThreadPoolExecutor(_AT_A_TIME)
    try:
        bar = tqdm(pool.map(count, names), total=len(names), unit="shard", disable=None if new else True)
        return {entry.name: entry for entry in bar}
    finally:
        pool.shutdown(cancel_futures=True)


def _count(name: str, *, source: Source, cache: ShardCache) -> ShardEntry:
    try:
        bounds = map_bounds(side_index_path(_kept_path(source, name, cache)))
    except (FileNotFoundError, ValueError):
        bounds = _open_kept(source, name, cache, None).bounds
    return ShardEntry(name=name, num_samples=len(bounds) - 1)


def _fetch_sizes(source: Source, entries: Sequence[ShardEntry], cache: ShardCache) -> bool:
    """Bring what samples cost into the cache, and say whether it is known of all shards.

    Raises:
        ValueError: it is there but cannot be fetched: other machines might succeed, and deal otherwise.
    """
    fetch = partial(_fetch_sizes_of, source=source, cache=cache)
    pool = ThreadPoolExecutor(_AT_A_TIME)
    try:
        return all(map(fetch, entries[:1])) and all(pool.map(fetch, entries[1:]))
    finally:
        pool.shutdown(cancel_futures=True)


def _fetch_sizes_of(entry: ShardEntry, *, source: Source, cache: ShardCache) -> bool:
    if _known_sizes(source, entry, cache) is not None:
        return True
    if source.is_local or source.commands is not None:
        return False
    content = fetch_bytes(source.location(f"{shard_stem(entry.name)}.sizes"))
    try:
        sizes = None if content is None else np.load(BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError):
        return False
    if sizes is None or not are_sizes(sizes, entry.num_samples):
        return False
    path = sizes_path(_kept_path(source, entry.name, cache, entry))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_array(sizes, path)
    return True


def _known_sizes(source: Source, entry: ShardEntry, cache: ShardCache) -> np.ndarray | None:
    kept = map_sizes(sizes_path(_kept_path(source, entry.name, cache, entry)), count=entry.num_samples)
    if kept is None and source.is_local:
        return map_sizes(sizes_path(Path(source.location(entry.name))), count=entry.num_samples)
    return kept


def _open_kept(
    source: Source, name: str, cache: ShardCache, entry: ShardEntry | None, *, wait_s: float = -1.0
) -> OpenShard:
    """Open a shard in the cache, fetched if it is not there."""
    path = _kept_path(source, name, cache, entry)
    note = partial(_note, path=path, entry=entry)
    descriptor = cache.open(source.location(name), path, entry, check=note, wait_s=wait_s)
    try:
        if not side_index_path(path).exists():
            note(Path(f"/dev/fd/{descriptor}"))
        count = None if entry is None else entry.num_samples
        num_bytes = os.fstat(descriptor).st_size
        bounds = map_bounds(side_index_path(path), count=count, num_bytes=num_bytes)
        return OpenShard(os.dup(descriptor), bounds)
    finally:
        os.close(descriptor)


def _note(tar: Path, *, path: Path, entry: ShardEntry | None) -> None:
    """Write beside `path` where the samples of a tar lie; if nobody counted them before, what they cost, too.

    Raises:
        ValueError: it is no readable tar, or has another number of samples than was counted.
    """
    with tar.open("rb") as file:
        bounds = scan_tar(file)
        sizes = measure_shard(file.fileno(), bounds) if entry is None else None
    if entry is not None and len(bounds) - 1 != entry.num_samples:
        raise ValueError(f"holds {len(bounds) - 1} samples, {INDEX_NAME} says {entry.num_samples}")
    write_contents(Contents(bounds, sizes), path)


def _kept_path(source: Source, name: str, cache: ShardCache, entry: ShardEntry | None = None) -> Path:
    """Return where a shard is kept: elsewhere if its URL or, as far as is known, its content is another."""
    content = "" if entry is None else f"{entry.num_bytes or ''}{entry.sha256 or ''}"
    if source.is_local:
        with suppress(FileNotFoundError):  # whoever opens it tells
            status = os.stat(source.location(name))
            content = f"{status.st_size} {status.st_mtime_ns}"
    identity = _digest(f"{source.identity(name)} {content}")
    return cache.folder / _digest(source.base) / f"{shard_stem(name)}-{identity}.tar"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]
