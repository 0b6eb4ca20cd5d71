import random
from dataclasses import replace
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny import PLACEHOLDER_ID, TILE, batch_of, encoded_sample, mixed_samples
from vico_pl.data.collate import MicroBatchLimits, SampleLoad, assign, collate, keep_limits
from vico_pl.types import BadRecord, RankBatch

LOAD = st.builds(SampleLoad, st.floats(0.1, 100), st.integers(0, 13), st.integers(1, 4000))
LOADS = st.lists(LOAD, max_size=40)
LIMITS = st.builds(MicroBatchLimits, max_tiles=st.integers(1, 40), max_tokens=st.integers(1, 9000))


def sizes(micro_batches):
    return [len(samples) for samples in micro_batches]


def total(samples, loads):
    return SampleLoad(*map(sum, zip(*(loads[sample] for sample in samples), strict=True)))


def is_within(samples, loads, limits):
    if len(samples) < 2:
        return True
    _, tiles, tokens = total(samples, loads)
    return tiles <= limits.max_tiles and tokens <= limits.max_tokens


@given(loads=LOADS, limits=LIMITS, num_ranks=st.integers(1, 9))
def test_every_sample_is_assigned_once_within_limits_and_ranks_have_as_many_micro_batches(
    loads, limits, num_ranks
):
    assigned = assign(loads, limits, num_ranks=num_ranks)
    assert len(assigned) == num_ranks
    assert len(set(sizes(assigned))) == 1
    micro_batches = list(chain(*assigned))
    assert sorted(chain(*micro_batches)) == list(range(len(loads)))
    assert all(samples == sorted(samples) for samples in micro_batches)
    assert all(is_within(samples, loads, limits) for samples in micro_batches)


@given(loads=st.lists(LOAD, min_size=1, max_size=60), num_ranks=st.integers(1, 9))
def test_micro_batches_that_run_together_are_neighbours_in_cost(loads, num_ranks):
    assigned = assign(loads, MicroBatchLimits(max_tiles=40), num_ranks=num_ranks)
    costs = [[sum(loads[sample].cost for sample in samples) for samples in rank] for rank in assigned]
    for together, later in pairwise(zip(*costs, strict=True)):
        assert min(together) >= max(later) - 1e-6


def test_ranks_have_similar_sums_and_wait_little_after_each_micro_batch():
    chance = random.Random(0)
    loads = [SampleLoad(300.0 * tiles, tiles, 1) for tiles in chance.choices((1, 3, 5, 7, 10, 13), k=64 * 16)]
    assigned = assign(loads, MicroBatchLimits(), num_ranks=64)
    costs = [[total(samples, loads).cost for samples in rank] for rank in assigned]
    mean = sum(map(sum, costs)) / 64
    assert len(costs[0]) == 3
    assert mean / sum(map(max, zip(*costs, strict=True))) > 0.98
    assert mean / max(map(sum, costs)) > 0.99


@given(loads=st.lists(LOAD, min_size=1, max_size=60), num_ranks=st.integers(1, 9))
def test_without_limits_no_rank_has_more_than_its_share_and_one_sample(loads, num_ranks):
    assigned = assign(loads, MicroBatchLimits(max_tiles=10**6, max_tokens=10**9), num_ranks=num_ranks)
    costs = [sum(total(samples, loads).cost for samples in rank if samples) for rank in assigned]
    most = max(load.cost for load in loads)
    assert max(costs) <= sum(costs) / num_ranks + most * (1 - 1 / num_ranks) + 1e-6


@pytest.mark.parametrize("cost", [0.0, 1.0])
def test_equal_samples_are_assigned_evenly(cost):
    assigned = assign([SampleLoad(cost, 0, 0)] * 12, MicroBatchLimits(), num_ranks=4)
    assert list(map(sizes, assigned)) == [[3]] * 4


def test_what_fits_into_one_micro_batch_is_one():
    loads = [SampleLoad(float(i), i, 10) for i in (1, 2, 3)]
    assert assign(loads, MicroBatchLimits(max_tiles=6, max_tokens=30)) == [[[0, 1, 2]]]


def test_several_ranks_leave_some_room_in_their_micro_batches_on_average():
    full = [SampleLoad(1.0, 1, 1)] * 32
    limits = MicroBatchLimits(max_tiles=16)
    assert [sizes(rank) for rank in assign(full, limits, num_ranks=2)] == [[8, 8]] * 2


