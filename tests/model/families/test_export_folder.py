"""What an export refuses, warns of and copies."""

import json
import os
import re
from unittest import mock

import pytest
import torch

from tests.support.released import (
    folder_tensors,
    official_config,
    official_tensors,
    write_native,
    write_official,
)
from tests.support.tiny import intern_vit, tiny_model, tiny_spec
from vico_pl.files import read_json
from vico_pl.model.families.base import CALIBRATION_NAME, CONFIG_NAME, PROCESSING_NAME
from vico_pl.model.families.folder import LAYOUTS, export, load_model, open_folder, save_model

pytestmark = pytest.mark.filterwarnings("ignore:the folder will have no remote code")
INTERNVIT = intern_vit(image_size=112, patch_size=14)
GPT = {"model_type": "gpt_neox", "num_attention_heads": 2, "num_hidden_layers": 1}
GPT |= {key: tiny_spec().language[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}


@pytest.fixture
def flash(tmp_path):
    write_official(tmp_path / "released", flash=True)
    return tmp_path / "released"


@pytest.fixture
def ours(tmp_path, flash):
    """A calibrated model in our layout that fits Flash."""
    export(flash, tmp_path / "ours", layout="ours")
    return tmp_path / "ours"


def assert_refused(source, output, message, **options):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        export(source, output, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert not output.exists()


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layouts", "spec", "message"),
    [
        (["flash"], {"ratios": [4, 16, 64], "router_heads": 16}, "[4, 16], the model [4, 16, 64]"),
        (["flash"], {"ratios": [4]}, "the model [4]; export with --layout ours"),
        (["flash"], {"router_heads": None}, "router_heads of the model is None; Flash needs 16"),
        (["flash"], {"router_heads": 4}, "router_heads of the model is 4; Flash needs 16"),
        (["internvl", "hf"], {"language": GPT}, "this one is gpt_neox"),
        (["internvl", "flash", "hf"], {"vision": tiny_spec().vision}, "this model's tower is of open_clip"),
    ],
)
def test_a_model_that_a_layout_cannot_hold_is_refused(tmp_path, layouts, spec, message):
    save_model(tiny_model(**{"vision": INTERNVIT, **spec}), tmp_path / "in")
    for layout in layouts:
        assert_refused(tmp_path / "in", tmp_path / "out", message, layout=layout)


def test_an_unknown_layout_is_refused_and_flash_wants_a_calibrated_model(tmp_path, ours):
    expected = "layout is 'gguf'; expected one of ours, flash, internvl, hf"
    assert_refused(ours, tmp_path / "out", expected, layout="gguf")
    (ours / CALIBRATION_NAME).unlink()
    assert_refused(ours, tmp_path / "out", "run 'vico calibrate' first", layout="flash")


def test_a_folder_that_holds_something_is_left_alone(tmp_path, flash):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"{tmp_path}/out: not empty; name a new folder"):
        export(flash, tmp_path / "out", layout="ours")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_tensors_that_do_not_fit_are_reported_before_anything_is_written(tmp_path):
    tensors = official_tensors(official_config(), flash=True)
    del tensors["mlp1.3.bias"], tensors["gating.gate.1.bias"]
    write_official(tmp_path / "in", flash=True, tensors=tensors)
    message = "2 tensors do not fit: missing gating.gate.1.bias; missing mlp1.3.bias"
    assert_refused(tmp_path / "in", tmp_path / "out", message, layout="internvl")  # which has no gating


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_counts_as_complete_only_with_its_weights(tmp_path, ours, layout, monkeypatch):
    full_disk = mock.Mock(side_effect=OSError("No space left on device"))
    monkeypatch.setattr("vico_pl.model.families.base.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export(ours, tmp_path / "out", layout=layout)
    with pytest.raises(ValueError, match="no config"):
        open_folder(tmp_path / "out")


# --- the system message -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["flash", "internvl"])
@pytest.mark.parametrize(
    ("chat", "message"), [({"system": "Answer briefly."}, "'Answer briefly.'"), ({}, None)]
)
def test_another_system_message_than_released_code_sends_is_warned_of(tmp_path, ours, layout, chat, message):
    (ours / PROCESSING_NAME).write_text(json.dumps({"chat": chat}))
    expected = f"the system message {message}, released code will send that of 'internvl2_5'"
    with pytest.warns(UserWarning, match=re.escape(expected)):
        export(ours, tmp_path / "out", layout=layout)
    assert read_json(tmp_path / "out" / CONFIG_NAME)["template"] == "internvl2_5"


def test_ours_keeps_any_system_message(tmp_path, ours):
    (ours / PROCESSING_NAME).write_text('{"chat": {"system": "Answer briefly."}}')
    export(ours, tmp_path / "out", layout="ours")  # a warning would fail the test
    assert open_folder(tmp_path / "out").contents.processing == {"chat": {"system": "Answer briefly."}}


# --- what goes along ----------------------------------------------------------------------------------------


@pytest.fixture
def template(tmp_path):
    """A released folder of another model."""
    folder = tmp_path / "template"
    write_official(folder, flash=True, seed=9, config=official_config(flash=True, max_dynamic_patch=9))
    (folder / ".git").mkdir()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    for name in ("chat_template.jinja", ".git/config"):
        (folder / name).write_text("")
    return folder


def test_remote_code_and_tokenizer_of_a_template_go_along_but_not_its_model(tmp_path, flash, template):
    export(flash, tmp_path / "out", layout="flash", template=template)
    names = ["chat_template.jinja", CONFIG_NAME, "model.safetensors", "modeling_internvl_chat.py"]
    names += ["tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    written, expected = folder_tensors(tmp_path / "out"), folder_tensors(flash)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    config = read_json(tmp_path / "out" / CONFIG_NAME)
    assert config["max_dynamic_patch"] == 4
    assert config["auto_map"] == official_config()["auto_map"]


def test_a_template_names_no_remote_code_in_our_layout(tmp_path, flash, template):
    export(flash, tmp_path / "out", layout="ours", template=template)
    assert "auto_map" not in read_json(tmp_path / "out" / CONFIG_NAME)
    assert load_model(tmp_path / "out").spec == load_model(flash).spec


def test_a_template_of_another_family_or_without_configuration_is_refused(tmp_path, flash, template):
    tokenizer = read_json(template / "tokenizer.json")
    (context,) = [token for token in tokenizer["added_tokens"] if token["content"] == "<IMG_CONTEXT>"]
    context["id"] += 100
    (template / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = "take the template of the same family"
    assert_refused(flash, tmp_path / "out", message, layout="flash", template=template)
    (template / CONFIG_NAME).unlink()
    message = f"{template}: no config.json; --template takes a released model folder"
    assert_refused(flash, tmp_path / "out", message, layout="flash", template=template)


def test_only_code_and_tokenizer_of_a_template_go_along(tmp_path, flash, ours, template):
    (template / CALIBRATION_NAME).write_text('{"threshold": 0.9}')
    (template / "report").mkdir()
    (template / "report/report.html").write_text("private")
    export(ours, tmp_path / "out", layout="flash", template=template)
    assert open_folder(tmp_path / "out").contents.rule.threshold == 0.45
    assert not (tmp_path / "out/report").exists()


@pytest.mark.parametrize("kind", ["link", "device", "pipe"])
def test_no_file_from_elsewhere_is_copied(tmp_path, flash, template, kind):
    (tmp_path / "secret").write_text("private")
    path = template / "more.py"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"link": tmp_path / "secret", "device": "/dev/zero"}[kind])
    message = f"{path}: expected a plain file, or a link to one in there"
    assert_refused(flash, tmp_path / "out", message, layout="flash", template=template)


def test_a_template_in_the_cache_of_the_hub_is_copied_through_its_links(tmp_path, flash, template):
    snapshot, blob = tmp_path / "cache/snapshots/abc", tmp_path / "cache/blobs/1"
    for folder in (snapshot.parent, blob.parent):
        folder.mkdir(parents=True)
    template.rename(snapshot)
    (snapshot / "modeling_internvl_chat.py").rename(blob)
    (snapshot / "modeling_internvl_chat.py").symlink_to(blob)
    export(flash, tmp_path / "out", layout="flash", template=snapshot)
    assert not (tmp_path / "out/modeling_internvl_chat.py").is_symlink()


def test_a_template_of_another_layout_is_refused(tmp_path, flash, template):
    write_official(tmp_path / "base")
    write_native(tmp_path / "native")
    cases = (("base", "flash", "internvl"), ("native", "flash", "hf"), ("template", "hf", "flash"))
    for folder, layout, kind in cases:
        message = f"{tmp_path}/{folder}: its layout is {kind}; expected a template in the layout {layout}"
        assert_refused(flash, tmp_path / "out", message, layout=layout, template=tmp_path / folder)


@pytest.mark.filterwarnings("default")
def test_an_export_without_code_says_what_to_give(tmp_path, flash, template):
    with pytest.warns(UserWarning, match="no remote code, .* give --template the released model"):
        export(flash, tmp_path / "out", layout="flash")
    (template / "modeling_internvl_chat.py").unlink()
    with pytest.warns(UserWarning, match="no remote code"):
        export(flash, tmp_path / "out2", layout="flash", template=template)


def test_an_export_of_a_router_without_threshold_is_warned_of(tmp_path, ours):
    (ours / CALIBRATION_NAME).unlink()
    with pytest.warns(UserWarning, match="its router has no threshold, .* run 'vico calibrate' first"):
        export(ours, tmp_path / "out", layout="ours")


def test_a_server_is_reported_the_class_of_the_language_model(tmp_path):
    write_native(tmp_path / "native")
    config = read_json(tmp_path / "native" / CONFIG_NAME)
    del config["text_config"]["architectures"]
    (tmp_path / "native" / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="system message"):
        export(tmp_path / "native", tmp_path / "out", layout="internvl")
    assert read_json(tmp_path / "out" / CONFIG_NAME)["llm_config"]["architectures"] == ["Qwen3ForCausalLM"]
