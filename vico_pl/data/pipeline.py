"""The way from a position in the order to a batch: one list, top to bottom."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import webdataset as wds

from vico_pl.data.chat import ChatEncoder
from vico_pl.data.collate import collate
from vico_pl.data.decode import RecordError, decode_record
from vico_pl.data.order import SampleOrder
from vico_pl.data.shards import RecordReader, ShardIndex
from vico_pl.data.tiling import TilingConfig, tile_sample
from vico_pl.types import BadRecord, Record

Stage = Callable[[Iterable[Any]], Iterator[Any]]


def build_stages(
    sources: list[ShardIndex], *, order: SampleOrder, tiling: TilingConfig, chat: ChatEncoder, batch_size: int
) -> list[Stage]:
    """Return the stages that turn positions of the run into batches of `batch_size` records."""
    return [
        partial(read, order=order, readers=[RecordReader(index) for index in sources]),
        partial(apply, function=decode_record),
        partial(apply, function=partial(tile_sample, config=tiling)),
        partial(apply, function=chat.encode),
        partial(group, size=batch_size),
        partial(apply, function=collate),
    ]


def read(
    positions: Iterable[int], *, order: SampleOrder, readers: list[RecordReader]
) -> Iterator[Record | BadRecord]:
    """Turn positions into raw records."""
    for position in positions:
        place = order(position)
        try:
            yield readers[place.source](place.sample)
        except RecordError as error:
            yield BadRecord(id=f"source {place.source}, sample {place.sample}", reason=str(error))


def apply(source: Iterable[Any], *, function: Callable[[Any], Any]) -> Iterator[Any]:
    """Apply `function` to each item; one that raises `RecordError` becomes a `BadRecord` in its place."""
    for item in source:
        if isinstance(item, BadRecord):
            yield item
            continue
        try:
            yield function(item)
        except RecordError as error:
            yield BadRecord(id=item.id, reason=str(error))


def group(source: Iterable[Any], *, size: int) -> Iterator[list[Any]]:
    """Gather `size` items at a time; a short last group is given too."""
    items: list[Any] = []
    for item in source:
        items.append(item)
        if len(items) == size:
            yield items
            items = []
    if items:
        yield items


def run_stages(positions: Iterable[int], stages: list[Stage]) -> Iterator[Any]:
    """Run positions through the stages."""
    return iter(wds.DataPipeline(partial(iter, positions), *stages))
