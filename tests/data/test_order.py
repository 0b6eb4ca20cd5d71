import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vico_pl.data.order import (
    BLOCK,
    Epoch,
    SampleOrder,
    SourceShape,
    all_shuffled,
    shuffle_keys,
    shuffled,
    uses_before,
)

SEEDS = st.integers(0, 2**32)
WEIGHTS = st.one_of(st.floats(1e-3, 1e3), st.integers(1, 100).map(float))
MIXTURES = st.lists(st.tuples(st.integers(1, 40), WEIGHTS), min_size=1, max_size=5)
SHARD_SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


def permutation(size, *entropy):
    return [shuffled(index, size, shuffle_keys(*entropy)) for index in range(size)]


def order(sizes=(7,), ends=(None,), *, seed=0, weights=None):
    """An order of sources of one shard each."""
    shapes = [SourceShape(shard_sizes=(size,)) for size in sizes]
    return SampleOrder(sources=shapes, source_ends=list(ends), seed=seed, weights=weights)


def mixture(sources, *, seed=0):
    sizes, shares = zip(*sources, strict=True)
    return order(sizes, [None] * len(sizes), seed=seed, weights=[float(share) for share in shares])


def samples(sequence, start, stop):
    return [sequence(position).sample for position in range(start, stop)]


@given(size=st.integers(1, 400), seed=st.integers(0, 2**64))
def test_every_number_stands_at_one_place(size, seed):
    assert sorted(permutation(size, seed)) == list(range(size))
    assert permutation(size, seed) == all_shuffled(size, shuffle_keys(seed))


def test_a_place_in_a_huge_set_is_found_at_once_and_stays_as_it_is():
    assert shuffled(0, 10**15, shuffle_keys(0)) == 787564976560239


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


