"""Which record is next: a pure function of (index size, seed, position).

The order of samples does not depend on the number of ranks or workers, and the position is one integer, so a
run resumes anywhere at once. Epoch e of a source is the permutation drawn from (seed, e); sources follow each
other.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np


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
    """

    source_sizes: list[int]  # samples of each source
    source_ends: list[int | None]  # position at which the next source takes over; the last has none
    seed: int

    def __call__(self, position: int) -> Place:
        """Return what stands at a position of the run."""
        start = 0
        for source, (size, end) in enumerate(zip(self.source_sizes, self.source_ends, strict=True)):
            if end is None or position < end:
                epoch, offset = divmod(position - start, size)
                return Place(source, epoch, int(_permutation(size, self.seed + source, epoch)[offset]))
            start = end
        raise IndexError(f"position {position} lies behind the last source")


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
