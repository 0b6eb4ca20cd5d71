import pytest
from hypothesis import given
from hypothesis import strategies as st

from vico_pl.data.packing import MicroBatchLimits, assign_to_ranks, estimated_tiles, split_into_micro_batches
from vico_pl.data.shards.sizes import SampleSize
from vico_pl.data.tiling import TilingConfig

costs_of = st.lists(st.floats(0, 100), min_size=0, max_size=60)
samples_of = st.lists(st.tuples(st.floats(0.1, 100), st.integers(0, 13), st.integers(1, 4000)), max_size=40)


@given(costs=costs_of, world=st.integers(1, 9))
def test_every_sample_is_dealt_once(costs, world):
    assigned = assign_to_ranks(costs, world)
    assert len(assigned) == world
    assert sorted(sample for rank_positions in assigned for sample in rank_positions) == list(
        range(len(costs))
    )
    assert all(rank_positions == sorted(rank_positions) for rank_positions in assigned)


@given(costs=costs_of.filter(any), world=st.integers(1, 9))
def test_no_rank_has_more_than_its_share_and_one_sample(costs, world):
    loads = [
        sum(costs[sample] for sample in rank_positions) for rank_positions in assign_to_ranks(costs, world)
    ]
    assert max(loads) <= sum(costs) / world + max(costs) * (1 - 1 / world) + 1e-6


@pytest.mark.parametrize("cost", [0.0, 1.0])
def test_equal_samples_are_dealt_evenly(cost):
    assert {len(rank_positions) for rank_positions in assign_to_ranks([cost] * 12, 4)} == {3}


@given(samples=samples_of, max_tiles=st.integers(1, 40), max_tokens=st.integers(1, 9000))
def test_packs_hold_every_sample_once_and_keep_their_limits(samples, max_tiles, max_tokens):
    costs, tiles, tokens = ([sample[part] for sample in samples] for part in range(3))
    micro_batches = split_into_micro_batches(
        costs, tiles, tokens, MicroBatchLimits(max_tiles=max_tiles, max_tokens=max_tokens)
    )
    assert sorted(sample for micro_batch in micro_batches for sample in micro_batch) == list(
        range(len(samples))
    )
    for micro_batch in micro_batches:
        fits = (
            sum(tiles[s] for s in micro_batch) <= max_tiles
            and sum(tokens[s] for s in micro_batch) <= max_tokens
        )
        assert fits or len(micro_batch) == 1
    loads = [sum(costs[sample] for sample in micro_batch) for micro_batch in micro_batches]
    assert loads == sorted(loads, reverse=True)


def test_what_fits_into_one_pack_is_one():
    limits = MicroBatchLimits(max_tiles=6, max_tokens=30)
    assert split_into_micro_batches([1.0, 2.0, 3.0], [1, 2, 3], [10, 10, 10], limits) == [[0, 1, 2]]


def test_more_packs_are_made_where_others_need_them_as_far_as_there_are_samples():
    costs, ones = [1.0] * 4, [1] * 4
    assert [
        len(micro_batch)
        for micro_batch in split_into_micro_batches(
            costs, ones, ones, MicroBatchLimits(), min_micro_batches=2
        )
    ] == [2, 2]
    assert len(split_into_micro_batches(costs, ones, ones, MicroBatchLimits(), min_micro_batches=9)) == 4
    assert split_into_micro_batches([], [], [], MicroBatchLimits(), min_micro_batches=3) == []


def test_packs_are_of_like_cost_rather_than_full_and_left_over():
    micro_batches = split_into_micro_batches([1.0] * 10, [1] * 10, [1] * 10, MicroBatchLimits(max_tiles=9))
    assert sorted(map(len, micro_batches)) == [5, 5]


@pytest.mark.parametrize(
    ("size", "tiling", "expected"),
    [
        (SampleSize(9, 0, 0, 0), TilingConfig(), []),
        (SampleSize(9, 1, 448, 448), TilingConfig(), [1]),
        (SampleSize(9, 1, 1400, 700), TilingConfig(), [9]),
        (SampleSize(9, 1, 1400, 700), TilingConfig(use_thumbnail=False), [8]),
        (SampleSize(9, 3, 1400, 700), TilingConfig(max_tiles=6), [3, 3, 3]),
        (SampleSize(9, 2, 0, 0), TilingConfig(), [1, 1]),  # its header could not be read
    ],
)
def test_tiles_are_estimated_from_the_first_image(size, tiling, expected):
    assert estimated_tiles(size, tiling) == expected


@pytest.mark.parametrize("limit", ["max_tiles", "max_tokens"])
def test_packs_of_nothing_are_refused(limit):
    with pytest.raises(ValueError, match=f"{limit}.* 0.*expected at least 1 for both"):
        MicroBatchLimits(**{limit: 0})
