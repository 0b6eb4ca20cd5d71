"""The way from a position in the order to a batch: one list, top to bottom."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import webdataset as wds

from vico_pl.data.chat import ChatEncoder
from vico_pl.data.collate import collate
from vico_pl.data.decode import DEFAULT_LIMITS, ImageLimits, RecordError, bad_record, decode_record
from vico_pl.data.order import SampleOrder
from vico_pl.data.shards import RecordReader, ShardIndex
from vico_pl.data.tiling import TilingConfig, tile_sample
from vico_pl.types import BadRecord, EncodedSample, Record, TiledSample

Stage = Callable[[Iterable[Any]], Iterator[Any]]


def build_stages(
    sources: list[ShardIndex],
    *,
    order: SampleOrder,
    tiling: TilingConfig,
    chat: ChatEncoder,
    batch_size: int,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> list[Stage]:
    """Return the stages that turn positions of the run into batches of `batch_size` records."""
    return [
        partial(read, order=order, readers=[RecordReader(index) for index in sources]),
        partial(apply, function=partial(decode_record, limits=limits)),
        partial(apply, function=partial(tile_sample, config=tiling)),
        partial(apply, function=chat.encode, kind="length"),
        partial(group, size=batch_size),
        partial(apply, function=partial(collate, filler=empty_sample(tiling, chat))),
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
            yield bad_record(f"source {place.source}, sample {place.sample}", error)


def apply(source: Iterable[Any], *, function: Callable[[Any], Any], kind: str = "other") -> Iterator[Any]:
    """Apply `function` to each item; one that raises `RecordError` becomes a `BadRecord` in its place.

    `kind` counts for errors that name none.
    """
    for item in source:
        if isinstance(item, BadRecord):
            yield item
            continue
        try:
            yield function(item)
        except RecordError as error:
            yield bad_record(item.id, error, kind=kind)


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


def empty_sample(tiling: TilingConfig, chat: ChatEncoder) -> EncodedSample:
    """Return a sample without name, images, text and response: its loss and all its gradients are 0."""
    tiles = torch.empty(0, 3, tiling.tile_size, tiling.tile_size, dtype=torch.uint8)
    sample = TiledSample(id="", tiles=tiles, tiles_per_image=[], turns=[], metadata={})
    return chat.encode_prompt(sample, "")


def run_stages(positions: Iterable[int], stages: list[Stage]) -> Iterator[Any]:
    """Run positions through the stages."""
    return iter(wds.DataPipeline(partial(iter, positions), *stages))
