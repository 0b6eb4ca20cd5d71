import torch

from tests.helpers import batch_of, encoded_sample, mixed_samples
from vico_pl.model.branches import branch_per_tile


def test_the_worked_example():
    a_and_b, c = encoded_sample(1, images=(2,), answers=(3,)), encoded_sample(2, images=(1,), answers=(1,))
    branches = branch_per_tile(batch_of(a_and_b, c))
    assert branches.tile_origin.tolist() == [0, 1, 0, 1, 2]  # a: (a b), b: (a b), c: (c)
    assert branches.is_own_tile.tolist() == [True, False, False, True, True]
    assert branches.response_origin.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert branches.batch.ids == ["sample-1", "sample-1", "sample-2"]


def test_branches_are_whole_copies_of_their_samples():
    samples = mixed_samples()
    owners = [sample for sample in samples for _ in sample.tiles]
    expected = batch_of(*owners)
    branches = branch_per_tile(batch_of(*samples)).batch
    for name in ("tiles", "tile_to_sample", "tile_to_image", "input_ids", "response_mask", "sample_lengths"):
        assert torch.equal(getattr(branches, name), getattr(expected, name)), name
    assert branches.ids == expected.ids


def test_each_branch_has_one_tile_of_its_own():
    branches = branch_per_tile(batch_of(*mixed_samples()))
    own = branches.is_own_tile
    assert branches.tile_origin[own].tolist() == list(range(7))
    assert branches.batch.tile_to_sample[own].tolist() == list(range(7))


def test_responses_of_branches_point_at_the_same_token_of_the_batch():
    batch = batch_of(*mixed_samples())
    branches = branch_per_tile(batch)
    original = batch.input_ids[batch.response_mask]
    copies = branches.batch.input_ids[branches.batch.response_mask]
    assert torch.equal(original[branches.response_origin], copies)


def test_a_batch_of_text_alone_has_no_branches():
    branches = branch_per_tile(batch_of(encoded_sample(1, images=())))
    assert branches.batch.num_samples == 0
    assert branches.tile_origin.shape == branches.response_origin.shape == (0,)
