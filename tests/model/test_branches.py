from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import PLACEHOLDER_ID, batch_of, encoded_sample, mixed_samples, tiny_model
from vico_pl.model.branches import branch_per_tile, branch_states
from vico_pl.model.splice import splice

PLACEHOLDER, TEXT, RESPONSE = "#", "t", "r"
FULL, COMPRESSED = 4, 1  # vision tokens of a tile
samples_of_tokens = st.lists(
    st.lists(st.sampled_from([PLACEHOLDER, TEXT, RESPONSE]), max_size=9).map(lambda tokens: [TEXT, *tokens]),
    min_size=1,
    max_size=3,
)


def numbered_splice(samples, counts):
    """Splice embeddings of width 1 that name the token: 0 1 2 ... for text, -1.00 -1.01 ... in tile 1."""
    tokens = [token for sample in samples for token in sample]
    vision = [-(tile + place / 100) for tile, count in enumerate(counts, start=1) for place in range(count)]
    return splice(
        torch.arange(float(len(tokens)))[:, None],
        torch.tensor(vision)[:, None],
        torch.tensor(counts, dtype=torch.int64),
        is_placeholder=torch.tensor([token == PLACEHOLDER for token in tokens]),
        response_mask=torch.tensor([token == RESPONSE for token in tokens]),
        sample_lengths=torch.tensor([len(sample) for sample in samples]),
    )


def owners_of(samples):
    return [number for number, sample in enumerate(samples) for token in sample if token == PLACEHOLDER]


def branches_of(samples):
    """The branches of samples at full tokens, and the embeddings that their tokens point to."""
    owners = owners_of(samples)
    spliced = numbered_splice(samples, [FULL] * len(owners))
    compressed = -torch.arange(1.0, len(owners) + 1)[:, None]  # -i for tile i
    branches = branch_per_tile(
        spliced,
        torch.tensor(owners, dtype=torch.int64),
        full_length=FULL,
        compressed_length=COMPRESSED,
    )
    return spliced, branches, torch.cat([spliced.embeddings, compressed])


def test_the_worked_example():
    spliced, branches, embeddings = branches_of([["t", "#", "#", "t", "r"]])
    assert spliced.embeddings.squeeze(1).tolist()[:5] == pytest.approx([0, -1.0, -1.01, -1.02, -1.03])
    a, b = embeddings[branches.tokens].squeeze(1).split(branches.lengths)
    assert a.tolist() == pytest.approx([-1, -2, -2.01, -2.02, -2.03, 3, 4])
    assert b.tolist() == [-2, 3, 4]
    assert branches.prefix_lengths == [1, 5]
    assert branches.position_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7]
    assert branches.response_places.tolist() == [5, 8]  # the tokens "3", before the response


@given(samples_of_tokens)
def test_a_prefix_and_its_branch_are_the_sample_with_that_tile_compressed(samples):
    spliced, branches, embeddings = branches_of(samples)
    owners, begin = owners_of(samples), 0
    for tile, owner in enumerate(owners):
        counts = [COMPRESSED if other == tile else FULL for other in range(len(owners))]
        wanted = numbered_splice(samples, counts)
        first, length = branches.prefix_starts[tile], branches.prefix_lengths[tile]
        end = begin + branches.lengths[tile]
        branch = embeddings[branches.tokens[begin:end]]
        found = torch.cat([spliced.embeddings[first : first + length], branch])
        parts = wanted.embeddings.split(wanted.segment_lengths)
        assert torch.equal(found, parts[owner])
        positions = torch.cat([torch.arange(length), branches.position_ids[begin:end]])
        assert torch.equal(positions, torch.arange(len(found)))

        mine = branches.response_branch == tile
        places = branches.response_places[mine]
        origin = branches.response_origin[mine]
        before = spliced.embeddings[spliced.response_positions[origin]]
        predicting = torch.where((places < 0)[:, None], before, embeddings[branches.tokens[places]])
        ends = torch.tensor(wanted.segment_lengths).cumsum(0)
        is_own = torch.bucketize(wanted.response_positions, ends, right=True) == owner
        assert torch.equal(predicting, wanted.embeddings[wanted.response_positions[is_own]])
        begin = end
    assert begin == len(branches.tokens)


def later_images(seed):
    """A sample with images after its first answer, and an answer that begins right behind a tile."""
    layout = [*"t#ttrr#t#rrt#tr"]
    base = encoded_sample(seed, images=(1, 1, 1, 1), answers=(len(layout),))
    words = torch.arange(len(layout)) + 6
    is_tile = torch.tensor([token == PLACEHOLDER for token in layout])
    return replace(
        base,
        input_ids=words.masked_fill(is_tile, PLACEHOLDER_ID),
        response_mask=torch.tensor([token == RESPONSE for token in layout]),
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
        found = branch_states(model, batch, features, ratio=16, max_tokens=max_tokens)
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
    branch_states(model, batch, model.encode_tiles(batch.tiles), ratio=16, **settings)
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


def test_a_batch_of_text_alone_has_no_branches():
    model, batch = tiny_model(), batch_of(encoded_sample(1, images=()))
    found = branch_states(model, batch, model.encode_tiles(batch.tiles), ratio=16)
    assert len(found.full) == 3
    assert len(found.branches) == len(found.response_branch) == len(found.response_origin) == 0
