from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.tiny import batch_of, encoded_sample, tiny_model
from vico_pl.data.collate import collate
from vico_pl.model.dropout import TileDropout, set_keys, tile_keys

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
