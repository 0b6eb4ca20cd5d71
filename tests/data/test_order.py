from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vico_pl.data.order import BLOCK, SampleOrder, SourceShape, uses_before


def order(sizes=(7,), ends=(None,), *, seed=0):
    return SampleOrder(sources=shapes(sizes), source_ends=list(ends), seed=seed)


def shapes(sizes):
    """Sources of one shard each."""
    return [SourceShape(shard_sizes=(size,)) for size in sizes]


def samples(sequence, start, stop):
    return [sequence(position).sample for position in range(start, stop)]


@given(size=st.integers(1, 50), seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
def test_every_epoch_holds_every_sample_once(size, seed, epoch):
    sequence = order([size], seed=seed)
    places = [sequence(position) for position in range(epoch * size, (epoch + 1) * size)]
    assert sorted(place.sample for place in places) == list(range(size))
    assert {place.epoch for place in places} == {epoch}


def test_a_position_gives_the_same_sample_whatever_was_asked_before():
    forward = samples(order([40]), 0, 120)
    assert [order([40])(position).sample for position in range(119, -1, -1)] == forward[::-1]


def test_epochs_and_seeds_have_orders_of_their_own():
    sequence = order([30])
    first, second = samples(sequence, 0, 30), samples(sequence, 30, 60)
    assert (
        len({tuple(first), tuple(second), tuple(samples(order([30], seed=1), 0, 30)), tuple(range(30))}) == 4
    )


def test_sources_follow_each_other_at_their_positions():
    sequence = order([5, 3, 4], [4, 11, None])
    places = [sequence(position) for position in range(19)]
    assert [place.source for place in places] == [0] * 4 + [1] * 7 + [2] * 8
    assert [place.epoch for place in places] == [0] * 4 + [0, 0, 0, 1, 1, 1, 2] + [0] * 4 + [1] * 4
    assert len({place.sample for place in places[:4]}) == 4
    assert Counter(place.sample for place in places[4:11]).most_common()[-1][1] == 2
    assert sorted(place.sample for place in places[11:15]) == [0, 1, 2, 3]


def test_sources_of_one_size_do_not_share_an_order():
    sequence = order([30, 30], [30, None])
    assert samples(sequence, 0, 30) != samples(sequence, 30, 60)


def test_an_order_of_known_numbers_stays_as_it_is():
    # A change here changes what every resumed run reads next.
    assert samples(order([6], seed=3), 0, 12) == [0, 5, 1, 2, 4, 3, 3, 0, 2, 5, 4, 1]


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(any),
    window=st.one_of(st.none(), st.integers(1, 9)),
    seed=st.integers(0, 2**32),
)
def test_shards_and_windows_of_any_size_hold_every_sample_once(sizes, window, seed):
    shape = SourceShape(shard_sizes=tuple(sizes), window=window)
    sequence = SampleOrder(sources=[shape], source_ends=[None], seed=seed)
    for epoch in (0, 3):
        places = [sequence(position) for position in range(epoch * shape.size, (epoch + 1) * shape.size)]
        assert sorted(place.sample for place in places) == list(range(shape.size))


