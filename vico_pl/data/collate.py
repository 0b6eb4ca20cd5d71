"""Samples -> batches: assigned to ranks and micro-batches by cost, within memory limits; laid end to end.

Samples are laid end to end in a micro-batch, so nothing is padded. Their costs differ tenfold, and a step
takes as long as its slowest rank, or with sharded weights as long as the slowest of each micro-batch. So
samples are assigned to the micro-batches of all ranks at once, by estimated cost, which every rank computes
alike from the index. Once read, samples that estimates misjudged move so that memory limits hold.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from vico_pl.errors import check_settings
from vico_pl.types import Batch, EncodedSample

# Cost of a sample in any unit, from its position in the run, the tiles of each image and its text tokens.
SampleCost = Callable[[int, Sequence[int], int], float]
# How much of the limits several ranks plan to use on average: full micro-batches leave no choice to match
# costs, and estimates may be low. At 64 ranks with 8 samples each, the ranks of an 8B model wait 2 % less.
FILLED = 0.95
TINY = 1e-9  # cost of a sample of unknown size; so these are spread evenly, too


class SampleLoad(NamedTuple):
    """What a sample adds to its micro-batch."""

    cost: float
    tiles: int  # thumbnails counted
    tokens: int  # at full vision tokens


Loads = Mapping[int, SampleLoad]  # by position in the run


@dataclass(frozen=True, kw_only=True)
class MicroBatchLimits:
    """Limits of a micro-batch. A sample that exceeds one gets its own micro-batch."""

    max_tiles: int = 48  # thumbnails counted
    max_tokens: int = 16384  # at full vision tokens

    def __post_init__(self) -> None:
        rules = {name: (value >= 1, "1 or more") for name, value in vars(self).items()}
        check_settings("data.micro_batch", self, **rules)


def assign(
    loads: Sequence[SampleLoad], limits: MicroBatchLimits, *, num_ranks: int = 1
) -> list[list[list[int]]]:
    """Assign samples to the micro-batches of ranks: `assign(...)[rank][number]` has indices in rising order.

    All ranks have the same number of micro-batches, as few as the limits allow. With sharded weights, ranks
    wait for each other after every micro-batch. So all micro-batches of all ranks are filled alike, sorted by
    cost, and neighbours run together, the most expensive first. Ranks without enough samples have empty ones.

    >>> loads = [SampleLoad(cost=float(n), tiles=n, tokens=1) for n in (9, 1, 5, 4, 8, 2)]
    >>> assign(loads, MicroBatchLimits(max_tiles=10), num_ranks=2)
    [[[0], [3, 5]], [[4], [1, 2]]]
    """
    room = num_ranks * (1.0 if num_ranks == 1 else FILLED)
    number = max(
        math.ceil(sum(load.tiles for load in loads) / (limits.max_tiles * room)),
        math.ceil(sum(load.tokens for load in loads) / (limits.max_tokens * room)),
        1,
    )
    while (filled := _fill(number * num_ranks, loads, limits)) is None:
        number += 1
    filled += [[] for _ in range(-len(filled) % num_ranks)]
    costs = [sum(loads[sample].cost for sample in samples) for samples in filled]
    by_cost = sorted(range(len(filled)), key=costs.__getitem__, reverse=True)
    assigned: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for start in range(0, len(filled), num_ranks):
        # The rank with the least so far gets the most expensive one, so that sums match too.
        ranks = sorted(range(num_ranks), key=totals.__getitem__)
        for rank, index in zip(ranks, by_cost[start : start + num_ranks], strict=True):
            assigned[rank].append(filled[index])
            totals[rank] += costs[index]
    return assigned


def keep_limits(planned: Sequence[Sequence[int]], loads: Loads, limits: MicroBatchLimits) -> list[list[int]]:
    """Return micro-batches of the positions that were read, by their true loads: those planned come first.

    A position that could not be read leaves its micro-batch lighter. One that does not fit where it was
    planned, as sizes were estimated too low, moves to another with room, or into further ones at the end. So
    do positions that were not planned.

    >>> loads = {position: SampleLoad(cost=1.0, tiles=5, tokens=1) for position in (0, 1, 2, 4, 5)}
    >>> keep_limits([[0, 1, 2], [3, 4, 5]], loads, MicroBatchLimits(max_tiles=10))
    [[0, 1], [4, 5], [2]]
    """
    micro_batches = [_MicroBatch() for _ in planned]
    places = {position: number for number, positions in enumerate(planned) for position in positions}
    moved = []
    for position in _most_expensive_first(loads, loads):
        place = places.get(position)
        if place is None or not micro_batches[place].add_if_room(position, loads[position], limits):
            moved.append(position)
    left = sorted(
        position
        for position in moved
        if not any(each.add_if_room(position, loads[position], limits) for each in micro_batches)
    )
    (further,) = assign([loads[position] for position in left], limits)
    kept = [sorted(micro_batch.samples) for micro_batch in micro_batches]
    return kept + [[left[index] for index in samples] for samples in further]


def collate(samples: Sequence[EncodedSample], *, positions: Sequence[int] | None = None) -> Batch:
    """Lay samples, at least one, end to end; `positions` in the order of a run are by default 0, 1, 2, ..."""
    tiles_per_sample = torch.tensor([len(s.tiles) for s in samples])
    return Batch(
        ids=[s.id for s in samples],
        positions=list(range(len(samples)) if positions is None else positions),
        # Leave out empty tensors: with one of them, torch.cat copies to another memory format.
        tiles=torch.cat([s.tiles for s in samples if len(s.tiles)] or [samples[0].tiles]),
        tiles_per_image=[s.tiles_per_image for s in samples],
        tile_to_sample=torch.arange(len(samples)).repeat_interleave(tiles_per_sample),
        input_ids=torch.cat([s.input_ids for s in samples]),
        response_mask=torch.cat([s.response_mask for s in samples]),
        sample_lengths=torch.tensor([len(s.input_ids) for s in samples]),
        response_lengths=[int(s.response_mask.sum()) for s in samples],
    )


@dataclass(slots=True)
class _MicroBatch:
    """A micro-batch that is being filled."""

    samples: list[int] = field(default_factory=list)
    cost: float = 0.0
    tiles: int = 0
    tokens: int = 0

    def add_if_room(self, sample: int, load: SampleLoad, limits: MicroBatchLimits) -> bool:
        """Add a sample unless it exceeds a limit; an empty micro-batch takes any. Returns whether it was."""
        tiles, tokens = self.tiles + load.tiles, self.tokens + load.tokens
        if self.samples and (tiles > limits.max_tiles or tokens > limits.max_tokens):
            return False
        self.samples.append(sample)
        self.cost, self.tiles, self.tokens = self.cost + max(load.cost, TINY), tiles, tokens
        return True


def _most_expensive_first(samples: Iterable[int], loads: Sequence[SampleLoad] | Loads) -> list[int]:
    return sorted(samples, key=lambda sample: (-loads[sample].cost, sample))


def _fill(number: int, loads: Sequence[SampleLoad], limits: MicroBatchLimits) -> list[list[int]] | None:
    """Put each sample, most expensive first, into the cheapest micro-batch with room; None: no room.

    Returns those with samples.
    """
    micro_batches = [_MicroBatch() for _ in range(number)]
    heap = [(0.0, index) for index in range(number)]
    for sample in _most_expensive_first(range(len(loads)), loads):
        full = []
        while heap and not micro_batches[heap[0][1]].add_if_room(sample, loads[sample], limits):
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        index = heap[0][1]
        heapq.heapreplace(heap, (micro_batches[index].cost, index))
        for entry in full:
            heapq.heappush(heap, entry)
    return [sorted(micro_batch.samples) for micro_batch in micro_batches if micro_batch.samples]
