"""The names of a set's samples, without reading the samples."""

import io
import os
import tarfile

from vico_pl.data.shards.reader import ShardIndex
from vico_pl.data.shards.tars import member_key

# What tarfile and the system raise on damaged headers and disks, and `RecordError`, which is a ValueError.
_UNREADABLE = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError, OSError)


class SampleNames:
    """Names the samples of a set `shard/key`, as batches do, from one tar header each.

    Shards that are streamed are fetched for that.
    """

    def __init__(self, index: ShardIndex) -> None:
        """Open nothing yet."""
        self._index = index
        self._numbers = {name: number for number, name in enumerate(index.names)}
        self._held: dict[int, set[str | None]] = {}  # of each shard

    def __call__(self, sample: int) -> str | None:
        """Return the name of a sample; None: its header is unreadable."""
        number, place = self._index.place(sample)
        try:
            key = member_key(self._member_name(number, place))
        except _UNREADABLE:
            return None
        return None if key is None else f"{self._index.names[number]}/{key}"

    def holds(self, name: str) -> bool:
        """Say whether some sample has this name."""
        number = self._numbers.get(name.partition("/")[0])
        if number is None:
            return False
        if number not in self._held:
            first, end = self._index.starts[number : number + 2]
            self._held[number] = {self(sample) for sample in range(first, end)}
        return name in self._held[number]

    def _member_name(self, number: int, place: int) -> str:
        """Return the name of the first member of a sample."""
        shard = self._index.open(number)
        start, end = shard.span(place)
        header = os.pread(shard.descriptor, tarfile.BLOCKSIZE, start)
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        if member.isreg():
            return member.name
        content = os.pread(shard.descriptor, end - start, start)  # a long name comes before the member
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            named = tar.next()
        if named is None:
            raise tarfile.ReadError("no member")
        return named.name
