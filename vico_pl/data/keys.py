"""The names of a set's samples, without reading the samples."""

import io
import os
import tarfile

from vico_pl.data.shards import ShardIndex, member_key

# What tarfile and the system raise on damaged headers and disks.
_UNREADABLE = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError, OSError)


class SampleNames:
    """Names the samples of a set `shard/key`, as batches do, from one tar header each."""

    def __init__(self, index: ShardIndex) -> None:
        """Open nothing yet."""
        self._index = index
        self._files: dict[str, int] = {}
        self._held: dict[str, set[str | None]] = {}  # of each shard

    def __call__(self, sample: int) -> str | None:
        """Return the name of a sample; None: its header is unreadable."""
        shard, start, end = self._index.locate(sample)
        try:
            name = self._member_name(shard, start, end)
        except _UNREADABLE:
            return None
        key = member_key(name)
        return None if key is None else f"{shard}/{key}"

    def holds(self, name: str) -> bool:
        """Say whether some sample has this name."""
        shard = name.partition("/")[0]
        if shard not in self._held:
            self._held[shard] = {self(sample) for sample in self._samples_of(shard)}
        return name in self._held[shard]

    def _samples_of(self, shard: str) -> range:
        """Return the numbers of the samples of a shard."""
        start = 0
        for name, bounds in zip(self._index.names, self._index.boundaries, strict=True):
            if name == shard:
                return range(start, start + len(bounds) - 1)
            start += len(bounds) - 1
        return range(0)

    def _member_name(self, shard: str, start: int, end: int) -> str:
        """Return the name of the first member in a range of bytes."""
        if shard not in self._files:
            self._files[shard] = os.open(self._index.folder / shard, os.O_RDONLY)
        header = os.pread(self._files[shard], tarfile.BLOCKSIZE, start)
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        if member.isreg():
            return member.name
        content = os.pread(self._files[shard], end - start, start)  # a long name comes before the member
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            named = tar.next()
        if named is None:
            raise tarfile.ReadError("no member")
        return named.name

    def __del__(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
