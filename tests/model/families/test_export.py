import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, InternVLForConditionalGeneration

from tests.support.released import (
    LANGUAGE_CONFIG,
    MIXTURE,
    folder_tensors,
    official_config,
    official_shapes,
    official_tensors,
    qwen_tokenizer,
    write_native,
    write_official,
)
from vico_pl.files import read_json
from vico_pl.model.families.base import CALIBRATION_NAME
from vico_pl.model.families.folder import export, load_model, open_folder, save_model
from vico_pl.model.router import RoutingRule
from vico_pl.model.vlm import VisionLanguageModel

pytestmark = pytest.mark.filterwarnings("ignore:the folder will have no remote code")
ROUTING = ("mlp2.", "pooling_before_gating.", "gating.")
LANGUAGES = {"qwen3": LANGUAGE_CONFIG, "qwen3_moe": {**LANGUAGE_CONFIG, **MIXTURE}}


@pytest.fixture
def flash(tmp_path):
    write_official(tmp_path / "flash", flash=True)
    return tmp_path / "flash"


def config_of(folder):
    return read_json(folder / "config.json")


def without(config, *names):
    return {key: value for key, value in config.items() if key not in names}


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def calibrate(folder, **record):
    (folder / CALIBRATION_NAME).write_text(json.dumps({"threshold": 0.7, "curve": [{"x": 1}], **record}))


# --- tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_comes_through_all_layouts_bit_for_bit(tmp_path, dtype, language):
    config = official_config(flash=True, llm_config=LANGUAGES[language])
    original = write_official(tmp_path / "0", flash=True, dtype=dtype, config=config)
    for number, layout in enumerate(("ours", "flash", "ours")):
        export(tmp_path / str(number), tmp_path / str(number + 1), layout=layout)
    assert_same_tensors(folder_tensors(tmp_path / "2"), original)
    assert_same_tensors(folder_tensors(tmp_path / "3"), folder_tensors(tmp_path / "1"))

    export(tmp_path / "3", tmp_path / "4", layout="hf")
    with pytest.warns(UserWarning, match="system message None"):  # which the layout hf does not say
        export(tmp_path / "4", tmp_path / "5", layout="internvl")
    base = {name: tensor for name, tensor in original.items() if not name.startswith(ROUTING)}
    assert_same_tensors(folder_tensors(tmp_path / "5"), base)


def test_a_flash_folder_holds_the_official_tensors_and_no_remote_code(tmp_path, flash):
    export(flash, tmp_path / "out", layout="flash")
    shapes = {name: tuple(tensor.shape) for name, tensor in folder_tensors(tmp_path / "out").items()}
    assert shapes == dict(official_shapes(official_config(), flash=True))
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert "auto_map" not in config_of(tmp_path / "out")


@pytest.mark.parametrize("layout", ["internvl", "hf"])
def test_a_base_export_says_nothing_of_routing(tmp_path, flash, layout):
    calibrate(flash)
    export(flash, tmp_path / "out", layout=layout)
    assert not [key for key in config_of(tmp_path / "out") if "flash" in key]
    assert not [name for name in folder_tensors(tmp_path / "out") if name.startswith(ROUTING)]
    assert not (tmp_path / "out" / CALIBRATION_NAME).exists()
    assert open_folder(tmp_path / "out").contents.spec.ratios == [4]


def test_a_tied_head_is_stored_once(tmp_path):
    config = official_config(llm_config={**LANGUAGE_CONFIG, "tie_word_embeddings": True})
    original = official_tensors(config)
    head = {"language_model.lm_head.weight": original["language_model.model.embed_tokens.weight"].clone()}
    write_official(tmp_path / "in", config=config, tensors={**original, **head})
    export(tmp_path / "in", tmp_path / "out", layout="internvl")
    assert_same_tensors(folder_tensors(tmp_path / "out"), original)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True


def test_another_type_casts_every_tensor_and_is_reported(tmp_path, flash):
    export(flash, tmp_path / "out", layout="flash", dtype=torch.bfloat16)
    expected = {name: tensor.bfloat16() for name, tensor in folder_tensors(flash).items()}
    assert_same_tensors(folder_tensors(tmp_path / "out"), expected)
    config = config_of(tmp_path / "out")
    for part in (config, config["llm_config"], config["vision_config"]):
        assert part["torch_dtype"] == "bfloat16"


def test_without_another_type_that_of_the_weights_is_reported(tmp_path):
    write_official(tmp_path / "in", dtype=torch.float16)
    assert config_of(tmp_path / "in")["torch_dtype"] == "bfloat16"  # the configuration may be mistaken
    export(tmp_path / "in", tmp_path / "out", layout="hf")
    config = config_of(tmp_path / "out")
    assert (config["torch_dtype"], config["dtype"], config["text_config"]["dtype"]) == ("float16",) * 3


