import json
import re

import pytest
import torch
from safetensors.torch import save_file

from tests.support.released import TILE, folder_tensors, image_sample, logits_of, qwen_tokenizer, write_native
from vico_pl.model.families.folder import load_model, open_folder

PLACEHOLDER = qwen_tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>")


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A folder that transformers wrote and the model it is of."""
    folder = tmp_path_factory.mktemp("native") / "hf"
    return folder, write_native(folder)


@pytest.fixture
def folder(tmp_path):
    write_native(tmp_path)
    return tmp_path


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def their_logits(model, sample):
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    ids = [i for token in sample.input_ids.tolist() for i in [token] * (4 if token == PLACEHOLDER else 1)]
    pixels = (sample.tiles / 255 - mean) / std if len(sample.tiles) else None
    return model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]


@torch.no_grad()
def test_logits_are_those_of_transformers(native):
    samples = [image_sample(1, images=(3, 1)), image_sample(2, images=()), image_sample(3, images=(2,))]
    ours = logits_of(load_model(native[0]), *samples)
    for mine, one in zip(ours, samples, strict=True):
        torch.testing.assert_close(mine, their_logits(native[1], one), rtol=0, atol=1e-5)


def test_names_of_modules_are_read_like_stored_ones(native, folder):
    named_as_modules = native[1].state_dict()
    assert {name.split(".")[0] for name in named_as_modules} == {"model", "lm_head"}
    save_file(named_as_modules, folder / "model.safetensors")
    expected = load_model(native[0]).state_dict()
    for name, tensor in load_model(folder).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_it_is_a_base_model_that_says_nothing_of_its_system_message(native):
    contents = open_folder(native[0]).contents
    assert (contents.spec.ratios, contents.spec.router_heads, contents.rule) == ([4], None, None)
    assert contents.spec.placeholder_id == PLACEHOLDER
    assert contents.processing["chat"] == {"system": None}


def test_the_tiling_is_that_of_the_image_processor(folder):
    tiling = {"tile_size": TILE, "min_tiles": 1, "max_tiles": 12, "use_thumbnail": True}
    assert open_folder(folder).contents.processing["tiling"] == tiling
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_patches": 2, "max_patches": 6}))
    assert open_folder(folder).contents.processing["tiling"] == tiling | {"min_tiles": 2, "max_tiles": 6}
    # transformers 5 writes it into the whole processor, and reads it from there first.
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {"max_patches": 3}}))
    assert open_folder(folder).contents.processing["tiling"] == tiling | {"max_tiles": 3}
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "InternVLProcessor"}))
    assert open_folder(folder).contents.processing["tiling"] == tiling | {"min_tiles": 2, "max_tiles": 6}


def test_a_head_that_is_not_stored_is_tied(folder):
    edit_config(folder, lambda config: config["text_config"].update(tie_word_embeddings=True))
    tensors = folder_tensors(folder)
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    model = load_model(folder)
    assert model.head is model.language.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config: config.update(downsample_ratio=0.25, vision_feature_layer=-2),
            "downsample_ratio is 0.25; only 0.5 is read; vision_feature_layer is -2; only -1 is read",
        ),
        (
            lambda config: config["text_config"].update(model_type="mistral"),
            "text_config.model_type is 'mistral'; expected one of llama, qwen2, qwen3, qwen3_moe",
        ),
        (lambda config: config.pop("text_config"), "vision_config or text_config is missing"),
        (lambda config: config.pop("vision_config"), "vision_config or text_config is missing"),
        (lambda config: config["vision_config"].update(use_mean_pooling=False), "use_mean_pooling is false"),
        (
            lambda config: config["vision_config"].update(image_size=[56, 112], patch_size=[14, 28]),
            "vision_config.image_size is [56, 112]; tiles and patches must be square; "
            "vision_config.patch_size is [14, 28]; tiles and patches must be square",
        ),
    ],
)
def test_a_configuration_that_we_would_misread_is_refused(folder, change, message):
    edit_config(folder, change)
    with pytest.raises(ValueError, match=re.escape(f"{folder}/config.json: {message}")):
        load_model(folder)
