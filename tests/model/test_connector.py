from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny import batch_of, encoded_sample, tiny_model
from vico_pl.data.collate import collate
from vico_pl.model.connector import (
    Connector,
    Connectors,
    TileDropout,
    pixel_unshuffle,
    set_keys,
    tile_keys,
)

PATCHES, VISION, LANGUAGE = 64, 6, 10


def connectors(ratios=(4, 16), *, seed=0):
    torch.manual_seed(seed)
    return Connectors(ratios, vision_width=VISION, language_width=LANGUAGE).eval()


def features(num_tiles, *, seed=1):
    return torch.randn(num_tiles, PATCHES, VISION, generator=torch.Generator().manual_seed(seed))


def internvl_pixel_shuffle(x, scale_factor):
    """`InternVLChatModel.pixel_shuffle` with `ps_version: v2`, on a (n, w, h, c) grid."""
    n, w, h, c = x.size()
    x = x.view(n, w, int(h * scale_factor), int(c / scale_factor))
    x = x.permute(0, 2, 1, 3).contiguous()
    x = x.view(n, int(h * scale_factor), int(w * scale_factor), int(c / (scale_factor * scale_factor)))
    return x.permute(0, 2, 1, 3).contiguous()


@given(
    tiles=st.integers(0, 3), blocks=st.integers(1, 4), factor=st.sampled_from([1, 2, 4]), c=st.integers(1, 3)
)
def test_it_equals_the_published_pixel_shuffle_v2(tiles, blocks, factor, c):
    side = blocks * factor
    features = torch.arange(tiles * side * side * c, dtype=torch.float32).view(tiles, side * side, c)
    published = internvl_pixel_shuffle(features.view(tiles, side, side, c), 1 / factor)
    expected = published.reshape(tiles, blocks * blocks, factor * factor * c)
    assert torch.equal(pixel_unshuffle(features, factor), expected)


def test_compressing_connectors_drop_out_and_the_other_does_not():
    layers = {r: Connector(r, vision_width=VISION, language_width=LANGUAGE).mlp for r in (4, 16)}
    assert [layer.p for layer in layers[16] if isinstance(layer, TileDropout)] == [0.1, 0.1]
    assert not any(isinstance(layer, TileDropout) for layer in layers[4])


def test_a_tile_gets_one_token_per_ratio_patches():
    tokens, counts = connectors((4, 16, 64))(features(3), torch.tensor([16, 64, 4]))
    assert counts.tolist() == [4, 1, 16]
    assert tokens.shape == (21, LANGUAGE)