def test_the_shards_that_come_next_are_those_that_are_read_next_also_over_the_end_of_an_epoch():
    shape = SourceShape(shard_sizes=(4,) * 6, window=2)
    sequence = SampleOrder(sources=[shape], source_ends=[None], seed=5)
    for window in range(7):  # of eight samples, three to an epoch
        read = {sequence(position).sample // 4 for position in range(8 * window + 8, 8 * window + 16)}
        for position in range(8 * window, 8 * window + 8):
            assert set(sequence.shards_after(position)) == read


def test_a_few_shuffles_are_kept_and_no_more():
    sequence = order([3, 2], [None, None])
    for position in range(50):
        sequence(position)
    assert len(sequence._shuffles) <= 4


def test_there_is_nothing_behind_a_last_source_with_an_end():
    with pytest.raises(IndexError, match="position 4 is after the end of the last source"):
        order([3], [4])(4)


def test_a_curriculum_of_known_numbers_stays_as_it_is():
    sequence = order([5, 3, 4], [4, 11, None], seed=7)
    assert [tuple(sequence(position)) for position in (0, 3, 4, 10, 11, 15, 100, 10_000)] == [
        (0, 0, 0),
        (0, 0, 2),
        (1, 0, 2),
        (1, 2, 2),
        (2, 0, 0),
        (2, 1, 2),
        (2, 22, 3),
        (2, 2497, 2),
    ]


weights = st.one_of(st.floats(1e-3, 1e3), st.integers(1, 100).map(float))
mixtures = st.lists(st.tuples(st.integers(1, 40), weights), min_size=1, max_size=5)


def mixture(sources, *, seed=0):
    sizes, shares = zip(*sources, strict=True)
    ends = [None] * len(sizes)
    return SampleOrder(
        sources=shapes(sizes), source_ends=ends, seed=seed, weights=[float(share) for share in shares]
    )


@given(sources=mixtures, seed=st.integers(0, 2**32), length=st.integers(1, 500))
def test_every_epoch_of_a_mixed_source_holds_every_sample_once(sources, seed, length):
    sequence = mixture(sources, seed=seed)
    used = {source: [] for source in range(len(sources))}
    for position in range(length):
        place = sequence(position)
        used[place.source].append((place.epoch, place.sample))
    for (size, _), places in zip(sources, used.values(), strict=True):
        assert [epoch for epoch, _ in places] == [use // size for use in range(len(places))]
        assert len(set(places)) == len(places), "no sample twice in an epoch"
        assert all(0 <= sample < size for _, sample in places)


@given(sources=mixtures, seed=st.integers(0, 2**32), block=st.integers(0, 10**9))
def test_a_mixture_goes_on_over_the_blocks_wherever_one_begins_to_read(sources, seed, block):
    sequence, end = mixture(sources, seed=seed), (block + 1) * BLOCK
    exact = [Fraction(str(weight)) for _, weight in sources]
    before, after = uses_before(block * BLOCK, exact), uses_before(end, exact)
    places = [sequence(position) for position in range(end - BLOCK, end)]
    for source, (size, _) in enumerate(sources):
        epochs = [place.epoch for place in places if place.source == source]
        assert epochs == [use // size for use in range(before[source], after[source])]


@given(sources=mixtures, position=st.integers(0, 10**12))
def test_shares_of_a_mixture_stay_exact_however_long_the_run(sources, position):
    exact = [Fraction(str(weight)) for _, weight in sources]
    counts, later = uses_before(position, exact), uses_before(position + 1, exact)
    assert sum(counts) == position
    for weight, count, next_count in zip(exact, counts, later, strict=True):
        assert abs(count - position * weight / sum(exact)) < len(sources)
        assert next_count >= count


@given(sources=mixtures, seed=st.integers(0, 2**32), length=st.integers(1, 400))
def test_the_share_of_any_prefix_is_within_a_block_of_its_weight(sources, seed, length):
    sequence, total = mixture(sources, seed=seed), sum(weight for _, weight in sources)
    counts = Counter(sequence(position).source for position in range(length))
    for source, (_, weight) in enumerate(sources):
        assert abs(counts[source] - length * weight / total) < BLOCK


@given(
    sources=mixtures,
    seed=st.integers(0, 2**32),
    positions=st.lists(st.integers(0, 300), min_size=1, max_size=9),
)
def test_a_position_of_a_mixture_alone_is_that_of_the_sequence(sources, seed, positions):
    unbroken = [mixture(sources, seed=seed)(position) for position in range(max(positions) + 1)]
    assert [mixture(sources, seed=seed)(p) for p in positions] == [unbroken[p] for p in positions]


@given(size=st.integers(1, 50), weight=weights, seed=st.integers(0, 2**32), position=st.integers(0, 10**6))
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


def test_a_mixture_of_known_numbers_stays_as_it_is():
    sequence = mixture([(4, 3), (2, 1)], seed=3)
    assert [tuple(sequence(position)) for position in (0, 1, 2, 3, 63, 64, 10_000)] == [
        (0, 0, 3),
        (0, 0, 2),
        (0, 0, 1),
        (0, 0, 0),
        (0, 11, 1),
        (1, 8, 0),
        (0, 1874, 1),
    ]
