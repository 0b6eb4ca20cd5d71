"""Shuffles as functions: any element of a permutation is computed directly, without the rest.

A stored permutation of a hundred million samples would take 800 MB per process and seconds at each resume.
A cipher on the numbers below `size` (a Feistel network) needs neither.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from math import isqrt

import numpy as np

ROUNDS = 8
_MASK = 2**64 - 1


@lru_cache(maxsize=256)
def shuffle_keys(*entropy: int) -> tuple[int, ...]:
    """Derive the keys of a shuffle from integers.

    >>> shuffle_keys(0, 1) == shuffle_keys(0, 1), shuffle_keys(0, 1) == shuffle_keys(1, 0)
    (True, False)
    """
    return tuple(map(int, np.random.SeedSequence(entropy).generate_state(ROUNDS, np.uint64)))


def shuffled(index: int, size: int, keys: Sequence[int]) -> int:
    """Return element `index` of a permutation of the numbers below `size`.

    >>> keys = shuffle_keys(7)
    >>> sorted(shuffled(index, 5, keys) for index in range(5))
    [0, 1, 2, 3, 4]
    """
    if not 0 <= index < size:
        raise IndexError(f"index {index} of a shuffle of {size}")
    rows = isqrt(size - 1) + 1  # the smallest grid, nearly square, that holds all numbers
    columns = -(-size // rows)
    value = _encipher(index, rows, columns, keys)
    while value >= size:  # one of the few numbers beyond the size: repeat
        value = _encipher(value, rows, columns, keys)
    return value


@dataclass(frozen=True, kw_only=True)
class Shuffle:
    """The order of an epoch: shards in random order, `window` at a time, the samples of a window permuted.

    Without a window the whole epoch is permuted. With a window only its shards must be available at a time,
    for shards that are fetched whole.

    >>> shuffle = Shuffle(shard_sizes=(2, 2, 2), window=2, keys=shuffle_keys(0))
    >>> [shuffle(offset) for offset in range(6)]
    [1, 0, 4, 5, 2, 3]
    >>> shuffle.shards_of(0), shuffle.shards_after(0), shuffle.shards_after(5)
    ((0, 2), (1,), ())
    """

    shard_sizes: tuple[int, ...]  # samples
    window: int | None = None
    keys: tuple[int, ...]

    def __call__(self, offset: int) -> int:
        """Return the sample at an offset in the epoch."""
        number = self._window_of(offset)
        start, end = self._starts[number], self._starts[number + 1]
        place = start + shuffled(offset - start, end - start, shuffle_keys(*self.keys, number))
        turn = bisect_right(self._offsets, place) - 1
        return self._firsts[self._order[turn]] + place - self._offsets[turn]

    def shards_of(self, number: int) -> tuple[int, ...]:
        """Return the shards of a window; none after the last."""
        return self._order[number * self._span : (number + 1) * self._span]

    def shards_after(self, offset: int) -> tuple[int, ...]:
        """Return the shards of the next window; none in the last."""
        return self.shards_of(self._window_of(offset) + 1)

    def _window_of(self, offset: int) -> int:
        return bisect_right(self._starts, offset) - 1

    @property
    def _span(self) -> int:
        return self.window or len(self.shard_sizes)

    @cached_property
    def _order(self) -> tuple[int, ...]:
        """All shards in shuffled order."""
        count = len(self.shard_sizes)
        return tuple(shuffled(index, count, self.keys) for index in range(count))

    @cached_property
    def _offsets(self) -> list[int]:
        """Samples before each shard in that order, and the total."""
        return list(accumulate((self.shard_sizes[shard] for shard in self._order), initial=0))

    @cached_property
    def _starts(self) -> list[int]:
        """Samples before each window, and the total."""
        return [*self._offsets[: -1 : self._span], self._offsets[-1]]

    @cached_property
    def _firsts(self) -> list[int]:
        """Number of each shard's first sample in the source."""
        return list(accumulate(self.shard_sizes, initial=0))


def _encipher(value: int, rows: int, columns: int, keys: Sequence[int]) -> int:
    """Permute the numbers below rows x columns: shift row and column in turn by a hash of the other."""
    row, column = divmod(value, columns)
    for turn, key in enumerate(keys):
        if turn % 2:
            row = (row + _hash(column ^ key)) % rows
        else:
            column = (column + _hash(row ^ key)) % columns
    return row * columns + column


def _hash(value: int) -> int:
    """Mix 64 bits (the finaliser of splitmix64)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
