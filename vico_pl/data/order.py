"""Which record is next: a pure function of (shard sizes, weights, seed, position).

The order does not depend on the number of ranks or workers, and a position is one integer, so a run resumes
anywhere at once. Epoch e of a source is a shuffle seeded by (seed, source, e). Several sources follow each
other (a curriculum) or are mixed by weight; each has its own epochs.

A mixture consists of blocks of `BLOCK` positions. The number of uses of a source before a block has a closed
form, so no position depends on earlier ones; a block's sources are shuffled, seeded by (seed, block).

A stored permutation of a hundred million samples would take 800 MB per process and seconds at each resume,
so any element of a shuffle is computed alone, by a cipher on the numbers below its size (a Feistel network).
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
from math import isqrt
from typing import Any, NamedTuple

import numpy as np

BLOCK = 64  # positions over which a mixture keeps its proportions
ROUNDS = 8  # of the cipher
_MASK = 2**64 - 1


class Place(NamedTuple):
    """The sample at a position of the run: number `sample` of source `source`, in its epoch `epoch`."""

    source: int
    epoch: int
    sample: int


@dataclass(frozen=True, kw_only=True)
class SourceShape:
    """What the order depends on, for one source."""

    shard_sizes: Sequence[int]  # samples of each shard
    window: int | None = None  # shards that are shuffled together; None: all

    @cached_property
    def starts(self) -> list[int]:
        """Samples before each shard, and those of an epoch."""
        return list(accumulate(self.shard_sizes, initial=0))


@dataclass(frozen=True, kw_only=True)
class EvenOrder:
    """The first `count` positions of a fixed choice of samples, spread evenly over a set of `size`.

    >>> [place.sample for place in map(EvenOrder(size=10, count=4), range(4))]
    [0, 2, 5, 7]
    """

    size: int
    count: int

    def __call__(self, position: int) -> Place:
        """Return the sample at a position below `count`."""
        return Place(0, 0, position * self.size // self.count)

    def shards_after(self, position: int) -> tuple[int, ...]:
        """Return no shards: those of a choice are fetched when they are read."""
        return ()


class Epoch:
    """The order of an epoch: shards in random order, `window` at a time, the samples of a window permuted.

    With a window only its shards must be available at a time, for shards that are fetched whole.

    >>> epoch = Epoch(SourceShape(shard_sizes=(2, 2, 2), window=2), shuffle_keys(0))
    >>> [epoch(offset) for offset in range(6)]
    [1, 0, 4, 5, 2, 3]
    >>> epoch.shards_of(0), epoch.shards_after(0), epoch.shards_after(5)
    ((0, 2), (1,), ())
    """

    def __init__(self, source: SourceShape, keys: tuple[int, ...]) -> None:
        count = len(source.shard_sizes)
        self._source, self._keys, self._span = source, keys, source.window or count
        self._shards = tuple(all_shuffled(count, keys))
        sizes = (source.shard_sizes[shard] for shard in self._shards)
        self._offsets = list(accumulate(sizes, initial=0))  # samples before each of them, and all
        self._windows = [*self._offsets[: -1 : self._span], self._offsets[-1]]  # before each window, and all

    def __call__(self, offset: int) -> int:
        """Return the sample at an offset in the epoch."""
        number = self._window_of(offset)
        start, end = self._windows[number], self._windows[number + 1]
        place = start + shuffled(offset - start, end - start, shuffle_keys(*self._keys, number))
        turn = bisect_right(self._offsets, place) - 1
        return self._source.starts[self._shards[turn]] + place - self._offsets[turn]

    def shards_of(self, number: int) -> tuple[int, ...]:
        """Return the shards of a window; none after the last."""
        return self._shards[number * self._span : (number + 1) * self._span]

    def shards_after(self, offset: int) -> tuple[int, ...]:
        """Return the shards of the next window; none in the last."""
        return self.shards_of(self._window_of(offset) + 1)

    def _window_of(self, offset: int) -> int:
        return bisect_right(self._windows, offset) - 1


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """The endless sequence of samples of a run.

    >>> three, two = SourceShape(shard_sizes=(3,)), SourceShape(shard_sizes=(2,))
    >>> order = SampleOrder(sources=[three, two], source_ends=[4, None], seed=0)
    >>> [(place.source, place.epoch) for place in map(order, range(7))]
    [(0, 0), (0, 0), (0, 0), (0, 1), (1, 0), (1, 0), (1, 1)]
    >>> mixture = SampleOrder(sources=[three, two], source_ends=[None, None], seed=0, weights=[3.0, 1.0])
    >>> [place.source for place in map(mixture, range(12))]
    [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    """

    sources: Sequence[SourceShape]
    source_ends: Sequence[int | None]  # position at which the next source starts; None: never
    seed: int
    weights: Sequence[float] | None = None  # of a mixture: weight of each source, above 0; any sum
    _epochs: dict[tuple[int, int], Epoch] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, position: int) -> Place:
        """Return the sample at a position of the run."""
        source, epoch, offset = self._locate(position)
        return Place(source, epoch, self._epoch(source, epoch)(offset))

    def shards_after(self, position: int) -> tuple[int, ...]:
        """Return the shards of the window after that of a position, of the same source."""
        source, epoch, offset = self._locate(position)
        return self._epoch(source, epoch).shards_after(offset) or self._epoch(source, epoch + 1).shards_of(0)

    def _locate(self, position: int) -> tuple[int, int, int]:
        """Return source, epoch and offset in the epoch."""
        source, use = self._use(position)
        return source, *divmod(use, self.sources[source].starts[-1])

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

    def _epoch(self, source: int, epoch: int) -> Epoch:
        """Return the order of an epoch; two per source are kept, as a step may span two epochs."""
        if (source, epoch) not in self._epochs:
            for kept in [key for key in self._epochs if key[0] == source][:-1]:
                del self._epochs[kept]
            keys = shuffle_keys(self.seed, source, epoch)
            self._epochs[source, epoch] = Epoch(self.sources[source], keys)
        return self._epochs[source, epoch]


def uses_before(position: int, weights: list[Fraction]) -> list[int]:
    """Return how often each source of a mixture is used before the first position of a block.

    The first source gets its fraction of all positions, rounded down; the next its fraction of the remaining
    ones, and so on. So no count ever decreases, and each is exact but for less than the number of sources.

    >>> [uses_before(n, [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]) for n in (5, 6, 600)]
    [[2, 2, 1], [3, 2, 1], [300, 200, 100]]
    """
    counts, left, rest = [], position, sum(weights, Fraction(0))
    for weight in weights:
        count = left * weight // rest
        counts.append(count)
        left, rest = left - count, rest - weight
    return counts


@lru_cache(maxsize=256)
def shuffle_keys(*entropy: int) -> tuple[int, ...]:
    """Derive the keys of a shuffle from integers."""
    return tuple(map(int, np.random.SeedSequence(entropy).generate_state(ROUNDS, np.uint64)))


def shuffled(index: int, size: int, keys: Sequence[int]) -> int:
    """Return element `index` of a permutation of the numbers below `size`."""
    rows = isqrt(size - 1) + 1  # the smallest grid, nearly square, that holds all numbers
    columns = -(-size // rows)
    value = _encipher(index, rows, columns, keys)
    while value >= size:  # one of the few numbers beyond the size: repeat
        value = _encipher(value, rows, columns, keys)
    return value


def all_shuffled(size: int, keys: Sequence[int]) -> list[int]:
    """Return the permutation whose elements `shuffled` returns."""
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    values: np.ndarray = _encipher(np.arange(size, dtype=np.uint64), rows, columns, keys)
    while (beyond := values >= size).any():
        values[beyond] = _encipher(values[beyond], rows, columns, keys)
    return values.tolist()


@lru_cache(maxsize=8)
def _turns(weights: tuple[float, ...], seed: int, block: int) -> list[tuple[int, int]]:
    """Return (source, uses of it before) for each position of a block."""
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth, not the float next to it
    uses, after = (uses_before(start * BLOCK, exact) for start in (block, block + 1))
    quotas = [end - start for start, end in zip(uses, after, strict=True)]
    # 1: independent of the shuffles of epochs
    drawn = np.random.default_rng([seed, block, 1]).permutation(np.repeat(np.arange(len(quotas)), quotas))
    turns = []
    for source in drawn.tolist():
        turns.append((source, uses[source]))
        uses[source] += 1
    return turns


def _encipher(value: Any, rows: int, columns: int, keys: Sequence[int]) -> Any:
    """Permute the numbers below rows x columns: shift row and column in turn by a hash of the other.

    `value` is a number or an array of uint64, in which a sum with a whole hash would overflow.
    """
    row, column = divmod(value, columns)
    for turn, key in enumerate(keys):
        if turn % 2:
            row = (row + _hash(column ^ key) % rows) % rows
        else:
            column = (column + _hash(row ^ key) % columns) % columns
    return row * columns + column


def _hash(value: Any) -> Any:
    """Mix 64 bits (the finaliser of splitmix64)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