@torch.no_grad()
@pytest.mark.parametrize("language", LANGUAGES)
def test_transformers_reads_an_hf_export_to_the_same_model(tmp_path, language):
    write_official(tmp_path / "in", flash=True, config=official_config(llm_config=LANGUAGES[language]))
    export(tmp_path / "in", tmp_path / "hf", layout="hf")
    folder, reader = tmp_path / "hf", InternVLForConditionalGeneration
    theirs, report = reader.from_pretrained(folder, output_loading_info=True)
    assert {name: list(found) for name, found in report.items() if found} == {}
    expected = load_model(tmp_path / "in")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    ours = expected.language(input_ids=ids).logits
    torch.testing.assert_close(theirs.eval()(input_ids=ids).logits, ours, rtol=0, atol=1e-5)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    vision_tokens = expected.connectors.by_ratio["4"](expected.vision._patch_features(pixels))
    their_tokens = theirs.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(their_tokens, vision_tokens, rtol=0, atol=2e-5)


def test_an_export_of_what_transformers_wrote_is_what_transformers_writes(tmp_path):
    write_native(tmp_path / "in")
    export(tmp_path / "in", tmp_path / "out", layout="hf")
    assert_same_tensors(folder_tensors(tmp_path / "out"), folder_tensors(tmp_path / "in"))
    before, after = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("in", "out"))
    assert without(after, "_name_or_path") == without(before, "_name_or_path")


# --- configuration ------------------------------------------------------------------------------------------


def test_a_flash_configuration_keeps_tiling_template_and_thresholds(tmp_path, flash):
    export(flash, tmp_path / "ours", layout="ours")
    assert open_folder(tmp_path / "ours").contents == open_folder(flash).contents
    export(tmp_path / "ours", tmp_path / "back", layout="flash")
    before, after = config_of(flash), config_of(tmp_path / "back")
    stored_elsewhere = ("auto_map", "torch_dtype", "vision_config", "llm_config")
    assert without(after, *stored_elsewhere) == without(before, *stored_elsewhere)
    assert after["llm_config"].items() >= without(LANGUAGE_CONFIG, "torch_dtype").items()
    of_training = ("use_flash_attn", "drop_path_rate")
    assert after["vision_config"].items() >= without(before["vision_config"], *of_training).items()


def test_a_calibration_goes_before_the_thresholds_of_the_configuration(tmp_path, flash):
    assert open_folder(flash).contents.rule == RoutingRule(threshold=0.45, relative_threshold=0.25)
    calibrate(flash)
    assert open_folder(flash).contents.rule == RoutingRule(threshold=0.7)
    export(flash, tmp_path / "flash-again", layout="flash")
    config = config_of(tmp_path / "flash-again")
    assert (config["flash_absolute_threshold"], config["flash_relative_threshold"]) == (0.7, 0.0)
    calibrate(flash, relative_threshold=0.1)
    assert open_folder(flash).contents.rule == RoutingRule(threshold=0.7, relative_threshold=0.1)
    export(flash, tmp_path / "out", layout="ours")  # with its curve
    assert (tmp_path / "out" / CALIBRATION_NAME).read_bytes() == (flash / CALIBRATION_NAME).read_bytes()


def test_the_image_processor_of_an_hf_export_is_read_by_transformers(tmp_path, flash):
    export(flash, tmp_path / "out", layout="hf")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (processor.min_patches, processor.max_patches, processor.crop_to_patches) == (1, 4, True)
    assert (processor.size.height, tuple(processor.image_mean)) == (56, (0.485, 0.456, 0.406))


SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "scaled": {**SCALED, "rope_theta": 5_000_000.0},
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("layout", "part"), [("flash", "llm_config"), ("hf", "text_config")])
def test_the_rope_of_transformers_5_is_also_written_for_version_4(tmp_path, rope, layout, part):
    flash_folder(tmp_path / "in", rope_parameters=ROPES[rope])
    export(tmp_path / "in", tmp_path / "out", layout=layout)
    language = config_of(tmp_path / "out")[part]
    assert language["rope_theta"] == ROPES[rope]["rope_theta"]
    assert language["rope_scaling"] == (None if rope == "default" else SCALED)

    read_back = AutoConfig.for_model(**language).rope_parameters
    expected = load_model(tmp_path / "in").language.config.rope_parameters
    assert read_back == expected
    assert expected.items() >= ROPES[rope].items()
    assert AutoConfig.for_model(**without(language, "rope_parameters")).rope_parameters == expected
    assert load_model(tmp_path / "out").language.config.rope_parameters == expected


def flash_folder(folder, **language):
    """A model of ours that can become Flash, its language configuration as transformers 5 writes it."""
    common = without(LANGUAGE_CONFIG, "rope_theta", "rope_scaling", "torch_dtype", "transformers_version")
    write_official(folder / "released", flash=True)
    contents = open_folder(folder / "released").contents
    spec = replace(contents.spec, language={**common, **language})
    save_model(VisionLanguageModel(spec), folder, processing=contents.processing)
    qwen_tokenizer().save_pretrained(folder)
    calibrate(folder)
