"""The samples of a set, and its bad records."""

from collections.abc import Iterator
from pathlib import Path

from vico_pl.data.decode import bad_record, decode_record, printable, with_caption
from vico_pl.data.shards.cache import DEFAULT_STREAMING, StreamingConfig
from vico_pl.data.shards.reader import RecordReader, read_index
from vico_pl.data.shards.shard import ShardIndex
from vico_pl.errors import RecordError
from vico_pl.types import BadRecord, Sample


def read_samples(
    source: Path | str, *, streaming: StreamingConfig = DEFAULT_STREAMING, caption_prompt: str | None = None
) -> Iterator[Sample]:
    """Yield the usable samples of a set in order."""
    items = read_all(read_index(source, streaming=streaming), caption_prompt=caption_prompt)
    return (item for item in items if isinstance(item, Sample))


def find_faults(index: ShardIndex, *, caption_prompt: str | None = None) -> Iterator[BadRecord]:
    """Decode every record and yield the bad ones; a shard that cannot be opened is yielded once."""
    dead: set[str] = set()
    for item in read_all(index, caption_prompt=caption_prompt):
        if isinstance(item, BadRecord) and item.reason not in dead:
            yield item
            if item.kind == "shard":
                dead.add(item.reason)


def read_all(index: ShardIndex, *, caption_prompt: str | None = None) -> Iterator[Sample | BadRecord]:
    """Yield every record of a set in order, decoded or as a bad record."""
    reader = RecordReader(index)
    for position in range(index.num_samples):
        name = f"{index.names[index.place(position)[0]]}, sample {position} of the set"
        try:
            record = reader(position)
            name = printable(record.id)
            yield decode_record(with_caption(record, caption_prompt))
        except RecordError as error:
            yield bad_record(name, error)
