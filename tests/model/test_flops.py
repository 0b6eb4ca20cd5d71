import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support.tiny import intern_vit, tiny_spec
from vico_pl.model.flops import build_without_weights, count_flops
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.planning.sources import RELEASED

TERA = 1e12
SMALL_VISION = {
    "intern_vit": intern_vit(intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=56)
    | {"patch_size": 14},
    "open_clip": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "timm": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "", "image_size": 64},
    "timm without attention": {
        "timm_model_name": "convnext_atto",
        "timm_pool": "",
        "timm_proj": "",
        "image_size": 128,
    },
}
SMALL_LANGUAGE = {
    "vocab_size": 61,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
SMALL_LANGUAGES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}


def counted(function, *given):
    """Operations that PyTorch counts while a model with weights runs."""
    counter = FlopCounterMode(display=False)
    with counter:  # with gradients: without, PyTorch may take fused layers that it does not count
        function(*given)
    return counter.get_total_flops()


def built(**changes):
    spec = tiny_spec(**changes)
    return count_flops(spec), VisionLanguageModel(spec).eval()


@pytest.mark.parametrize("kind", SMALL_VISION)
def test_tower_connectors_and_router_are_what_a_run_with_weights_counts(kind):
    width = {"timm": 192, "timm without attention": 320}.get(kind, 32)
    flops, model = built(vision=SMALL_VISION[kind])
    size = model.vision.tile_size
    assert model.vision.width == width
    tiles = torch.zeros(3, 3, size, size, dtype=torch.uint8)
    features = model.encode_tiles(tiles).detach()
    assert 3 * flops.vision_per_tile == pytest.approx(counted(model.encode_tiles, tiles), rel=0.02)
    assert 3 * flops.router_per_tile == pytest.approx(counted(model.router, features), rel=0.02)
    for ratio, cost in flops.connector_per_tile.items():
        connector = model.connectors.by_ratio[str(ratio)]
        assert 3 * cost == pytest.approx(counted(connector, features), rel=0.02)
        assert connector(features).shape[1] == flops.vision_tokens_per_tile[ratio]


@pytest.mark.parametrize("kind", SMALL_LANGUAGES)
@pytest.mark.parametrize("length", [8, 64, 300])
def test_blocks_are_what_a_run_with_weights_counts(kind, length):
    flops, model = built(language={"model_type": kind, **SMALL_LANGUAGE, **SMALL_LANGUAGES[kind]})
    if kind == "qwen3_moe":
        model.language.set_experts_implementation("eager")  # PyTorch does not count grouped products
    embeddings = torch.randn(1, length, 96)

    def run():
        model.language.base_model(inputs_embeds=embeddings, use_cache=False)

    # PyTorch counts attention as if it were not causal.
    expected = flops.language_per_token * length + flops.language_per_pair * length**2
    assert expected == pytest.approx(counted(run), rel=0.02)
    head = counted(model.language.get_output_embeddings(), torch.randn(length, 96))
    assert flops.head_per_token * length == head


def test_a_causal_sample_has_each_pair_once():
    flops = count_flops(tiny_spec())
    assert flops.language(1) == flops.language_per_token + flops.language_per_pair
    assert flops.language(3) == 3 * flops.language_per_token + (1 + 2 + 3) * flops.language_per_pair


def test_experts_that_a_token_does_not_meet_cost_nothing():
    language = {"model_type": "qwen3_moe", **SMALL_LANGUAGE, **SMALL_LANGUAGES["qwen3_moe"]}
    few, many = (count_flops(tiny_spec(language={**language, "num_experts": n})) for n in (4, 64))
    router_of_the_experts = 2 * 96 * (64 - 4) * 2  # two layers
    assert many.language_per_token - few.language_per_token == router_of_the_experts


@pytest.mark.parametrize(
    ("size", "at_full_tokens", "compressed", "head"), [("1b", 1.57, 0.50, 0.03), ("8b", 21.4, 7.45, 0.12)]
)
def test_released_shapes_cost_what_has_been_worked_out_by_hand(size, at_full_tokens, compressed, head):
    """Five tiles and 200 text tokens, 100 of them the response: 1490 tokens, or 530 with all compressed."""
    vision, language = RELEASED[size]
    flops = count_flops(tiny_spec(vision=vision, language=language))
    assert flops.vision_tokens_per_tile == {4: 256, 16: 64}
    assert flops.vision_per_tile / TERA == pytest.approx(0.724, rel=0.01)
    assert flops.language(1490) / TERA == pytest.approx(at_full_tokens, rel=0.01)
    assert flops.language(530) / TERA == pytest.approx(compressed, rel=0.01)
    assert 100 * flops.head_per_token / TERA == pytest.approx(head, rel=0.05)


def test_a_model_without_weights_has_the_shapes_of_one_with_them():
    spec = tiny_spec()
    shapes = [
        {name: p.shape for name, p in model.named_parameters()}
        for model in (build_without_weights(spec), VisionLanguageModel(spec))
    ]
    assert shapes[0] == shapes[1]
    assert all(parameter.is_meta for parameter in build_without_weights(spec).parameters())


def test_what_cannot_be_built_is_reported():
    with pytest.raises(ValueError, match="do not fold by 4"):
        count_flops(tiny_spec(vision={**SMALL_VISION["open_clip"], "image_size": 48}))
