from dataclasses import replace

import pytest
import torch

from tests.support.tiny import PLACEHOLDER_ID, batch_of, encoded_sample, mixed_samples, tiny_model
from vico_pl.model.branches import branch_states


def later_images(seed):
    """A sample with images after its first answer, and an answer that begins right behind a tile."""
    layout = [*"t#ttrr#t#rrt#tr"]
    base = encoded_sample(seed, images=(1, 1, 1, 1), answers=(len(layout),))
    words = torch.arange(len(layout)) + 6
    is_tile = torch.tensor([token == "#" for token in layout])
    return replace(
        base,
        input_ids=words.masked_fill(is_tile, PLACEHOLDER_ID),
        response_mask=torch.tensor([token == "r" for token in layout]),
    )


def all_samples():
    without_answer = encoded_sample(7, images=(2,), answers=())
    return [*mixed_samples(), later_images(8), without_answer, encoded_sample(9, images=(2, 2), answers=(1,))]


@torch.no_grad()
def naive_states(model, batch, tile):
    """States of the response of the tile's sample, from a whole pass over the batch."""
    ratios = model.full_ratios(batch)
    ratios[tile] = 16
    states = model.response_states(batch, model.encode_tiles(batch.tiles), ratios)
    samples = torch.arange(batch.num_samples).repeat_interleave(batch.sample_lengths)[batch.response_mask]
    return states[samples == batch.tile_to_sample[tile]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_states_of_branches_are_those_of_whole_passes(dtype, tolerance, max_tokens):
    model, batch = tiny_model().to(dtype), batch_of(*all_samples())
    with torch.no_grad():
        features = model.encode_tiles(batch.tiles)
        found = branch_states(model, batch, features, ratios=[16], max_tokens=max_tokens)
        full = model.response_states(batch, features, model.full_ratios(batch))
    assert torch.equal(found.full, full)
    for tile in range(batch.num_tiles):
        expected = naive_states(model, batch, tile)
        mine = found.response_branch == tile
        assert torch.equal(found.response_origin[mine], response_numbers(batch, tile))
        torch.testing.assert_close(found.branches[mine], expected, rtol=0, atol=tolerance)
    assert found.branches.isfinite().all()


def response_numbers(batch, tile):
    samples = torch.arange(batch.num_samples).repeat_interleave(batch.sample_lengths)[batch.response_mask]
    return (samples == batch.tile_to_sample[tile]).nonzero().squeeze(1)


@torch.no_grad()
def run_lengths(model, batch, **settings):
    """How many tokens the language model sees in each of its passes."""
    seen = []
    model.language.base_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    branch_states(model, batch, model.encode_tiles(batch.tiles), ratios=[16], **settings)
    return seen


def test_what_stands_before_a_tile_runs_once():
    batch = batch_of(encoded_sample(1, images=(3,), answers=(4,)))
    tail = len(batch.input_ids) - 5  # tokens behind the tiles; two stand before them
    whole, branches = run_lengths(tiny_model(), batch)
    assert whole == 2 + 3 * 4 + tail
    assert branches == sum(1 + later * 4 + tail for later in (2, 1, 0))


def test_branches_run_in_groups_of_bounded_size():
    batch = batch_of(*mixed_samples())
    whole, *groups = run_lengths(tiny_model(), batch, max_tokens=40)
    assert len(groups) > 2
    assert max(groups) <= 40
    assert [whole, sum(groups)] == run_lengths(tiny_model(), batch)
