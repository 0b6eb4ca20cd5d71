import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny import batch_of, encoded_sample, mixed_samples, tiny_model, tiny_spec
from vico_pl.model.vlm import splice

RATIOS = torch.tensor([4, 16, 4, 16, 16, 4, 16])  # of the seven tiles of `mixed_samples`


def states(model, batch, ratios):
    return model.response_states(batch, model.encode_tiles(batch.tiles), ratios)


def ratios_of_samples(samples):
    return RATIOS.split([len(sample.tiles) for sample in samples])


@torch.no_grad()
def test_a_packed_batch_equals_its_samples_one_by_one(model):
    samples = mixed_samples()
    alone = [states(model, batch_of(s), r) for s, r in zip(samples, ratios_of_samples(samples), strict=True)]
    torch.testing.assert_close(states(model, batch_of(*samples), RATIOS), torch.cat(alone), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("place", range(4))
def test_changing_one_sample_leaves_the_states_of_the_others(model, place):
    samples = mixed_samples()
    before = states(model, batch_of(*samples), RATIOS)
    changed = samples[place]
    ids = torch.where(changed.input_ids > 5, (changed.input_ids - 6 + 7) % 55 + 6, changed.input_ids)
    samples[place] = replace(changed, input_ids=ids, tiles=255 - changed.tiles)
    after = states(model, batch_of(*samples), RATIOS)
    own = (
        torch.arange(4).repeat_interleave(torch.tensor([int(s.response_mask.sum()) for s in samples]))
        == place
    )
    assert (after - before)[own].abs().amax(1).min() > 1e-3
    assert (after - before)[~own].abs().max() < 1e-6


@torch.no_grad()
def test_the_ratio_of_a_tile_changes_how_many_tokens_stand_for_it(model, batch):
    features = model.encode_tiles(batch.tiles)
    full = model.splice_batch(batch, features, model.full_ratios(batch))
    mixed = model.splice_batch(batch, features, RATIOS)
    text = [int(n) for n in batch.sample_lengths - torch.bincount(batch.tile_to_sample, minlength=4)]
    assert full.segment_lengths == [text[0] + 12, text[1], text[2] + 12, text[3] + 4]
    assert mixed.segment_lengths == [text[0] + 9, text[1], text[2] + 6, text[3] + 1]
    assert len(full.response_positions) == len(mixed.response_positions) == 17


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_of_text_alone_runs(model, training):
    batch = batch_of(encoded_sample(1, images=(), answers=(3,)))
    hidden = states(model.train(training), batch, model.full_ratios(batch))
    assert hidden.shape == (3, 32)
    hidden.sum().backward()
    if training:  # every rank's every parameter has a gradient, whatever its batch holds
        parts = (model.vision, model.connectors, model.language.base_model)
        assert [n for part in parts for n, p in part.named_parameters() if p.grad is None] == []


def test_hidden_states_times_the_head_are_the_language_models_logits(model):
    sample = encoded_sample(5, images=(), answers=(4,))
    batch = batch_of(sample)
    model.language.set_attn_implementation("eager")
    logits = model.language(input_ids=sample.input_ids[None]).logits[0]
    predicting = sample.response_mask.nonzero().squeeze(1) - 1
    ours = states(model, batch, model.full_ratios(batch)) @ model.head.T
    torch.testing.assert_close(ours, logits[predicting], rtol=1e-4, atol=1e-4)


def test_a_model_has_the_router_of_its_description():
    assert tiny_model(router_heads=None).router is None
    vision = {**tiny_spec().vision, "patch_size": 4}
    router = tiny_model(router_heads=2, ratios=[4, 16, 64], vision=vision).router
    assert router(torch.zeros(1, 64, 32)).shape == (1, 3)


@pytest.mark.parametrize("ratios", [[], [1], [16], [16, 4], [4, 4], [4, 8], [4, 64, 16]])
def test_ratios_are_squares_that_rise_from_four(ratios):
    with pytest.raises(ValueError, match="expected rising square numbers that begin with 4"):
        tiny_model(ratios=ratios)


# --- splicing -----------------------------------------------------------------------------------------------

PLACEHOLDER, TEXT, RESPONSE = "#", "t", "r"
samples_of_tokens = st.lists(
    st.lists(st.sampled_from([PLACEHOLDER, TEXT, TEXT, RESPONSE]), max_size=12).map(lambda x: [TEXT, *x]),
    min_size=1,
    max_size=4,
)


def run_splice(samples, counts):
    """Splice embeddings of width 1: 1000 and on for text, 0 and on for vision tokens."""
    tokens = [token for sample in samples for token in sample]
    return splice(
        torch.arange(1000.0, 1000.0 + len(tokens))[:, None],
        torch.arange(float(sum(counts)))[:, None],
        torch.tensor(counts, dtype=torch.int64),
        is_placeholder=torch.tensor([token == PLACEHOLDER for token in tokens]),
        response_mask=torch.tensor([token == RESPONSE for token in tokens]),
        sample_lengths=torch.tensor([len(sample) for sample in samples]),
    )


def test_a_worked_example():
    spliced = run_splice([[TEXT, PLACEHOLDER, RESPONSE]], [4])  # a # b -> a v v v v b
    assert spliced.embeddings[:, 0].tolist() == [1000, 0, 1, 2, 3, 1002]
    assert spliced.segment_lengths == [6]
    assert spliced.tile_starts.tolist() == [1]
    assert spliced.response_positions.tolist() == [4]  # the last vision token predicts b


@given(samples=samples_of_tokens, data=st.data())
def test_splicing_equals_splicing_one_token_after_the_other(samples, data):
    num_tiles = sum(sample.count(PLACEHOLDER) for sample in samples)
    counts = data.draw(st.lists(st.sampled_from([1, 4, 5]), min_size=num_tiles, max_size=num_tiles))
    values, lengths, starts, predicting = [], [], [], []
    text, vision, tiles = itertools.count(1000), itertools.count(), iter(counts)
    for sample in samples:
        begin = len(values)
        for token in sample:
            number = next(text)
            if token == PLACEHOLDER:
                starts.append(len(values))
                values += [next(vision) for _ in range(next(tiles))]
            else:
                predicting += [len(values) - 1] * (token == RESPONSE)
                values.append(number)
        lengths.append(len(values) - begin)
    spliced = run_splice(samples, counts)
    assert spliced.embeddings[:, 0].tolist() == values
    assert spliced.segment_lengths == lengths
    assert spliced.tile_starts.tolist() == starts
    assert spliced.response_positions.tolist() == predicting
