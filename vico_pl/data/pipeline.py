"""From positions in the order to the rank batch of a step: one list of stages, read from top to bottom.

An item keeps its position all the way, so a bad record is missing from its batch but not from the order.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import webdataset as wds

from vico_pl.data.chat import ChatEncoder
from vico_pl.data.collate import collate
from vico_pl.data.decode import DEFAULT_LIMITS, ImageLimits, bad_record, decode_record
from vico_pl.data.order import SampleOrder
from vico_pl.data.packing import MicroBatchLimits, SampleCost, split_into_micro_batches
from vico_pl.data.shards.reader import RecordReader, ShardIndex
from vico_pl.data.tiling import TilingConfig, tile_sample
from vico_pl.errors import RecordError
from vico_pl.types import BadRecord, EncodedSample, RankBatch, TiledSample

Item = tuple[int, Any]  # position and what it has become so far
Stage = Callable[[Iterable[Any]], Iterator[Any]]


def build_stages(
    sources: Sequence[ShardIndex],
    *,
    order: SampleOrder,
    tiling: TilingConfig,
    chat: ChatEncoder,
    cost: SampleCost,
    image_limits: ImageLimits = DEFAULT_LIMITS,
    micro_batch_limits: MicroBatchLimits = MicroBatchLimits(),  # noqa: B008 - frozen
) -> list[Stage]:
    """Return the stages that turn the positions of a rank into its rank batch."""
    dummy = dummy_sample(tiling, chat)
    return [
        partial(read, order=order, readers=[RecordReader(index) for index in sources]),
        partial(apply, function=partial(decode_record, limits=image_limits)),
        partial(apply, function=partial(tile_sample, config=tiling)),
        partial(apply, function=chat.encode, kind="length"),
        partial(name_sources, order=order, names=[str(index.folder) for index in sources]),
        partial(
            gather_rank_batch,
            limits=micro_batch_limits,
            cost=cost,
            dummy=dummy,
            tokens_per_tile=chat.full_tokens_per_tile,
        ),
    ]


def read(positions: Iterable[int], *, order: SampleOrder, readers: Sequence[RecordReader]) -> Iterator[Item]:
    """Turn positions into raw records, and let each reader prefetch the shards that come next."""
    for position in positions:
        place = order(position)
        reader = readers[place.source]
        reader.expect(order.shards_after(position))
        try:
            yield position, reader(place.sample)
        except RecordError as error:
            yield position, bad_record(f"source {place.source}, sample {place.sample}", error)


def apply(source: Iterable[Item], *, function: Callable[[Any], Any], kind: str = "other") -> Iterator[Item]:
    """Apply `function` to each item; one that raises `RecordError` becomes a `BadRecord` in its place.

    `kind` is used for errors that have none.
    """
    for position, item in source:
        if isinstance(item, BadRecord):
            yield position, item
            continue
        try:
            yield position, function(item)
        except RecordError as error:
            yield position, bad_record(item.id, error, kind=kind)


def name_sources(source: Iterable[Item], *, order: SampleOrder, names: Sequence[str]) -> Iterator[Item]:
    """Set the source of bad records."""
    for position, item in source:
        if isinstance(item, BadRecord):
            item = replace(item, source=names[order(position).source])
        yield position, item


def gather_rank_batch(
    source: Iterable[Item],
    *,
    limits: MicroBatchLimits,
    cost: SampleCost,
    dummy: EncodedSample,
    tokens_per_tile: int,
    min_micro_batches: int = 1,
) -> Iterator[RankBatch]:
    """Gather all items into one rank batch, of at least `min_micro_batches` if there are enough samples.

    Every micro-batch has a tile and every rank batch a micro-batch, if necessary the dummy sample's, so that
    all ranks run the same parts of the model. The dummy has no response and adds nothing to the gradients.
    """
    items = list(source)
    good = [(position, item) for position, item in items if isinstance(item, EncodedSample)]
    tiles = [len(item.tiles) for _, item in good]
    texts = [len(item.input_ids) - count for (_, item), count in zip(good, tiles, strict=True)]
    tokens = [text + count * tokens_per_tile for text, count in zip(texts, tiles, strict=True)]
    costs = [cost(p, item.tiles_per_image, text) for (p, item), text in zip(good, texts, strict=True)]
    micro_batches = []
    for chosen in split_into_micro_batches(costs, tiles, tokens, limits, min_micro_batches=min_micro_batches):
        members = [good[index] for index in chosen]
        if not any(tiles[index] for index in chosen):
            members.append((-1, dummy))
        positions, samples = zip(*members, strict=True)
        micro_batches.append(collate(samples, positions=list(positions)))
    bad = [item for _, item in items if isinstance(item, BadRecord)]
    alone = collate([dummy], positions=[-1])
    yield RankBatch(micro_batches=micro_batches or [alone], bad_records=bad, dummy=alone)


def dummy_sample(tiling: TilingConfig, chat: ChatEncoder) -> EncodedSample:
    """Return a sample of one black tile, without id and response."""
    tile = torch.zeros(1, 3, tiling.tile_size, tiling.tile_size, dtype=torch.uint8)
    return chat.encode_prompt(
        TiledSample(id="", tiles=tile, tiles_per_image=[1], turns=[], metadata={}), "<image>"
    )


def run_stages(positions: Iterable[int], stages: Sequence[Stage], **last: Any) -> Iterator[Any]:
    """Run positions through the stages; `last` are keyword arguments of the last one."""
    return iter(wds.DataPipeline(partial(iter, positions), *stages[:-1], partial(stages[-1], **last)))
