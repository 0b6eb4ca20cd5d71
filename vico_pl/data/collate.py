"""Samples -> batches: assigned to ranks and micro-batches by cost, within memory limits; laid end to end.

Samples are laid end to end in a micro-batch, so nothing is padded. Their costs differ tenfold, and a step
takes as long as its slowest rank. So samples are assigned to ranks by estimated cost, which every rank
computes alike from the index; each rank then splits its decoded samples into micro-batches of similar cost.
"""

import heapq
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vico_pl.errors import check_settings
from vico_pl.types import Batch, EncodedSample

# Cost of a sample in any unit, from its position in the run, the tiles of each image and its text tokens.
SampleCost = Callable[[int, Sequence[int], int], float]


class SampleLoad(NamedTuple):
    """What a sample adds to its micro-batch."""

    cost: float
    tiles: int  # thumbnails counted
    tokens: int  # at full vision tokens


@dataclass(frozen=True, kw_only=True)
class MicroBatchLimits:
    """Limits of a micro-batch. A sample that exceeds one gets its own micro-batch."""

    max_tiles: int = 48  # thumbnails counted
    max_tokens: int = 16384  # at full vision tokens

    def __post_init__(self) -> None:
        rules = {name: (value >= 1, "1 or more") for name, value in vars(self).items()}
        check_settings("data.micro_batch", self, **rules)


def assign_to_ranks(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Greedy assignment: most expensive sample first, to the least-loaded rank; indices in rising order.

    >>> assign_to_ranks([9.0, 1.0, 5.0, 4.0], 2)
    [[0, 1], [2, 3]]
    """
    assigned: list[list[int]] = [[] for _ in range(num_ranks)]
    # The number of samples breaks ties between those that seem to cost nothing.
    loads = [(0.0, 0, rank) for rank in range(num_ranks)]
    for sample in _most_expensive_first(costs):
        load, count, rank = loads[0]
        assigned[rank].append(sample)
        heapq.heapreplace(loads, (load + costs[sample], count + 1, rank))
    return [sorted(samples) for samples in assigned]


def split_into_micro_batches(
    loads: Sequence[SampleLoad], limits: MicroBatchLimits, *, at_least: int = 1
) -> list[list[int]]:
    """Split samples into as few micro-batches as the limits allow, of similar cost, most expensive first.

    Ranks with sharded weights wait for each other in every micro-batch, so the most expensive ones of all
    ranks run together. A rank that needs fewer than `at_least` still makes that many if it has
    enough samples.

    >>> loads = [SampleLoad(cost=float(n), tiles=n, tokens=1) for n in (9, 1, 5, 4)]
    >>> split_into_micro_batches(loads, MicroBatchLimits(max_tiles=10))
    [[0, 1], [2, 3]]
    """
    number = max(
        math.ceil(sum(load.tiles for load in loads) / limits.max_tiles),
        math.ceil(sum(load.tokens for load in loads) / limits.max_tokens),
        min(at_least, len(loads)),
        1,
    )
    while (micro_batches := _fill(number, loads, limits)) is None:
        number += 1
    used = [sorted(samples) for samples in micro_batches if samples]
    return sorted(used, key=lambda samples: -sum(loads[sample].cost for sample in samples))


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


def _most_expensive_first(costs: Sequence[float]) -> list[int]:
    return sorted(range(len(costs)), key=lambda sample: (-costs[sample], sample))


def _fill(number: int, loads: Sequence[SampleLoad], limits: MicroBatchLimits) -> list[list[int]] | None:
    """Put each sample, most expensive first, into the cheapest micro-batch with room; None: no room."""
    micro_batches: list[list[int]] = [[] for _ in range(number)]
    totals = [SampleLoad(0.0, 0, 0)] * number
    for sample in _most_expensive_first([load.cost for load in loads]):
        sums = [SampleLoad(*map(operator.add, total, loads[sample])) for total in totals]
        fits = [sum_.tiles <= limits.max_tiles and sum_.tokens <= limits.max_tokens for sum_ in sums]
        with_room = [i for i in range(number) if fits[i] or not micro_batches[i]]
        if not with_room:
            return None
        cheapest = min(with_room, key=lambda i: totals[i].cost)
        micro_batches[cheapest].append(sample)
        totals[cheapest] = sums[cheapest]
    return micro_batches