def test_micro_batches_are_of_like_cost_rather_than_full_and_left_over():
    (alone,) = assign([SampleLoad(1.0, 1, 1)] * 10, MicroBatchLimits(max_tiles=9))
    assert sizes(alone) == [5, 5]


@given(
    loads=st.dictionaries(st.integers(0, 30), LOAD),
    limits=LIMITS,
    places=st.lists(st.integers(-1, 3), min_size=31, max_size=31),
)
def test_limits_hold_for_what_was_read_whatever_was_planned(loads, limits, places):
    planned = [[position for position, place in enumerate(places) if place == number] for number in range(4)]
    found = keep_limits(planned, loads, limits)
    assert sorted(chain(*found)) == sorted(loads)
    assert len(found) >= len(planned)
    assert all(is_within(samples, loads, limits) for samples in found)


def test_what_was_estimated_well_stays_where_it_was_planned():
    loads = {position: SampleLoad(float(position), position, 1) for position in range(6)}
    limits, planned = MicroBatchLimits(max_tiles=9), [[3, 5], [], [0, 1, 2, 4]]
    assert keep_limits(planned, loads, limits) == planned
    del loads[5], loads[0]  # bad records shift no other
    assert keep_limits(planned, loads, limits) == [[3], [], [1, 2, 4]]
    loads[4] = SampleLoad(7.0, 7, 1)  # larger than estimated: the least expensive gives way
    assert keep_limits(planned, loads, limits) == [[1, 3], [], [2, 4]]
    assert keep_limits([[3], [1, 2, 4]], loads, MicroBatchLimits(max_tiles=3)) == [[3], [4], [1, 2]]


@given(loads=LOADS, limits=LIMITS)
def test_what_was_not_planned_is_split_as_by_one_rank(loads, limits):
    (expected,) = assign(loads, limits)
    assert keep_limits([], dict(enumerate(loads)), limits) == expected


def test_samples_lie_end_to_end():
    samples = mixed_samples()  # tiles: one image of 3; none; images of 1 and 2; one of 1
    batch = collate(samples)
    assert batch.ids == ["sample-1", "sample-2", "sample-3", "sample-4"]
    assert batch.tile_to_sample.tolist() == [0, 0, 0, 2, 2, 2, 3]
    assert batch.tiles_per_image == [[3], [], [1, 2], [1]]
    assert batch.positions == [0, 1, 2, 3]
    assert batch.response_lengths == [4, 5, 6, 2]
    assert (batch.num_samples, batch.num_tiles, batch.num_response_tokens) == (4, 7, 17)
    lengths = batch.sample_lengths.tolist()
    assert lengths == [len(s.input_ids) for s in samples]
    for place, (sample, ids, mask) in enumerate(
        zip(samples, batch.input_ids.split(lengths), batch.response_mask.split(lengths), strict=True)
    ):
        assert torch.equal(ids, sample.input_ids)
        assert torch.equal(mask, sample.response_mask)
        assert torch.equal(batch.tiles[batch.tile_to_sample == place], sample.tiles)
    assert int((batch.input_ids == PLACEHOLDER_ID).sum()) == batch.num_tiles


def test_a_batch_of_text_alone_has_no_tiles():
    batch = batch_of(encoded_sample(1, images=()), encoded_sample(2, images=()))
    assert batch.tiles.shape == (0, 3, TILE, TILE)
    assert batch.tile_to_sample.dtype == torch.int64


def test_moving_a_rank_batch_moves_every_tensor_and_keeps_the_rest():
    batch, dummy = collate(mixed_samples()), collate([encoded_sample(9)], positions=[-1])
    bad = BadRecord(id="train-000000.tar/7", reason="JSON: broken")
    share = RankBatch(micro_batches=[batch], bad_records=[bad], dummy=dummy)
    moved = share.to("meta")
    for ours, theirs in ((share.micro_batches[0], moved.micro_batches[0]), (share.dummy, moved.dummy)):
        tensors = [value for value in vars(theirs).values() if isinstance(value, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert (theirs.ids, theirs.positions) == (ours.ids, ours.positions)
    assert (moved.ids, moved.bad_records) == (share.ids, [bad])
    assert batch.tiles.device.type == "cpu"


def test_a_dummy_without_a_name_is_no_sample_of_a_rank_batch():
    dummy = replace(collate([encoded_sample(9)], positions=[-1]), ids=[""])
    share = RankBatch(micro_batches=[dummy, collate(mixed_samples())], bad_records=[], dummy=dummy)
    assert share.ids == ["sample-1", "sample-2", "sample-3", "sample-4"]
