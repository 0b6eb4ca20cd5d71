"""Which record is next: a pure function of (index sizes, weights, seed, position).

The order of samples does not depend on the number of ranks or workers, and the position is one integer, so a
run resumes anywhere at once. Epoch e of a source is the permutation drawn from (seed, e). Several sources
follow each other (a curriculum), or are mixed by weight, each with epochs of its own.

A mixture is laid out in blocks of `BLOCK` positions. How often a source is used before a block has a closed
form, so that no position needs those before it; within the block, chance decides, drawn from (seed, block).
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

BLOCK = 64  # positions over which a mixture keeps its shares


class Place(NamedTuple):
    """Where a position of the run falls: sample `sample` of source `source`, in its epoch `epoch`."""

    source: int
    epoch: int
    sample: int


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """The endless sequence of samples of a run.

    >>> order = SampleOrder(source_sizes=[3, 2], source_ends=[4, None], seed=0)
    >>> [(place.source, place.epoch) for place in map(order, range(7))]
    [(0, 0), (0, 0), (0, 0), (0, 1), (1, 0), (1, 0), (1, 1)]

    A mixture, three samples of the first source for each one of the second: of 64 positions 48 and 16 are
    theirs, which makes 12 epochs of four samples and 8 of two.

    >>> mixture = SampleOrder(source_sizes=[4, 2], source_ends=[None, None], seed=0, weights=[3.0, 1.0])
    >>> [place.source for place in map(mixture, range(12))]
    [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    >>> places = list(map(mixture, range(64)))
    >>> [(places.count((0, epoch, 3)), places.count((1, epoch, 0))) for epoch in (0, 7, 8, 11, 12)]
    [(1, 1), (1, 1), (1, 0), (1, 0), (0, 0)]
    """

    source_sizes: list[int]  # samples of each source
    source_ends: list[int | None]  # position at which the next source takes over; None: never
    seed: int
    weights: list[float] | None = None  # of a mixture: share of each source, above 0, of any sum

    def __call__(self, position: int) -> Place:
        """Return what stands at a position of the run."""
        source, use = self._use(position)
        size = self.source_sizes[source]
        epoch, offset = divmod(use, size)
        return Place(source, epoch, int(_permutations(size, self.seed + source)(epoch)[offset]))

    def _use(self, position: int) -> tuple[int, int]:
        """Return whose turn it is, and how often it had one before."""
        if self.weights is not None:
            block, offset = divmod(position, BLOCK)
            return _turns(tuple(self.weights), self.seed, block)[offset]
        start = 0
        for source, end in enumerate(self.source_ends):
            if end is None or position < end:
                return source, position - start
            start = end
        raise IndexError(f"position {position} lies behind the last source")


def uses_before(position: int, weights: list[Fraction]) -> list[int]:
    """Return how often each source of a mixture is used before a position that begins a block.

    The first source has its share of all positions, rounded down; the next its share of those left, and so
    on. No count ever falls, as it could if each were rounded by itself, and none is off its exact share by
    as many as there are sources, however long the run.

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
    # 1: not the permutation of an epoch
    drawn = np.random.default_rng([seed, block, 1]).permutation(np.repeat(np.arange(len(quotas)), quotas))
    turns = []
    for source in drawn.tolist():
        turns.append((source, before[source]))
        before[source] += 1
    return turns


@lru_cache(maxsize=256)
def _permutations(size: int, seed: int) -> Callable[[int], np.ndarray]:
    """Return the permutations of a source by epoch; two are kept, for batches that reach into the next."""
    return lru_cache(maxsize=2)(partial(_permutation, size, seed))


def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
