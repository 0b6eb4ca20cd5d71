"""Who takes which samples of a global batch, and in which packs: by cost, within limits of memory.

Samples lie end to end in a pack, so nothing is padded. But they differ tenfold in cost, and a step takes as
long as its slowest rank: so a step's samples are dealt to ranks by an estimate of their cost, which every
rank makes alike from the index, and each rank cuts its own, now decoded, into packs of like cost.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vico_pl.data.storage.sizes import SampleSize
from vico_pl.data.tiling import TilingConfig, choose_grid

# Cost of a sample, in any unit: of its position in the run, tiles of each image, and text tokens.
SampleCost = Callable[[int, Sequence[int], int], float]


@dataclass(frozen=True, kw_only=True)
class PackLimits:
    """What goes through the model at a time. A sample that exceeds a limit alone has a pack of its own."""

    max_tiles: int = 48  # thumbnails counted
    max_tokens: int = 16384  # at full vision tokens

    def __post_init__(self) -> None:
        """Refuse packs of nothing."""
        if min(self.max_tiles, self.max_tokens) < 1:
            given = f"max_tiles of packs is {self.max_tiles} and max_tokens {self.max_tokens}"
            raise ValueError(f"{given}; expected at least 1 for both")


def estimated_tiles(size: SampleSize, tiling: TilingConfig) -> list[int]:
    """Return how many tiles each image of a sample will have, if all are shaped like its first.

    >>> estimated_tiles(SampleSize(text_tokens=25, num_images=2, width=1000, height=500), TilingConfig())
    [3, 3]
    """
    if min(size.num_images, size.width, size.height) < 1:
        return [1] * size.num_images
    tiling = tiling.per_image(size.num_images)
    columns, rows = choose_grid(size.width, size.height, tiling)
    grid = columns * rows
    return [grid + (tiling.use_thumbnail and grid > 1)] * size.num_images


def deal(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Give each rank its samples, the dearest first to whoever has least; each rank's in rising order.

    >>> deal([9.0, 1.0, 5.0, 4.0], 2)
    [[0, 1], [2, 3]]
    """
    hands: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [
        (0.0, 0, rank) for rank in range(num_ranks)
    ]  # cost, and samples for those that seem to cost nothing
    for sample in sorted(range(len(costs)), key=lambda sample: (-costs[sample], sample)):
        load, count, rank = loads[0]
        hands[rank].append(sample)
        heapq.heapreplace(loads, (load + costs[sample], count + 1, rank))
    return [sorted(hand) for hand in hands]


def split_into_packs(
    costs: Sequence[float],
    tiles: Sequence[int],
    tokens: Sequence[int],
    limits: PackLimits,
    *,
    min_packs: int = 1,
) -> list[list[int]]:
    """Cut samples into as few packs as the limits allow, of like cost; the dearest pack first.

    Ranks with sharded weights wait for each other pack by pack: so the dearest of all ranks meet, and a rank
    that could do with fewer packs than others makes `min_packs`, as far as it has samples.

    >>> split_into_packs([9.0, 1.0, 5.0, 4.0], [9, 1, 5, 4], [1] * 4, PackLimits(max_tiles=10))
    [[0, 1], [2, 3]]
    """
    num_packs = max(
        math.ceil(sum(tiles) / limits.max_tiles),
        math.ceil(sum(tokens) / limits.max_tokens),
        min(min_packs, len(costs)),
        1,
    )
    while True:
        packs = _fill(num_packs, costs, tiles, tokens, limits)
        if packs is not None:
            break
        num_packs += 1
    packs = [pack for pack in packs if pack]
    return sorted(packs, key=lambda pack: -sum(costs[sample] for sample in pack))


def _fill(
    num_packs: int,
    costs: Sequence[float],
    tiles: Sequence[int],
    tokens: Sequence[int],
    limits: PackLimits,
) -> list[list[int]] | None:
    """Put each sample, the dearest first, into the cheapest pack with room; None: one finds no room."""
    packs = [_Pack() for _ in range(num_packs)]
    for sample in sorted(range(len(costs)), key=lambda sample: (-costs[sample], sample)):
        roomy = [pack for pack in packs if pack.has_room(tiles[sample], tokens[sample], limits)]
        if not roomy:
            return None
        min(roomy, key=lambda pack: pack.cost).add(sample, costs[sample], tiles[sample], tokens[sample])
    return [sorted(pack.samples) for pack in packs]


class _Pack:
    def __init__(self) -> None:
        self.samples: list[int] = []
        self.cost, self.tiles, self.tokens = 0.0, 0, 0

    def has_room(self, tiles: int, tokens: int, limits: PackLimits) -> bool:
        fits = self.tiles + tiles <= limits.max_tiles and self.tokens + tokens <= limits.max_tokens
        return fits or not self.samples

    def add(self, sample: int, cost: float, tiles: int, tokens: int) -> None:
        self.samples.append(sample)
        self.cost, self.tiles, self.tokens = self.cost + cost, self.tiles + tiles, self.tokens + tokens
