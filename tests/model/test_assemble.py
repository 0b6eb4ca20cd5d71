"""Models put together from pretrained parts, which the tests make themselves."""

import open_clip
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from tests.support.tiny import write_tower
from vico_pl.model.families.folder import load_model, save_model
from vico_pl.model.vlm import assemble_model

NAME = "vico-test-tower"


@pytest.fixture
def clip(tmp_path):
    """A small open_clip model under a name of its own, and the file of its weights."""
    return write_tower(tmp_path, NAME)


def language_config(kind=Qwen2Config, **changes):
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return kind(**settings, num_attention_heads=2, num_key_value_heads=1, **changes)


@pytest.fixture
def language(tmp_path):
    """A folder with a small language model, and the model."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(language_config())
    model.save_pretrained(tmp_path / "language")
    return tmp_path / "language", model


def assembled(vision, language, *, vocab_size=64, ratios=(4,)):
    return assemble_model(
        {"open_clip": NAME, **vision},
        {"path": str(language)},
        ratios=list(ratios),
        vocab_size=vocab_size,
        placeholder_id=5,
    ).eval()


def tiles(size=32):
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)


@torch.no_grad()
def test_both_parts_bring_their_weights(clip, language):
    model = assembled({"pretrained": str(clip[1])}, language[0])
    pixels = (tiles_ := tiles()).float() / 255
    mean, std = (torch.tensor(clip[0].visual.preprocess_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    expected = clip[0].visual.forward_intermediates(
        (pixels - mean) / std, indices=1, normalize_intermediates=True, output_fmt="NLC"
    )["image_intermediates"][-1]
    torch.testing.assert_close(model.encode_tiles(tiles_), expected, atol=1e-5, rtol=1e-5)
    ids = torch.arange(9)[None]
    assert torch.equal(model.language(ids).logits, language[1].eval()(ids).logits)


def test_a_tower_can_be_fitted_to_larger_tiles(clip, language):
    model = assembled({"pretrained": str(clip[1]), "image_size": 64}, language[0])
    assert (model.vision.tile_size, model.vision.num_patches) == (64, 64)
    assert model.encode_tiles(tiles(64)).shape == (2, 64, 32)
    patches = clip[0].visual.conv1.weight
    assert torch.equal(model.vision.tower.conv1.weight, patches)


@torch.no_grad()
def test_the_embeddings_grow_with_the_tokenizer(clip, language):
    model = assembled({}, language[0], vocab_size=70)
    assert model.head.shape == (70, 32)
    ids = torch.arange(9)[None]
    before = language[1].eval()(ids).logits
    torch.testing.assert_close(model.language(ids).logits[..., :64], before, atol=1e-6, rtol=1e-6)


def test_unused_rows_of_the_embeddings_are_kept(clip, language):
    assert assembled({}, language[0], vocab_size=50).head.shape == (64, 32)


@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig])
@torch.no_grad()
def test_an_assembled_model_comes_back_from_its_folder(clip, tmp_path, kind):
    AutoModelForCausalLM.from_config(language_config(kind)).save_pretrained(tmp_path / "any")
    model = assembled({}, tmp_path / "any", vocab_size=70)
    save_model(model, tmp_path / "model")
    restored = load_model(tmp_path / "model", ratios=[4, 16])
    ids, pictures = torch.arange(9)[None], tiles()
    assert torch.equal(restored.language(ids).logits, model.language(ids).logits)
    assert torch.equal(restored.encode_tiles(pictures), model.encode_tiles(pictures))
    assert restored.ratios == [4, 16]


@pytest.mark.parametrize(
    ("vision", "said"),
    [
        (
            {"open_clip": "ViT-of-nobody"},
            "model.vision.open_clip is 'ViT-of-nobody', which open_clip does not know",
        ),
        ({"pretrained": "nowhere.pt"}, "open_clip has no weights 'nowhere.pt'"),
        ({"pretrained": None, "size": 3}, "model.vision has no setting 'size' beside open_clip"),
    ],
)
def test_a_tower_that_cannot_be_had_is_named(clip, language, vision, said):
    with pytest.raises(ValueError, match=said):
        assembled(vision, language[0])


TAGS = {"webli": {"mean": (0.5,) * 3, "std": (0.4,) * 3}}


@pytest.mark.parametrize(
    ("tags", "given", "norm"),
    [
        (TAGS, {}, ([0.5] * 3, [0.4] * 3)),
        (TAGS, {"image_mean": [0.1, 0.2, 0.3]}, ([0.1, 0.2, 0.3], [0.4] * 3)),
        ({}, {"image_std": [0.2] * 3}, (list(open_clip.OPENAI_DATASET_MEAN), [0.2] * 3)),
    ],
)
def test_weights_from_a_file_get_the_pixels_of_the_towers_tags(
    clip, language, monkeypatch, tags, given, norm
):
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, tags)
    vision = assembled({"pretrained": str(clip[1]), **given}, language[0]).spec.vision
    assert (vision["image_mean"], vision["image_std"]) == norm


def test_a_file_for_a_tower_whose_tags_differ_is_warned_of(clip, language, monkeypatch):
    tags = {**TAGS, "openai": {"mean": (0.4,) * 3, "std": (0.4,) * 3}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, tags)
    with pytest.warns(UserWarning, match=f"the tags of {NAME} differ in image_mean and image_std"):
        assembled({"pretrained": str(clip[1])}, language[0])


def test_a_folder_without_a_language_model_is_named(clip, tmp_path):
    with pytest.raises(ValueError, match=f"model.language.path {tmp_path}: no language model to load"):
        assembled({}, tmp_path)
