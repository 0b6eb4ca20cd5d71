"""What an export refuses, warns of and copies."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import tiny_model
from tests.released import (
    VISION_CONFIG,
    folder_tensors,
    official_config,
    official_tensors,
    qwen_tokenizer,
    write_native,
    write_official,
)
from vico_pl.model.families.base import CALIBRATION_NAME, PROCESSING_NAME
from vico_pl.model.families.folder import LAYOUTS, export, load_model, open_folder, save_model

INTERNVIT = {
    "model_type": "internvl_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 14,
}


@pytest.fixture
def flash(tmp_path):
    write_official(tmp_path / "released", flash=True)
    return tmp_path / "released"


@pytest.fixture
def ours(tmp_path, flash):
    """A calibrated model in our layout that fits Flash."""
    export(flash, tmp_path / "ours", layout="ours")
    return tmp_path / "ours"


def own_folder(folder, **spec):
    """A calibrated model of ours."""
    save_model(tiny_model(**spec), folder)
    qwen_tokenizer().save_pretrained(folder)
    (folder / CALIBRATION_NAME).write_text('{"threshold": 0.5}')
    return folder


def assert_refused(source, output, message, **options):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        export(source, output, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert not output.exists()


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"vision": INTERNVIT, "ratios": [4, 16, 64], "router_heads": 16},
            "Flash has the ratios [4, 16], the model [4, 16, 64]; export with --layout ours",
        ),
        ({"vision": INTERNVIT, "ratios": [4]}, "Flash has the ratios [4, 16], the model [4]"),
        (
            {"vision": INTERNVIT, "router_heads": None},
            "router_heads of the model is None; Flash needs 16",
        ),
        (
            {"vision": INTERNVIT, "router_heads": 4},
            "router_heads of the model is 4; Flash needs 16",
        ),
    ],
)
def test_flash_cannot_hold_every_model(tmp_path, spec, message):
    assert_refused(own_folder(tmp_path / "in", **spec), tmp_path / "out", message, layout="flash")


def test_flash_wants_a_calibrated_model(tmp_path, ours):
    (ours / CALIBRATION_NAME).unlink()
    assert_refused(ours, tmp_path / "out", "run 'vico calibrate' first", layout="flash")


@pytest.mark.parametrize("layout", ["internvl", "flash", "hf"])
def test_a_tower_of_open_clip_fits_no_layout_of_internvl(tmp_path, layout):
    folder = own_folder(tmp_path / "in")
    assert_refused(folder, tmp_path / "out", "this model's tower is of open_clip", layout=layout)


def test_a_layout_that_is_not_known_is_refused_with_those_that_are(tmp_path, flash):
    assert tuple(LAYOUTS) == ("ours", "flash", "internvl", "hf")
    expected = "layout is 'gguf'; expected one of ours, flash, internvl, hf"
    assert_refused(flash, tmp_path / "out", expected, layout="gguf")


def test_a_folder_that_holds_something_is_left_alone(tmp_path, flash):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"{tmp_path}/out: not empty; name a new folder"):
        export(flash, tmp_path / "out", layout="ours")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_template_without_configuration_is_refused(tmp_path, flash):
    (tmp_path / "template").mkdir()
    message = f"{tmp_path}/template: no config.json; --template takes a released model folder"
    assert_refused(flash, tmp_path / "out", message, layout="flash", template=tmp_path / "template")


def test_tensors_that_do_not_fit_are_told_before_anything_is_written(tmp_path):
    tensors = official_tensors(official_config(), flash=True)
    del tensors["mlp1.3.bias"], tensors["gating.gate.1.bias"]
    write_official(tmp_path / "in", flash=True, tensors=tensors)
    message = "2 tensors do not fit: missing gating.gate.1.bias; missing mlp1.3.bias"
    assert_refused(tmp_path / "in", tmp_path / "out", message, layout="internvl")  # which has no gating


def test_tiles_that_do_not_divide_are_told_with_the_folder(tmp_path):
    vision = {**VISION_CONFIG, "image_size": 42}
    config = official_config(vision_config=vision, force_image_size=42)
    write_official(tmp_path / "in", config=config)
    message = f"{tmp_path}/in: tiles of 42 px are 3 x 3 patches"
    assert_refused(tmp_path / "in", tmp_path / "out", message, layout="ours")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_counts_as_complete_only_with_its_weights(tmp_path, ours, layout, monkeypatch):
    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("vico_pl.model.families.tensors.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export(ours, tmp_path / "out", layout=layout)
    with pytest.raises(ValueError, match="no config"):
        open_folder(tmp_path / "out")


# --- the system message -------------------------------------------------------------------------------------


def change_system_message(folder, message):
    processing = json.loads((folder / PROCESSING_NAME).read_text())
    processing["chat"]["system"] = message
    (folder / PROCESSING_NAME).write_text(json.dumps(processing))


@pytest.mark.parametrize("layout", ["flash", "internvl"])
def test_another_system_message_than_released_code_sends_is_warned_of(tmp_path, ours, layout):
    change_system_message(ours, "Answer briefly.")
    with pytest.warns(
        UserWarning, match=r"'Answer briefly\.', released code will send that of 'internvl2_5'"
    ):
        export(ours, tmp_path / "out", layout=layout)
    assert json.loads((tmp_path / "out/config.json").read_text())["template"] == "internvl2_5"


def test_a_model_that_does_not_say_its_system_message_is_warned_of(tmp_path, ours):
    (ours / PROCESSING_NAME).unlink()
    with pytest.warns(UserWarning, match="the system message None"):
        export(ours, tmp_path / "out", layout="flash")


def test_ours_keeps_any_system_message(tmp_path, ours):
    change_system_message(ours, "Answer briefly.")
    export(ours, tmp_path / "out", layout="ours")  # a warning would fail the test
    assert open_folder(tmp_path / "out").contents.processing["chat"] == {"system": "Answer briefly."}


# --- what goes along ----------------------------------------------------------------------------------------


@pytest.fixture
def template(tmp_path):
    """A released folder of another model."""
    folder = tmp_path / "template"
    write_official(folder, flash=True, seed=9, config=official_config(flash=True, max_dynamic_patch=9))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"weights")
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("")
    return folder


def test_remote_code_and_tokenizer_of_a_template_go_along(tmp_path, flash, template):
    export(flash, tmp_path / "out", layout="flash", template=template)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "modeling_internvl_chat.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_weights_and_configuration_of_a_template_stay_behind(tmp_path, flash, template):
    export(flash, tmp_path / "out", layout="flash", template=template)
    written, expected = folder_tensors(tmp_path / "out"), folder_tensors(flash)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["max_dynamic_patch"] == 4
    assert config["auto_map"] == official_config()["auto_map"]


def test_without_a_template_no_remote_code_is_named_or_copied(tmp_path, flash):
    export(flash, tmp_path / "out", layout="flash")
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())
    assert not list((tmp_path / "out").glob("*.py"))


def test_a_template_names_no_remote_code_in_our_layout(tmp_path, flash, template):
    export(flash, tmp_path / "out", layout="ours", template=template)
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())
    assert load_model(tmp_path / "out").spec == load_model(flash).spec


def test_shards_are_put_together(tmp_path, flash):
    tensors = folder_tensors(flash)
    names = sorted(tensors)
    (flash / "model.safetensors").unlink()
    weight_map = {}
    for part, chosen in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in chosen}, flash / part)
        weight_map |= dict.fromkeys(chosen, part)
    (flash / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    export(flash, tmp_path / "out", layout="flash")
    written = folder_tensors(tmp_path / "out")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in names)


def test_a_template_of_another_family_is_refused(tmp_path, flash, template):
    path = template / "tokenizer.json"
    content = json.loads(path.read_text())
    (context,) = [token for token in content["added_tokens"] if token["content"] == "<IMG_CONTEXT>"]
    context["id"] += 100
    path.write_text(json.dumps(content))
    message = "take the template of the same family"
    assert_refused(flash, tmp_path / "out", message, layout="flash", template=template)


@pytest.mark.parametrize("layout", ["internvl", "hf"])
def test_a_language_model_without_a_released_name_fits_no_layout_of_internvl(tmp_path, layout):
    language = {"model_type": "gpt_neox", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48}
    language |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    folder = own_folder(tmp_path / "in", vision=INTERNVIT, language=language)
    assert_refused(folder, tmp_path / "out", "this one is gpt_neox", layout=layout)


def test_a_server_is_told_the_class_of_the_language_model(tmp_path):
    write_native(tmp_path / "native")
    config = json.loads((tmp_path / "native/config.json").read_text())
    del config["text_config"]["architectures"]
    (tmp_path / "native/config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="system message"):
        export(tmp_path / "native", tmp_path / "out", layout="internvl")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["llm_config"]["architectures"] == ["Qwen3ForCausalLM"]
