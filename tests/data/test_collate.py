from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny import PLACEHOLDER_ID, TILE, batch_of, encoded_sample, mixed_samples
from vico_pl.data.collate import (
    MicroBatchLimits,
    SampleLoad,
    assign_to_ranks,
    collate,
    split_into_micro_batches,
)
from vico_pl.types import BadRecord, RankBatch

COSTS = st.lists(st.floats(0, 100), max_size=60)
LOADS = st.lists(
    st.builds(SampleLoad, st.floats(0.1, 100), st.integers(0, 13), st.integers(1, 4000)), max_size=40
)


def equal_loads(count):
    return [SampleLoad(1.0, 1, 1)] * count


def sizes(micro_batches):
    return [len(samples) for samples in micro_batches]


@given(costs=COSTS, world=st.integers(1, 9))
def test_every_sample_is_assigned_once_and_no_rank_has_more_than_its_share_and_one_sample(costs, world):
    assigned = assign_to_ranks(costs, world)
    assert len(assigned) == world
    assert sorted(chain(*assigned)) == list(range(len(costs)))
    assert all(samples == sorted(samples) for samples in assigned)
    most = max(sum(costs[sample] for sample in samples) for samples in assigned)
    assert most <= sum(costs) / world + max(costs, default=0) * (1 - 1 / world) + 1e-6


@pytest.mark.parametrize("cost", [0.0, 1.0])
def test_equal_samples_are_dealt_evenly(cost):
    assert sizes(assign_to_ranks([cost] * 12, 4)) == [3] * 4


@given(loads=LOADS, max_tiles=st.integers(1, 40), max_tokens=st.integers(1, 9000))
def test_micro_batches_hold_every_sample_once_and_keep_their_limits(loads, max_tiles, max_tokens):
    limits = MicroBatchLimits(max_tiles=max_tiles, max_tokens=max_tokens)
    micro_batches = split_into_micro_batches(loads, limits)
    assert sorted(chain(*micro_batches)) == list(range(len(loads)))
    costs = []
    for samples in micro_batches:
        cost, tiles, tokens = map(sum, zip(*(loads[sample] for sample in samples), strict=True))
        assert (tiles <= max_tiles and tokens <= max_tokens) or len(samples) == 1
        costs.append(cost)
    assert costs == sorted(costs, reverse=True)


def test_what_fits_into_one_micro_batch_is_one():
    loads = [SampleLoad(float(i), i, 10) for i in (1, 2, 3)]
    assert split_into_micro_batches(loads, MicroBatchLimits(max_tiles=6, max_tokens=30)) == [[0, 1, 2]]


@pytest.mark.parametrize(("count", "at_least", "expected"), [(4, 2, [2, 2]), (4, 9, [1] * 4), (0, 3, [])])
def test_more_micro_batches_are_made_where_others_need_them_as_far_as_there_are_samples(
    count, at_least, expected
):
    split = split_into_micro_batches(equal_loads(count), MicroBatchLimits(), at_least=at_least)
    assert sizes(split) == expected


def test_micro_batches_are_of_like_cost_rather_than_full_and_left_over():
    assert sizes(split_into_micro_batches(equal_loads(10), MicroBatchLimits(max_tiles=9))) == [5, 5]


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
