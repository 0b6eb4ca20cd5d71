import pytest
import torch

from tests.support.tiny import TILE, WIDTH, intern_vit, tiny_spec
from vico_pl.model.vision import VisionEncoder

CONFIG = tiny_spec().vision


def encoder(**changes):
    torch.manual_seed(0)
    return VisionEncoder({**CONFIG, **changes}).eval()


def tiles(count, side=TILE):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def test_it_returns_the_normalised_patch_tokens_of_the_tower_without_the_class_token():
    module, x = encoder(image_mean=(0.5, 0.25, 0.125), image_std=(0.5, 0.2, 0.1)), tiles(2)
    mean = torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)
    std = torch.tensor([0.5, 0.2, 0.1]).view(3, 1, 1)
    module.tower.output_tokens = True  # open_clip's own way to patch tokens
    _, expected = module.tower((x / 255 - mean) / std)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_patches_are_numbered_row_by_row():
    module, changed = encoder(), tiles(1)
    before = changed.clone()
    changed[0, :, 8:16, 24:32] += 90  # row 1, column 3 of 4 x 4 patches of 8 px
    moved = (module(changed) - module(before)).abs().sum(-1)[0]
    assert moved.argmax() == 7


def test_every_tile_is_encoded_by_itself():
    module, x = encoder(), tiles(3)
    torch.testing.assert_close(module(x)[1], module(x[1:2])[0], rtol=1e-4, atol=1e-5)
    assert module(x).shape == (3, 16, WIDTH)


def test_a_frozen_encoder_drops_nothing_at_random():
    module, x = encoder(patch_dropout=0.5).train(), tiles(2)
    assert module(x).shape != (2, 16, WIDTH), "while it is trained, it does"
    module.requires_grad_(requires_grad=False)
    assert torch.equal(module(x), module(x))
    assert module(x).shape == (2, 16, WIDTH)
    assert module.tower.training, "it is left as it was"


def test_no_tiles_give_no_features():
    assert encoder()(tiles(0)).shape == (0, 16, WIDTH)


def test_every_parameter_takes_part_in_the_patch_features():
    module = encoder().train()
    weights = torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(3))
    (module(tiles(2)) * weights).sum().backward()
    without = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert without == []  # under DDP such parameters leave the other ranks waiting


# --- towers of timm -----------------------------------------------------------------------------------------

TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "none", "image_size": 64}


def timm_encoder(**changes):
    torch.manual_seed(0)
    return VisionEncoder({**TIMM, **changes})


