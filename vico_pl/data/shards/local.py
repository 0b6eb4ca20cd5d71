"""Plain tars on a disk of this machine, read in place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from vico_pl.data.shards.index import ShardEntry, map_sizes, side_index_path, sizes_path
from vico_pl.data.shards.opened import Contents, OpenShard, map_contents, note_contents, open_in_place
from vico_pl.data.shards.parallel import run_parallel, worth_processes
from vico_pl.errors import RecordError


@dataclass(frozen=True, kw_only=True)
class LocalShards:
    """Opens the shards of a folder."""

    folder: Path
    entries: Sequence[ShardEntry]
    contents: dict[str, Contents] = field(default_factory=dict)  # of shards in a folder that is read-only

    def open(self, number: int) -> OpenShard:
        """Open a shard.

        Raises:
            RecordError: it is absent, damaged or not the one that was indexed.
            ValueError: what lies beside it is damaged.
        """
        entry = self.entries[number]
        path = self.folder / entry.name
        try:
            return open_in_place(path, entry, contents=self.contents.get(entry.name))
        except FileNotFoundError:  # of what lies beside it
            self._index(path, entry)
            return open_in_place(path, entry, contents=self.contents.get(entry.name))

    def sizes(self, number: int) -> np.ndarray | None:
        """Return what the samples of a shard cost, int32 (n, 4), also if the shard is gone; None: unknown."""
        entry = self.entries[number]
        if entry.name in self.contents:
            return self.contents[entry.name].sizes
        return map_sizes(sizes_path(self.folder / entry.name), count=entry.num_samples)

    def fetch(self, number: int) -> None:
        """Do nothing: the shards are here."""

    def look(self, number: int) -> None:
        """Open a shard and close it."""
        self.open(number)

    def _index(self, path: Path, entry: ShardEntry) -> None:
        try:
            contents = note_contents(path)
        except ValueError as error:
            raise RecordError(str(error), kind="shard") from error
        if contents is not None:
            self.contents[entry.name] = contents


def open_folder(folder: Path, names: Sequence[str], known: Mapping[str, ShardEntry]) -> LocalShards:
    """Open shards of a folder; those that `index.json` does not count are counted.

    Raises:
        ValueError: one that is not counted is absent or unreadable, so that nobody can tell how many samples
            it has.
    """
    shards = LocalShards(folder=folder, entries=[])
    paths = [folder / name for name in names]
    new = [path for path in paths if path.exists() and not side_index_path(path).exists()]
    jobs = [(path, path.name in known) for path in new]
    noted = run_parallel(_note, jobs, workers=worth_processes(new), title=f"index of {folder}")
    for path, contents in zip(new, noted, strict=True):
        if contents is not None:
            shards.contents[path.name] = contents
    return replace(shards, entries=[known.get(path.name) or _count(shards, path) for path in paths])


def _note(job: tuple[Path, bool]) -> Contents | None:
    path, is_counted = job
    try:
        return note_contents(path)
    except ValueError:
        if is_counted:  # it is opened, and its fault is told, as that of any other shard
            return None
        raise


def _count(shards: LocalShards, path: Path) -> ShardEntry:
    num_bytes = path.stat().st_size
    contents = shards.contents.get(path.name) or map_contents(path, count=None, num_bytes=num_bytes)
    return ShardEntry(name=path.name, num_samples=len(contents.bounds) - 1, num_bytes=num_bytes)
