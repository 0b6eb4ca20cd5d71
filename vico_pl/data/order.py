"""Which record is next: a pure function of (shard sizes, weights, seed, position).

The order does not depend on the number of ranks or workers, and a position is one integer, so a run resumes
anywhere at once. Epoch e of a source is a shuffle seeded by (seed, source, e). Several sources follow each
other (a curriculum) or are mixed by weight; each has its own epochs.

A mixture consists of blocks of `BLOCK` positions. The number of uses of a source before a block has a closed
form, so no position depends on earlier ones; a block's sources are shuffled, seeded by (seed, block).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from vico_pl.data.shuffle import Shuffle, shuffle_keys

BLOCK = 64  # positions over which a mixture keeps its proportions


class Place(NamedTuple):
    """The sample at a position of the run: number `sample` of source `source`, in its epoch `epoch`."""

    source: int
    epoch: int
    sample: int


@dataclass(frozen=True, kw_only=True)
class SourceShape:
    """What the order depends on, for one source."""

    shard_sizes: tuple[int, ...]  # samples of each shard
    window: int | None = None  # shards that are shuffled together; None: all

    @cached_property
    def size(self) -> int:
        """Samples of an epoch."""
        return sum(self.shard_sizes)


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """The endless sequence of samples of a run.

    >>> three, two = SourceShape(shard_sizes=(3,)), SourceShape(shard_sizes=(2,))
    >>> order = SampleOrder(sources=[three, two], source_ends=[4, None], seed=0)
    >>> [(place.source, place.epoch) for place in map(order, range(7))]
    [(0, 0), (0, 0), (0, 0), (0, 1), (1, 0), (1, 0), (1, 1)]

    A mixture of three to one: of 64 positions the first source has 48 and the second 16, which are 16 epochs
    of three samples and 8 epochs of two.

    >>> mixture = SampleOrder(sources=[three, two], source_ends=[None, None], seed=0, weights=[3.0, 1.0])
    >>> [place.source for place in map(mixture, range(12))]
    [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    >>> places = list(map(mixture, range(64)))
    >>> [(places.count((0, epoch, 2)), places.count((1, epoch, 0))) for epoch in (0, 7, 8, 15, 16)]
    [(1, 1), (1, 1), (1, 0), (1, 0), (0, 0)]
    """

    sources: Sequence[SourceShape]
    source_ends: Sequence[int | None]  # position at which the next source starts; None: never
    seed: int
    weights: Sequence[float] | None = None  # of a mixture: weight of each source, above 0; any sum

    def __call__(self, position: int) -> Place:
        """Return the sample at a position of the run."""
        source, epoch, offset = self._locate(position)
        return Place(source, epoch, self._shuffle(source, epoch)(offset))

    def shards_after(self, position: int) -> tuple[int, ...]:
        """Return the shards of the window after that of a position, of the same source."""
        source, epoch, offset = self._locate(position)
        return self._shuffle(source, epoch).shards_after(offset) or self._shuffle(
            source, epoch + 1
        ).shards_of(0)

    def _locate(self, position: int) -> tuple[int, int, int]:
        """Return source, epoch and offset in the epoch."""
        source, use = self._use(position)
        return source, *divmod(use, self.sources[source].size)

    def _use(self, position: int) -> tuple[int, int]:
        """Return the source at a position, and how often it was used before."""
        if self.weights is not None:
            block, offset = divmod(position, BLOCK)
            return _turns(tuple(self.weights), self.seed, block)[offset]
        start = 0
        for source, end in enumerate(self.source_ends):
            if end is None or position < end:
                return source, position - start
            start = end
        raise IndexError(f"position {position} is after the end of the last source")

    def _shuffle(self, source: int, epoch: int) -> Shuffle:
        """Return the shuffle of an epoch; two per source are kept, as a step may span two epochs."""
        if (source, epoch) not in self._shuffles:
            for kept in [key for key in self._shuffles if key[0] == source][:-1]:
                del self._shuffles[kept]
            shape, keys = self.sources[source], shuffle_keys(self.seed, source, epoch)
            made = Shuffle(shard_sizes=shape.shard_sizes, window=shape.window, keys=keys)
            self._shuffles[source, epoch] = made
        return self._shuffles[source, epoch]

    @cached_property
    def _shuffles(self) -> dict[tuple[int, int], Shuffle]:
        return {}


def uses_before(position: int, weights: list[Fraction]) -> list[int]:
    """Return how often each source of a mixture is used before the first position of a block.

    The first source gets its fraction of all positions, rounded down; the next its fraction of the remaining
    ones, and so on. So no count ever decreases, as it could if each were rounded separately, and each differs
    from its exact value by less than the number of sources, however long the run.

    >>> [uses_before(n, [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]) for n in (5, 6, 600)]
    [[2, 2, 1], [3, 2, 1], [300, 200, 100]]
    """
    counts, left, rest = [], position, sum(weights, Fraction(0))
    for weight in weights:
        count = left * weight // rest
        counts.append(count)
        left, rest = left - count, rest - weight
    return counts


@lru_cache(maxsize=8)
def _turns(weights: tuple[float, ...], seed: int, block: int) -> list[tuple[int, int]]:
    """Return (source, uses of it before) for each position of a block."""
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth, not the float next to it
    before, after = (uses_before(start * BLOCK, exact) for start in (block, block + 1))
    quotas = [end - start for start, end in zip(before, after, strict=True)]
    # 1: independent of the shuffles of epochs
    drawn = np.random.default_rng([seed, block, 1]).permutation(np.repeat(np.arange(len(quotas)), quotas))
    turns = []
    for source in drawn.tolist():
        turns.append((source, before[source]))
        before[source] += 1
    return turns
