import pytest
import torch

from tests.model.families.recomputed import Recomputed
from tests.support.released import router_shapes
from vico_pl.model.router import ResolutionRouter

WIDTH, HEADS, PATCHES = 8, 2, 9


@pytest.fixture
def router():
    torch.manual_seed(0)
    module = ResolutionRouter(WIDTH, num_heads=HEADS).eval()
    with torch.no_grad():
        for parameter in module.parameters():  # so that norms and biases count, too
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def features(count=3):
    return torch.randn(count, PATCHES, WIDTH, generator=torch.Generator().manual_seed(1))


def test_it_computes_what_the_released_models_compute(router):
    x = features()
    expected = Recomputed(router.state_dict()).gates(x, heads=HEADS)
    torch.testing.assert_close(router(x), expected, rtol=1e-4, atol=1e-5)


def test_fused_attention_gives_the_same_logits_without_gradients_only(router):
    x = features()
    expected = router(x).detach()
    before = router.state_dict()
    router.fuse()
    assert router.state_dict().keys() == before.keys(), "checkpoints stay as they are"
    assert torch.equal(router(x), expected), "training"
    with torch.no_grad():
        fused = router(x)
        torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(fused, expected), "the two ways round differently"
        assert router(x[:0]).shape == (0, 2)


def test_a_wide_router_is_not_fused(monkeypatch):
    monkeypatch.setattr("vico_pl.model.router.MAX_FUSED_WIDTH", WIDTH - 1)
    torch.manual_seed(0)
    module, x = ResolutionRouter(WIDTH, num_heads=HEADS).eval(), features()
    with torch.no_grad():
        expected = module(x)
        module.fuse()
        assert torch.equal(module(x), expected)


def test_parameters_have_the_names_and_shapes_of_released_checkpoints(router):
    assert {name: tuple(tensor.shape) for name, tensor in router.state_dict().items()} == dict(
        router_shapes(WIDTH)
    )


def test_what_is_trained_is_what_runs(router):
    stored_only = ("attn3", "attn4", "norm3", "norm4")
    for _ in range(2):
        router.train()(features()).square().sum().backward()
        for name, parameter in router.named_parameters():
            assert parameter.requires_grad != any(part in name for part in stored_only), name
            assert (parameter.grad is not None) == parameter.requires_grad, name
        router.requires_grad_(requires_grad=False)
        assert not any(p.requires_grad for p in router.parameters())
        router.requires_grad_()


def test_a_tile_is_judged_by_itself(router):
    x = features(5)
    torch.testing.assert_close(router(x)[3], router(x[3:4])[0], rtol=1e-5, atol=1e-6)
    assert router(x[:0]).shape == (0, 2)


def test_no_gradient_reaches_the_vision_encoder(router):
    x = features().requires_grad_()
    router(x).sum().backward()
    assert x.grad is None
