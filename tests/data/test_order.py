from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vico_pl.data.order import SampleOrder


def order(sizes=(7,), ends=(None,), *, seed=0):
    return SampleOrder(source_sizes=list(sizes), source_ends=list(ends), seed=seed)


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
    assert samples(order([6], seed=3), 0, 12) == [2, 5, 4, 1, 3, 0, 1, 2, 0, 4, 5, 3]


def test_there_is_nothing_behind_a_last_source_with_an_end():
    with pytest.raises(IndexError, match="position 4 lies behind the last source"):
        order([3], [4])(4)