def untrained(module):
    """Names of parameters that the patch features do not depend on."""
    features = module.train()(tiles(2, module.tile_size))
    (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return [name for name, parameter in module.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize(
    "changes",
    [
        {"timm_model_pretrained": False},
        {"timm_pool": "avg", "timm_proj": "linear"},
        {"timm_pool": "token", "timm_proj": "mlp"},
        {"timm_pool": "map"},  # the pooling of SigLIP
    ],
)
def test_a_vit_of_timm_gives_its_patch_tokens_however_it_pools_for_classification(changes):
    module = timm_encoder(**changes)
    assert module(tiles(3, 64)).shape == (3, 16, 192)
    assert (module.num_patches, module.width) == (16, 192)
    assert untrained(module) == []


def test_the_patch_tokens_of_a_timm_vit_are_those_before_its_class_token_is_taken():
    module, x = timm_encoder().eval(), tiles(2, 64)
    expected = module.tower.trunk.forward_features((x - module.mean) / module.std)
    torch.testing.assert_close(module(x), expected[:, 1:], rtol=1e-4, atol=1e-5)


def test_a_timm_tower_with_a_grid_of_its_own_is_as_wide_as_its_last_stage():
    module = timm_encoder(timm_model_name="convnext_atto")
    assert module(tiles(2, 64)).shape == (2, 4, 320)
    assert (module.num_patches, module.width) == (4, 320)
    assert untrained(module) == []


def test_a_timm_tower_can_end_at_one_of_its_stages():
    whole, module = (timm_encoder(timm_model_name="resnet10t", timm_stage=stage).eval() for stage in (-1, 2))
    assert (whole.num_patches, whole.width) == (4, 512)
    assert (module.num_patches, module.width) == (64, 128)
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in whole.parameters()) / 10
    module.load_state_dict(whole.state_dict(), strict=False)
    pixels = (tiles(2, 64) - module.mean) / module.std
    expected = whole.tower.trunk.forward_intermediates(pixels, indices=[2], intermediates_only=True)[0]
    torch.testing.assert_close(module(tiles(2, 64)), expected.flatten(2).mT)
    assert untrained(module) == []


def test_a_stage_that_a_timm_tower_lacks_is_refused():
    with pytest.raises(ValueError, match="timm_stage is 5; expected 0 to 4, or -1 for all stages"):
        timm_encoder(timm_model_name="resnet10t", timm_stage=5)


def test_weights_are_never_fetched(monkeypatch):
    def offline(*_, **__):
        raise AssertionError("the network was asked for weights")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    timm_encoder(timm_model_pretrained=True)


# --- towers of transformers ---------------------------------------------------------------------------------

INTERNVIT = intern_vit()


def test_internvit_drops_the_class_token_and_sees_pixels_with_the_statistics_of_imagenet():
    module, x = VisionEncoder(INTERNVIT).eval(), tiles(2)
    whole = module.tower(pixel_values=(x - module.mean) / module.std).last_hidden_state
    assert whole.shape == (2, 17, WIDTH)
    assert torch.equal(module(x), whole[:, 1:])
    assert untrained(module) == []
    assert module.mean.flatten().tolist() == pytest.approx([0.485 * 255, 0.456 * 255, 0.406 * 255])
    assert module.std.flatten().tolist() == pytest.approx([0.229 * 255, 0.224 * 255, 0.225 * 255])


def test_code_that_a_config_names_never_runs(tmp_path, monkeypatch):
    (tmp_path / "modeling_other.py").write_text("raise SystemExit('executed')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    VisionEncoder({**INTERNVIT, "auto_map": {"AutoModel": f"{tmp_path}--modeling_other.Other"}})


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
        {**CONFIG, "attentional_pool": True, "attn_pooler_heads": 2},
        {**CONFIG, "attentional_pool": "parallel", "attn_pooler_heads": 2},
    ],
    ids=["ResNet", "attentional_pool", "CoCa"],
)
def test_towers_that_pool_their_patches_are_refused(config):
    with pytest.raises(
        ValueError, match="pools its patches \\(ResNet or CoCa\\); take a plain ViT or a timm"
    ):
        VisionEncoder(config)


@pytest.mark.parametrize(
    ("config", "side", "patch"),
    [
        ({**CONFIG, "image_size": 36}, 36, 8),
        ({**TIMM, "image_size": 72}, 72, 16),
        ({**INTERNVIT, "image_size": 36}, 36, 8),
    ],
    ids=["open_clip", "timm", "transformers"],
)
def test_tiles_that_patches_do_not_divide_are_refused(config, side, patch):
    expected = f"tiles of {side} px, which patches of {patch} px do not divide; set image_size to a multiple"
    with pytest.raises(ValueError, match=expected):
        VisionEncoder(config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"timm_model_name": "vit_of_nobody", "image_size": 64}, "Unknown model"),
        ({"image_size": 64, "layers": 1, "patch": 8}, "unexpected keyword argument 'patch'"),
        (
            {"model_type": "siglip_vision_model"},
            "model_type is 'siglip_vision_model'; expected internvl_vision",
        ),
        ({"model_type": "internvl_vision", "hidden_size": "wide"}, "'hidden_size' expected int, got str"),
    ],
)
def test_settings_that_no_tower_has_are_refused_in_a_sentence(config, said):
    with pytest.raises(ValueError, match="vision tower: ") as caught:
        VisionEncoder(config)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