@given(sizes=SHARD_SIZES, window=st.integers(1, 13), seed=SEEDS)
def test_a_window_holds_all_samples_of_its_shards_before_the_next_begins(sizes, window, seed):
    epoch = Epoch(SourceShape(shard_sizes=sizes, window=window), shuffle_keys(seed))
    owner = [shard for shard, size in enumerate(sizes) for _ in range(size)]
    num_windows = -(-len(sizes) // window)
    offset, shards_seen = 0, []
    for number in range(num_windows):
        shards = epoch.shards_of(number)
        count = sum(sizes[shard] for shard in shards)
        read = [epoch(place) for place in range(offset, offset + count)]
        assert sorted(owner[sample] for sample in read) == sorted(s for s in shards for _ in range(sizes[s]))
        offset, shards_seen = offset + count, [*shards_seen, *shards]
    assert sorted(shards_seen) == list(range(len(sizes)))
    assert epoch.shards_of(num_windows) == ()


@given(
    sizes=SHARD_SIZES, window=st.one_of(st.none(), st.integers(1, 13)), seed=SEEDS, epoch=st.integers(0, 5)
)
def test_every_epoch_holds_every_sample_once(sizes, window, seed, epoch):
    shape, size = SourceShape(shard_sizes=sizes, window=window), sum(sizes)
    sequence = SampleOrder(sources=[shape], source_ends=[None], seed=seed)
    places = [sequence(position) for position in range(epoch * size, (epoch + 1) * size)]
    assert sorted(place.sample for place in places) == list(range(size))
    assert {place.epoch for place in places} == {epoch}


def test_the_shards_that_come_next_are_those_that_are_read_next_also_over_the_end_of_an_epoch():
    shape = SourceShape(shard_sizes=(4,) * 6, window=2)
    sequence = SampleOrder(sources=[shape], source_ends=[None], seed=5)
    for window in range(7):  # of eight samples, three to an epoch
        read = {sequence(position).sample // 4 for position in range(8 * window + 8, 8 * window + 16)}
        for position in range(8 * window, 8 * window + 8):
            assert set(sequence.shards_after(position)) == read


def test_epochs_seeds_and_sources_have_orders_of_their_own():
    two = order([30, 30], [60, None])
    first, second, other_source = (samples(two, start, start + 30) for start in (0, 30, 60))
    other_seed = samples(order([30], seed=1), 0, 30)
    assert len({tuple(found) for found in (first, second, other_source, other_seed, range(30))}) == 5


def test_sources_follow_each_other_at_their_positions():
    sequence = order([5, 3, 4], [4, 11, None])
    places = [sequence(position) for position in range(19)]
    assert [place.source for place in places] == [0] * 4 + [1] * 7 + [2] * 8
    assert [place.epoch for place in places] == [0] * 4 + [0, 0, 0, 1, 1, 1, 2] + [0] * 4 + [1] * 4
    assert len({place.sample for place in places[:4]}) == 4
    assert Counter(place.sample for place in places[4:11]).most_common()[-1][1] == 2
    assert sorted(place.sample for place in places[11:15]) == [0, 1, 2, 3]


def test_a_few_epochs_are_kept_and_no_more():
    sequence = order([3, 2], [None, None], weights=[1.0, 1.0])
    for position in range(50):
        sequence(position)
    assert len(sequence._epochs) == 4


def test_there_is_nothing_behind_a_last_source_with_an_end():
    with pytest.raises(IndexError, match="position 4 is after the end of the last source"):
        order([3], [4])(4)


@given(sources=MIXTURES, seed=SEEDS, length=st.integers(1, 500))
def test_every_epoch_of_a_mixed_source_holds_every_sample_once_and_any_prefix_its_share(
    sources, seed, length
):
    sequence, total = mixture(sources, seed=seed), sum(weight for _, weight in sources)
    used = {source: [] for source in range(len(sources))}
    for position in range(length):
        place = sequence(position)
        used[place.source].append((place.epoch, place.sample))
    for (size, weight), places in zip(sources, used.values(), strict=True):
        assert [epoch for epoch, _ in places] == [use // size for use in range(len(places))]
        assert len(set(places)) == len(places), "no sample twice in an epoch"
        assert all(0 <= sample < size for _, sample in places)
        assert abs(len(places) - length * weight / total) < BLOCK


@given(sources=MIXTURES, seed=SEEDS, block=st.integers(0, 10**9))
def test_a_mixture_goes_on_over_the_blocks_wherever_one_begins_to_read(sources, seed, block):
    sequence, end = mixture(sources, seed=seed), (block + 1) * BLOCK
    exact = [Fraction(str(weight)) for _, weight in sources]
    before, after = uses_before(block * BLOCK, exact), uses_before(end, exact)
    places = [sequence(position) for position in range(end - BLOCK, end)]
    for source, (size, _) in enumerate(sources):
        epochs = [place.epoch for place in places if place.source == source]
        assert epochs == [use // size for use in range(before[source], after[source])]


@given(sources=MIXTURES, position=st.integers(0, 10**12))
def test_shares_of_a_mixture_stay_exact_however_long_the_run(sources, position):
    exact = [Fraction(str(weight)) for _, weight in sources]
    counts, later = uses_before(position, exact), uses_before(position + 1, exact)
    assert sum(counts) == position
    for weight, count, next_count in zip(exact, counts, later, strict=True):
        assert abs(count - position * weight / sum(exact)) < len(sources)
        assert next_count >= count


@given(sources=MIXTURES, seed=SEEDS, positions=st.lists(st.integers(0, 300), min_size=1, max_size=9))
def test_a_position_of_a_mixture_alone_is_that_of_the_sequence(sources, seed, positions):
    unbroken = list(map(mixture(sources, seed=seed), range(max(positions) + 1)))
    assert [mixture(sources, seed=seed)(p) for p in positions] == [unbroken[p] for p in positions]


@given(size=st.integers(1, 50), weight=WEIGHTS, seed=SEEDS, position=st.integers(0, 10**6))
def test_a_mixture_of_one_source_is_that_source(size, weight, seed, position):
    assert mixture([(size, weight)], seed=seed)(position) == order([size], seed=seed)(position)


def test_weights_count_by_what_they_are_to_each_other():
    tenths, whole = mixture([(9, 0.3), (7, 0.7)]), mixture([(9, 3), (7, 7)])
    assert list(map(tenths, range(1000))) == list(map(whole, range(1000)))


def test_blocks_and_seeds_mix_in_orders_of_their_own():
    sources = [(9, 1), (9, 1)]
    blocks = [
        tuple(mixture(sources, seed=seed)(position).source for position in range(start, start + BLOCK))
        for seed, start in ((0, 0), (0, BLOCK), (1, 0))
    ]
    assert len(set(blocks)) == 3
    assert {sum(block) for block in blocks} == {BLOCK // 2}


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        (order([6], seed=3), {0: (0, 0, 0), 1: (0, 0, 5), 4: (0, 0, 4), 6: (0, 1, 3), 11: (0, 1, 1)}),
        (order([5, 3, 4], [4, 11, None], seed=7), {0: (0, 0, 0), 4: (1, 0, 2), 10_000: (2, 2497, 2)}),
        (
            mixture([(4, 3), (2, 1)], seed=3),
            {0: (0, 0, 3), 63: (0, 11, 1), 64: (1, 8, 0), 10_000: (0, 1874, 1)},
        ),
    ],
)
def test_places_of_known_numbers_stay_as_they_are(sequence, expected):
    """A change here changes what every resumed run reads next."""
    assert {position: tuple(sequence(position)) for position in expected} == expected
