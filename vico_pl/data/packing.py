"""Assign the samples of a global batch to ranks and micro-batches: by cost, within memory limits.

Samples are laid end to end in a micro-batch, so nothing is padded. Their costs differ tenfold, and a step
takes as long as its slowest rank. So samples are assigned to ranks by estimated cost, which every rank
computes alike from the index; each rank then splits its decoded samples into micro-batches of similar cost.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vico_pl.data.shards.sizes import SampleSize
from vico_pl.data.tiling import TilingConfig, choose_grid

# Cost of a sample in any unit, from its position in the run, the tiles of each image and its text tokens.
SampleCost = Callable[[int, Sequence[int], int], float]


@dataclass(frozen=True, kw_only=True)
class MicroBatchLimits:
    """Limits of a micro-batch. A sample that exceeds one gets its own micro-batch."""

    max_tiles: int = 48  # thumbnails counted
    max_tokens: int = 16384  # at full vision tokens

    def __post_init__(self) -> None:
        """Reject limits below one."""
        if min(self.max_tiles, self.max_tokens) < 1:
            given = f"max_tiles of micro-batches is {self.max_tiles} and max_tokens {self.max_tokens}"
            raise ValueError(f"{given}; expected at least 1 for both")


def estimated_tiles(size: SampleSize, tiling: TilingConfig) -> list[int]:
    """Return how many tiles each image of a sample will have if all are shaped like its first.

    >>> estimated_tiles(SampleSize(text_tokens=25, num_images=2, width=1000, height=500), TilingConfig())
    [3, 3]
    """
    if min(size.num_images, size.width, size.height) < 1:
        return [1] * size.num_images
    tiling = tiling.per_image(size.num_images)
    columns, rows = choose_grid(size.width, size.height, tiling)
    grid = columns * rows
    return [grid + (tiling.use_thumbnail and grid > 1)] * size.num_images


def assign_to_ranks(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Greedy assignment: most expensive sample first, to the least-loaded rank; indices in rising order.

    >>> assign_to_ranks([9.0, 1.0, 5.0, 4.0], 2)
    [[0, 1], [2, 3]]
    """
    assigned: list[list[int]] = [[] for _ in range(num_ranks)]
    # The number of samples breaks ties between those that seem to cost nothing.
    loads = [(0.0, 0, rank) for rank in range(num_ranks)]
    for sample in sorted(range(len(costs)), key=lambda sample: (-costs[sample], sample)):
        load, count, rank = loads[0]
        assigned[rank].append(sample)
        heapq.heapreplace(loads, (load + costs[sample], count + 1, rank))
    return [sorted(rank_positions) for rank_positions in assigned]


def split_into_micro_batches(
    costs: Sequence[float],
    tiles: Sequence[int],
    tokens: Sequence[int],
    limits: MicroBatchLimits,
    *,
    min_micro_batches: int = 1,
) -> list[list[int]]:
    """Split samples into as few micro-batches as the limits allow, of similar cost, most expensive first.

    Ranks with sharded weights wait for each other in every micro-batch, so the most expensive ones of all
    ranks run together. A rank that needs fewer than `min_micro_batches` still makes that many if it has
    enough samples.

    >>> split_into_micro_batches([9.0, 1.0, 5.0, 4.0], [9, 1, 5, 4], [1] * 4, MicroBatchLimits(max_tiles=10))
    [[0, 1], [2, 3]]
    """
    num_micro_batches = max(
        math.ceil(sum(tiles) / limits.max_tiles),
        math.ceil(sum(tokens) / limits.max_tokens),
        min(min_micro_batches, len(costs)),
        1,
    )
    while True:
        micro_batches = _fill(num_micro_batches, costs, tiles, tokens, limits)
        if micro_batches is not None:
            break
        num_micro_batches += 1
    micro_batches = [micro_batch for micro_batch in micro_batches if micro_batch]
    return sorted(micro_batches, key=lambda micro_batch: -sum(costs[sample] for sample in micro_batch))


def _fill(
    num_micro_batches: int,
    costs: Sequence[float],
    tiles: Sequence[int],
    tokens: Sequence[int],
    limits: MicroBatchLimits,
) -> list[list[int]] | None:
    """Put each sample, most expensive first, into the cheapest micro-batch with room; None: no room."""
    micro_batches = [_MicroBatch() for _ in range(num_micro_batches)]
    for sample in sorted(range(len(costs)), key=lambda sample: (-costs[sample], sample)):
        roomy = [
            micro_batch
            for micro_batch in micro_batches
            if micro_batch.has_room(tiles[sample], tokens[sample], limits)
        ]
        if not roomy:
            return None
        min(roomy, key=lambda micro_batch: micro_batch.cost).add(
            sample, costs[sample], tiles[sample], tokens[sample]
        )
    return [sorted(micro_batch.samples) for micro_batch in micro_batches]


class _MicroBatch:
    def __init__(self) -> None:
        self.samples: list[int] = []
        self.cost, self.tiles, self.tokens = 0.0, 0, 0

    def has_room(self, tiles: int, tokens: int, limits: MicroBatchLimits) -> bool:
        fits = self.tiles + tiles <= limits.max_tiles and self.tokens + tokens <= limits.max_tokens
        return fits or not self.samples

    def add(self, sample: int, cost: float, tiles: int, tokens: int) -> None:
        self.samples.append(sample)
        self.cost, self.tiles, self.tokens = self.cost + cost, self.tiles + tiles, self.tokens + tokens
