"""Plain tars on a disk of this machine, read in place."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vico_pl.data.decode import RecordError
from vico_pl.data.index import INDEX_NAME, ShardEntry
from vico_pl.data.opened import Contents, OpenShard, map_contents, note_contents, open_shard


@dataclass(frozen=True, kw_only=True)
class LocalShards:
    """Opens the shards of a folder."""

    folder: Path
    entries: Sequence[ShardEntry]
    contents: dict[str, Contents] = field(default_factory=dict)  # of shards in a folder that is read-only

    def __call__(self, number: int) -> OpenShard:
        """Open a shard.

        Raises:
            RecordError: it is absent, damaged or not the one that was indexed.
            ValueError: what lies beside it is damaged.
        """
        entry = self.entries[number]
        path = self.folder / entry.name
        try:
            return open_shard(path, entry, contents=self.contents.get(entry.name))
        except FileNotFoundError:  # of what lies beside it
            self._index(path, entry)
            return open_shard(path, entry, contents=self.contents.get(entry.name))

    def _index(self, path: Path, entry: ShardEntry) -> None:
        try:
            contents = note_contents(path)
        except ValueError as error:
            raise RecordError(str(error), kind="shard") from error
        if contents is None:
            contents = map_contents(path, count=None, num_bytes=path.stat().st_size)
        else:
            self.contents[entry.name] = contents
        if len(contents.bounds) - 1 != entry.num_samples:
            found = f"{len(contents.bounds) - 1} samples, {INDEX_NAME} says {entry.num_samples}"
            reason = f"{path}: holds {found}; run 'vico shards index {path.parent}'"
            raise RecordError(reason, kind="shard")


def count_local(folder: Path, names: Sequence[str]) -> LocalShards:
    """Open tars of which no `index.json` tells.

    Raises:
        ValueError: one is unreadable, so that nobody can tell how many samples it has.
    """
    shards = LocalShards(folder=folder, entries=[])
    entries = [_count(shards, folder / name) for name in names]
    return replace(shards, entries=entries)


def _count(shards: LocalShards, path: Path) -> ShardEntry:
    num_bytes = path.stat().st_size
    try:
        contents = map_contents(path, count=None, num_bytes=num_bytes)
    except FileNotFoundError:
        noted = note_contents(path)
        if noted is None:
            noted = map_contents(path, count=None, num_bytes=num_bytes)
        else:
            shards.contents[path.name] = noted
        contents = noted
    return ShardEntry(name=path.name, num_samples=len(contents.bounds) - 1, num_bytes=num_bytes)
