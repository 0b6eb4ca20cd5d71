import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear

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


def attend(state, name, query, x):
    """Multi-head attention of one query vector to the rows of `x`, from the raw tensors of layer `name`."""
    weight, bias = (state[f"{name}.in_proj_{part}"].chunk(3) for part in ("weight", "bias"))
    q, k, v = (linear(y, w, b) for y, w, b in zip((query, x, x), weight, bias, strict=True))
    heads = []
    for part in torch.arange(WIDTH).chunk(HEADS):
        scores = k[:, part] @ q[part] / len(part) ** 0.5
        heads.append(scores.softmax(0) @ v[:, part])
    return linear(torch.cat(heads), state[f"{name}.out_proj.weight"], state[f"{name}.out_proj.bias"])


def norm(state, name, x):
    return layer_norm(x, x.shape, state[f"{name}.weight"], state[f"{name}.bias"])


def released_forward(state, x):
    """The forward pass of the released models for one tile: attn1 once, then attn2 and norm2 three times."""
    pooling = {k.removeprefix("pooling_before_gating."): v for k, v in state.items()}
    gating = {k.removeprefix("gating."): v for k, v in state.items()}
    pooled = norm(pooling, "norm1", attend(pooling, "attn1", pooling["query_token"][0], x))
    for _ in range(3):
        pooled = norm(pooling, "norm2", attend(pooling, "attn2", pooled, x))
    for block in ("block1", "block2", "block3", "block4"):
        hidden = gelu(linear(pooled, gating[f"{block}.0.weight"], gating[f"{block}.0.bias"]))
        hidden = linear(hidden, gating[f"{block}.3.weight"], gating[f"{block}.3.bias"])
        pooled = pooled + norm(gating, f"{block}.5", hidden)
    return linear(norm(gating, "gate.0", pooled), gating["gate.1.weight"], gating["gate.1.bias"])


def test_it_computes_what_the_released_models_compute(router):
    x = features()
    expected = torch.stack([released_forward(router.state_dict(), tile) for tile in x])
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
    c, expected = WIDTH, {"pooling_before_gating.query_token": [1, WIDTH]}
    for i in range(1, 5):
        attention, block = f"pooling_before_gating.attn{i}", f"gating.block{i}"
        expected |= {f"{attention}.in_proj_weight": [3 * c, c], f"{attention}.in_proj_bias": [3 * c]}
        expected |= {f"{attention}.out_proj.weight": [c, c], f"{attention}.out_proj.bias": [c]}
        expected |= {f"pooling_before_gating.norm{i}.{part}": [c] for part in ("weight", "bias")}
        expected |= {f"{block}.0.weight": [4 * c, c], f"{block}.0.bias": [4 * c]}
        expected |= {f"{block}.3.weight": [c, 4 * c], f"{block}.3.bias": [c]}
        expected |= {f"{block}.5.weight": [c], f"{block}.5.bias": [c]}
    expected |= {"gating.gate.0.weight": [c], "gating.gate.0.bias": [c]}
    expected |= {"gating.gate.1.weight": [2, c], "gating.gate.1.bias": [2]}
    assert {name: list(tensor.shape) for name, tensor in router.state_dict().items()} == expected


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
