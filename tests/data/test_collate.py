import pickle

import pytest
import torch

from tests.helpers import PLACEHOLDER_ID, TILE, batch_of, encoded_sample, mixed_samples
from vico_pl.data.collate import collate
from vico_pl.types import BadRecord

BAD = BadRecord(id="train-000000.tar/7", reason="JSON: broken")


def test_samples_lie_end_to_end():
    samples = mixed_samples()  # tiles: one image of 3; none; images of 1 and 2; one of 1
    batch = collate(samples)
    assert batch.ids == ["sample-1", "sample-2", "sample-3", "sample-4"]
    assert batch.tile_to_sample.tolist() == [0, 0, 0, 2, 2, 2, 3]
    assert batch.tile_to_image.tolist() == [0, 0, 0, 1, 2, 2, 3]
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


def test_bad_records_are_listed_and_take_no_place():
    first, second = encoded_sample(1), encoded_sample(2)
    batch, clean = collate([first, BAD, second]), collate([first, second])
    assert batch.bad_records == [BAD]
    assert (batch.num_samples, batch.ids) == (2, clean.ids)
    for name in ("tiles", "tile_to_sample", "tile_to_image", "input_ids", "response_mask", "sample_lengths"):
        assert torch.equal(getattr(batch, name), getattr(clean, name)), name


def test_a_batch_of_text_alone_has_no_tiles():
    batch = batch_of(encoded_sample(1, images=()), encoded_sample(2, images=()))
    assert batch.tiles.shape == (0, 3, TILE, TILE)
    assert batch.tile_to_image.dtype == batch.tile_to_sample.dtype == torch.int64


def test_a_batch_without_a_usable_sample_says_why():
    expected = "all 2 records of a batch are bad; the first: train-000000.tar/7: JSON: broken"
    with pytest.raises(ValueError, match=expected):
        collate([BAD, BadRecord(id="y", reason="other")])


def test_a_filler_stands_in_only_where_nothing_else_does():
    filler = encoded_sample(0, images=(), answers=(0,))
    batch = collate([BAD, BAD], filler=filler)
    assert (batch.ids, batch.bad_records) == ([filler.id], [BAD, BAD])
    assert not batch.response_mask.any()
    assert collate([BAD, encoded_sample(1)], filler=filler).ids == ["sample-1"]


def test_moving_a_batch_moves_every_tensor_and_keeps_the_rest():
    batch = collate([*mixed_samples(), BAD])
    moved = batch.to("meta")
    assert {moved.tiles.device.type, moved.sample_lengths.device.type, moved.tile_to_image.device.type} == {
        "meta"
    }
    assert (moved.ids, moved.bad_records) == (batch.ids, batch.bad_records)
    assert batch.tiles.device.type == "cpu"


def test_a_batch_travels_between_processes(batch):
    copy = pickle.loads(pickle.dumps(batch))
    assert torch.equal(copy.tiles, batch.tiles)
    assert copy.ids == batch.ids
