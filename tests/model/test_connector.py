import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vico_pl.model.connector import Connector, Connectors, pixel_unshuffle
from vico_pl.model.dropout import TileDropout

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


def test_each_connector_has_the_layers_of_its_published_model():
    short, long = (Connector(ratio, vision_width=VISION, language_width=LANGUAGE) for ratio in (4, 16))
    # mlp1: LayerNorm(4h), Linear(4h -> H), GELU, Linear(H -> H)
    shapes = {name: list(parameter.shape) for name, parameter in short.mlp.named_parameters()}
    expected = {"0.weight": [24], "0.bias": [24], "1.weight": [10, 24], "1.bias": [10]}
    assert shapes == expected | {"3.weight": [10, 10], "3.bias": [10]}
    # mlp2: LayerNorm(16h), Linear(16h -> 2H), GELU, Dropout, Linear(2H -> 2H), GELU, Dropout, Linear(2H -> H)
    shapes = {name: list(parameter.shape) for name, parameter in long.mlp.named_parameters()}
    expected = {"0.weight": [96], "0.bias": [96], "1.weight": [20, 96], "1.bias": [20]}
    expected |= {"4.weight": [20, 20], "4.bias": [20], "7.weight": [10, 20], "7.bias": [10]}
    assert shapes == expected
    assert [type(long.mlp[i]) for i in (2, 3, 5, 6)] == [nn.GELU, TileDropout, nn.GELU, TileDropout]
    assert {long.mlp[i].p for i in (3, 6)} == {0.1}


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


def with_identity_for_gelu(connector):
    connector.mlp = nn.Sequential(*(nn.Identity() if isinstance(m, nn.GELU) else m for m in connector.mlp))
    return connector


@pytest.mark.parametrize("ratio", [16, 36, 64])
def test_an_added_connector_starts_as_the_mean_of_the_full_tokens_but_for_gelu_and_norm(ratio):
    side = ratio // 2  # patches; two tokens of this ratio, or more
    full, coarse = (Connector(r, vision_width=VISION, language_width=LANGUAGE).eval() for r in (4, ratio))
    for parameter in full.parameters():
        nn.init.normal_(parameter)
    coarse.start_as_mean(full)
    full, coarse = with_identity_for_gelu(full), with_identity_for_gelu(coarse)
    patches = torch.randn(2, side * side, VISION)
    # Patches of each full token with mean 0 and variance 1: one LayerNorm over several does what theirs do.
    tokens = pixel_unshuffle(patches, 2)
    folded = nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=0)
    grid = folded.unflatten(2, (2, 2, VISION)).unflatten(1, (side // 2, side // 2))
    patches = grid.permute(0, 1, 3, 2, 4, 5).reshape(2, side * side, VISION)
    blocks, within = side // math.isqrt(ratio), math.isqrt(ratio) // 2
    expected = full(patches).view(2, blocks, within, blocks, within, LANGUAGE).mean((2, 4)).flatten(1, 2)
    assert torch.allclose(coarse(patches), expected, atol=1e-4)
