"""Writing the index of a folder of tars: what lies beside each of them, and `index.json` last."""

import hashlib
from functools import partial
from pathlib import Path

from vico_pl.data.shards.cached import unpack_contents
from vico_pl.data.shards.index import INDEX_NAME, ShardEntry, sizes_path, write_array, write_entries
from vico_pl.data.shards.locations import is_packed, list_shards
from vico_pl.data.shards.opened import read_contents, write_contents
from vico_pl.data.shards.parallel import run_parallel, worth_processes
from vico_pl.data.shards.remote import StreamingConfig


def index_folder(folder: Path, *, streaming: StreamingConfig, workers: int | None = None) -> None:
    """Write the index of a folder anew, whatever was there.

    Raises:
        ValueError: the folder has no tar, or one is unreadable.
    """
    paths = [folder / name for name in list_shards(folder)]
    index = partial(_index_shard, streaming=streaming)
    workers = workers or worth_processes(paths)
    entries = list(run_parallel(index, paths, workers=workers, title=f"index of {folder}"))
    write_entries(entries, folder / INDEX_NAME)


def _index_shard(path: Path, *, streaming: StreamingConfig) -> ShardEntry:
    if is_packed(path.name):  # positions are those of the unpacked tar, of which none is kept here
        contents = unpack_contents(path, streaming)
        assert contents.sizes is not None  # as they were measured
        write_array(contents.sizes, sizes_path(path))
    else:
        contents = read_contents(path)
        write_contents(contents, path)
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    count = len(contents.bounds) - 1
    return ShardEntry(name=path.name, num_samples=count, num_bytes=path.stat().st_size, sha256=checksum)