@pytest.mark.parametrize("ratios", [[4, 4], [16, 16], [16, 4, 4, 16, 4], [4], [16]])
def test_tokens_lie_in_the_order_of_the_tiles_and_equal_those_of_each_tile_alone(ratios):
    module, x = connectors(), features(len(ratios))
    tokens, counts = module(x, torch.tensor(ratios))
    alone = [module.by_ratio[str(ratio)](tile[None])[0] for ratio, tile in zip(ratios, x, strict=True)]
    assert counts.tolist() == [len(t) for t in alone]
    torch.testing.assert_close(tokens, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_in_eval_mode_only_the_chosen_connector_runs_on_a_tile():
    module, x, tiles_seen = connectors(), features(3), {}
    for ratio in (4, 16):
        module.by_ratio[str(ratio)].register_forward_hook(
            lambda _, args, __, ratio=ratio: tiles_seen.update({ratio: len(args[0])})
        )
    module(x, torch.tensor([16, 4, 16]))
    assert tiles_seen == {4: 1, 16: 2}
    tiles_seen.clear()
    module(x, torch.tensor([16, 16, 16]))
    assert tiles_seen == {16: 3}


@pytest.mark.parametrize(("chosen", "unused"), [(4, 16), (16, 4)])
def test_in_training_every_connector_takes_part_so_that_no_gradient_is_missing(chosen, unused):
    module = connectors().train()
    tokens, _ = module(features(2), torch.tensor([chosen, chosen]))
    tokens.sum().backward()
    for parameter in module.by_ratio[str(unused)].parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert all(p.grad.abs().sum() > 0 for p in module.by_ratio[str(chosen)].mlp[-1].parameters())


def test_gradients_reach_the_features_of_every_tile_and_stay_in_it():
    module, x = connectors(), features(3).requires_grad_()
    tokens, counts = module(x, torch.tensor([4, 16, 4]))
    first, second, third = tokens.split(counts.tolist())
    weights = torch.randn(second.shape, generator=torch.Generator().manual_seed(2))
    (second * weights).sum().backward()
    assert x.grad[1].abs().sum() > 0
    assert x.grad[[0, 2]].abs().sum() == 0
    assert len(first) == len(third) == 16


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_of_text_alone_has_no_vision_tokens(training):
    tokens, counts = connectors().train(training)(features(0), torch.empty(0, dtype=torch.int64))
    assert tokens.shape == (0, LANGUAGE)
    assert counts.shape == (0,)


# --- dropout ---

SAMPLES = [encoded_sample(1, images=(3,)), encoded_sample(2, images=()), encoded_sample(3, images=(1, 2))]


def dropped(shape, *, keys, p=0.1, layer=0):
    """Which values the given dropout layer of two sets to zero."""
    layers = torch.nn.Sequential(TileDropout(p), TileDropout(p))
    set_keys(layers, keys)
    values = layers[layer](torch.ones(shape))
    zero = values == 0
    torch.testing.assert_close(values[~zero], torch.full_like(values[~zero], 1 / (1 - p)))
    return zero


@pytest.fixture
def keys():
    return tile_keys(batch_of(*SAMPLES), seed=0)


def test_a_tile_has_the_same_mask_in_any_batch(keys):
    assert len(set(keys.tolist())) == 6
    whole = dropped((6, 4, 50), keys=keys)
    parts = [collate(SAMPLES[:1], positions=[0]), collate(SAMPLES[1:], positions=[1, 2])]
    found = [dropped((3, 4, 50), keys=tile_keys(part, seed=0)) for part in parts]
    assert torch.equal(torch.cat(found), whole)
    moved = replace(parts[1], positions=[1, 3])
    assert not set(tile_keys(moved, seed=0).tolist()) & set(keys.tolist())
    assert not set(tile_keys(parts[1], seed=1).tolist()) & set(keys.tolist())


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_a_fraction_p_of_the_values_is_dropped_in_every_tile_and_layer_on_its_own(keys, p):
    masks = torch.cat([dropped((6, 40, 1000), keys=keys, p=p, layer=i) for i in (0, 1)]).flatten(1).double()
    spread = (p * (1 - p) / 40_000) ** 0.5
    assert (masks.mean(1) - p).abs().max() <= 5 * spread
    if p:
        correlation = np.corrcoef(masks.numpy()) - np.eye(12)
        assert np.abs(correlation).max() < 5 / 40_000**0.5
        neighbours = np.corrcoef(masks[:, 1:].flatten(), masks[:, :-1].flatten())[0, 1]
        assert abs(neighbours) < 5 / (12 * 40_000) ** 0.5


def test_what_is_dropped_has_no_gradient_and_nothing_is_outside_of_training(keys):
    layer, values = TileDropout(0.5), torch.ones(6, 7, requires_grad=True)
    set_keys(layer, keys)
    output = layer(values)
    output.sum().backward()
    assert torch.equal(values.grad, output.detach())
    assert torch.equal(layer.eval()(values), values)


def test_without_keys_it_is_plain_dropout(keys):
    layer, plain, values = TileDropout(0.5), torch.nn.Dropout(0.5), torch.ones(5, 7)
    set_keys(layer, keys)
    set_keys(layer, None)
    results = []
    for module in (layer, plain):
        torch.manual_seed(0)
        results.append(module(values))
    assert torch.equal(*results)


def test_a_model_in_training_draws_nothing_and_depends_on_the_seed_alone():
    batch, states = batch_of(*SAMPLES), []
    for seed, number in ((0, 1), (0, 2), (1, 3)):
        model = tiny_model().train()
        model.set_dropout(0.3, seed=seed)
        torch.manual_seed(number)
        ratios = torch.full_like(batch.tile_to_sample, 16)
        states.append(model.response_states(batch, model.encode_tiles(batch.tiles), ratios))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
