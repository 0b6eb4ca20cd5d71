import pickle
from dataclasses import replace

import pytest
import torch

from tests.helpers import PLACEHOLDER_ID, TILE, batch_of, encoded_sample, mixed_samples
from vico_pl.data.collate import collate
from vico_pl.types import BadRecord, RankBatch

BAD = BadRecord(id="train-000000.tar/7", reason="JSON: broken")


def test_samples_lie_end_to_end():
    samples = mixed_samples()  # tiles: one image of 3; none; images of 1 and 2; one of 1
    batch = collate(samples)
    assert batch.ids == ["sample-1", "sample-2", "sample-3", "sample-4"]
    assert batch.tile_to_sample.tolist() == [0, 0, 0, 2, 2, 2, 3]
    assert batch.tiles_per_image == [[3], [], [1, 2], [1]]
    assert batch.positions == [0, 1, 2, 3]
    assert batch.response_lengths == [4, 5, 6, 2]
    assert batch.num_response_tokens == 17
    assert batch.sample_lengths.tolist() == [len(s.input_ids) for s in samples]
    lengths = batch.sample_lengths.tolist()
    for sample, ids, mask in zip(
        samples, batch.input_ids.split(lengths), batch.response_mask.split(lengths), strict=True
    ):
        assert torch.equal(ids, sample.input_ids)
        assert torch.equal(mask, sample.response_mask)
    for place, sample in enumerate(samples):
        assert torch.equal(batch.tiles[batch.tile_to_sample == place], sample.tiles)
    assert (batch.num_samples, batch.num_tiles) == (4, 7)
    assert int((batch.input_ids == PLACEHOLDER_ID).sum()) == batch.num_tiles


def test_positions_are_kept():
    assert collate([encoded_sample(1), encoded_sample(2)], positions=[7, -1]).positions == [7, -1]


def test_a_batch_of_text_alone_has_no_tiles():
    batch = batch_of(encoded_sample(1, images=()), encoded_sample(2, images=()))
    assert batch.tiles.shape == (0, 3, TILE, TILE)
    assert batch.tile_to_sample.dtype == torch.int64


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no sample to make a batch of"):
        collate([])


def test_moving_a_share_moves_every_tensor_and_keeps_the_rest():
    batch, dummy = collate(mixed_samples()), collate([encoded_sample(9)], positions=[-1])
    share = RankBatch(micro_batches=[batch], bad_records=[BAD], dummy=dummy)
    moved = share.to("meta")
    for ours, theirs in ((share.micro_batches[0], moved.micro_batches[0]), (share.dummy, moved.dummy)):
        tensors = [value for value in vars(theirs).values() if isinstance(value, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert (theirs.ids, theirs.positions) == (ours.ids, ours.positions)
    assert (moved.ids, moved.bad_records) == (share.ids, [BAD])
    assert batch.tiles.device.type == "cpu"


def test_a_filler_without_a_name_is_no_sample_of_a_share():
    dummy = replace(collate([encoded_sample(9)], positions=[-1]), ids=[""])
    share = RankBatch(micro_batches=[dummy, collate(mixed_samples())], bad_records=[], dummy=dummy)
    assert share.ids == ["sample-1", "sample-2", "sample-3", "sample-4"]


def test_a_batch_travels_between_processes(batch):
    copy = pickle.loads(pickle.dumps(batch))
    assert torch.equal(copy.tiles, batch.tiles)
    assert copy.ids == batch.ids
