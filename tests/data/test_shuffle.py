import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vico_pl.data.shuffle import Shuffle, shuffle_keys, shuffled


def permutation(size, *entropy):
    return [shuffled(index, size, shuffle_keys(*entropy)) for index in range(size)]


@given(size=st.integers(1, 400), seed=st.integers(0, 2**64))
def test_every_number_stands_at_one_place(size, seed):
    assert sorted(permutation(size, seed)) == list(range(size))


@pytest.mark.parametrize("index", [-1, 5])
def test_places_outside_are_refused(index):
    with pytest.raises(IndexError, match=f"index {index} of a shuffle of 5"):
        shuffled(index, 5, shuffle_keys(0))


def test_a_place_in_a_huge_set_is_found_at_once_and_stays_as_it_is():
    assert shuffled(0, 10**15, shuffle_keys(0)) == HUGE


HUGE = 787564976560239


def test_all_orders_of_few_come_about_as_often():
    counts = Counter(tuple(permutation(4, seed)) for seed in range(4800))
    assert len(counts) == math.factorial(4)
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 60  # 99.99 % of chance: below 55


def test_neighbours_are_torn_apart_and_numbers_go_anywhere():
    size, bins = 20_000, 10
    order = permutation(size, 1)
    assert sum(abs(one - other) == 1 for one, other in pairwise(order)) < 12  # of chance: 2
    table = Counter((place * bins // size, number * bins // size) for place, number in enumerate(order))
    expected = size / bins**2
    assert sum((table[i, j] - expected) ** 2 / expected for i in range(bins) for j in range(bins)) < 150
    steps = Counter(((other - one) % size) * bins // size for one, other in pairwise(order))
    assert max(steps.values()) - min(steps.values()) < 350  # of chance: 130 or so


def test_keys_that_differ_in_one_number_give_unlike_orders():
    first, *others = [permutation(1000, *entropy) for entropy in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for other in others:
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 10  # of chance: 1


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    window=st.integers(1, 13),
    seed=st.integers(0, 2**32),
)
def test_a_window_holds_all_samples_of_its_shards_before_the_next_begins(sizes, window, seed):
    shuffle = Shuffle(shard_sizes=tuple(sizes), window=window, keys=shuffle_keys(seed))
    owner = [shard for shard, size in enumerate(sizes) for _ in range(size)]
    offset, shards_seen = 0, []
    for number in range(-(-len(sizes) // window)):
        shards = shuffle.shards_of(number)
        count = sum(sizes[shard] for shard in shards)
        read = [shuffle(place) for place in range(offset, offset + count)]
        assert sorted(owner[sample] for sample in read) == sorted(s for s in shards for _ in range(sizes[s]))
        offset, shards_seen = offset + count, [*shards_seen, *shards]
    assert sorted(shards_seen) == list(range(len(sizes)))
    assert shuffle.shards_of(-(-len(sizes) // window)) == ()
