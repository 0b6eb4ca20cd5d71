import json
import os
import time
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.support.tiny import tiny_model, tiny_spec
from vico_pl.files import read_json
from vico_pl.model.families.base import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from vico_pl.model.families.folder import load_model, open_folder, read_shape, save_model


@pytest.fixture
def folder(tmp_path, model):
    save_model(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("wanted", [{}, {"ratios": [4, 16], "router_heads": 4}], ids=["all", "by name"])
def test_a_model_comes_back_bit_for_bit(folder, model, wanted):
    restored = load_model(folder, **wanted)
    assert restored.spec == model.spec
    assert restored.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor), name
    assert not restored.training


def test_a_model_in_bfloat16_keeps_its_values(tmp_path, model):
    save_model(model.bfloat16(), tmp_path)
    assert torch.equal(load_model(tmp_path).head, model.head.float())


def test_a_head_that_is_tied_to_the_embeddings_comes_back_tied(tmp_path):
    model = tiny_model(language={**tiny_spec().language, "tie_word_embeddings": True})
    save_model(model, tmp_path)
    restored = load_model(tmp_path)
    assert torch.equal(restored.head, model.head)
    assert restored.head is restored.language.get_input_embeddings().weight


def test_connectors_and_a_router_that_the_folder_lacks_begin_fresh(tmp_path):
    save_model(tiny_model(ratios=[4], router_heads=None).bfloat16(), tmp_path)
    stored, grown = load_model(tmp_path), load_model(tmp_path, ratios=[4, 16], router_heads=4, dtype=None)
    assert (stored.ratios, stored.router) == ([4], None)
    assert (grown.ratios, grown.spec.router_heads) == ([4, 16], 4)
    assert {tensor.dtype for tensor in grown.connectors.parameters()} == {torch.bfloat16}
    for name, tensor in stored.state_dict().items():
        assert torch.equal(grown.state_dict()[name].float(), tensor), name


@pytest.mark.parametrize(
    ("start", "ratio", "same"), [("mean", 16, True), ("random", 16, False), ("mean", 9, False)]
)
def test_an_added_connector_starts_from_that_of_full_tokens_if_it_can(tmp_path, start, ratio, same):
    model = tiny_model(ratios=[4], router_heads=None, vision={**tiny_spec().vision, "image_size": 96})
    save_model(model, tmp_path)
    first, second = (
        load_model(tmp_path, ratios=[4, ratio], connector_start=start).connectors.by_ratio[str(ratio)]
        for _ in range(2)
    )
    weights = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights) == same


def test_a_stored_router_keeps_its_number_of_heads(folder):
    # Its tensors fit any number of heads and would give other routes without an error.
    with pytest.raises(ValueError, match="its router has 4 attention heads, not 2"):
        load_model(folder, router_heads=2)


@pytest.mark.parametrize("name", ["connectors.by_ratio.16.mlp.1.weight", "router.gating.gate.1.bias"])
def test_a_part_that_the_folder_claims_to_have_must_be_whole(folder, name):
    weights = load_file(folder / WEIGHTS_NAME)
    del weights[name]
    save_file(weights, folder / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=f"missing {name}"):
        load_model(folder)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_folder_without_weights_or_configuration_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{folder}: no {name}; a model folder holds"):
        load_model(folder)


def test_a_run_folder_and_a_checkpoint_say_where_their_model_is(folder, tmp_path):
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run" / "model")
    with pytest.raises(ValueError, match=f"the folder of a run, whose model is {tmp_path}/run/model"):
        load_model(tmp_path / "run")
    with pytest.raises(ValueError, match=f"'vico export {tmp_path}/run/last.ckpt FOLDER' makes a model"):
        load_model(tmp_path / "run" / "last.ckpt")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"architectures": []}',
        '{"architectures": 3}',
        '{"format": "vico_pl", "ratios": [4]}',
        '{"format": "vico_pl", "x": 1}',
    ],
)
def test_a_configuration_that_is_not_ours_is_named(folder, content):
    (folder / CONFIG_NAME).write_text(content)
    with pytest.raises(ValueError, match=f"{folder}/{CONFIG_NAME}: "):
        open_folder(folder)


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("language", {"hidden_size": 10**8}, "tensors do not fit"),
        ("language", {"hidden_size": -5}, "no such model can be built"),
        ("language", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, but the folder holds"),
        ("vision", {"layers": 10**6}, "layers is 1000000, but the folder holds"),
        ("vision", {"timm_model_name": "hf_hub:some/model"}, "without a source"),
        (None, {"language": []}, r"(?s)config.json: .*language"),
        (None, {"ratios": "ab"}, r"(?s)config.json: .*ratios"),
        (None, {"router_heads": 3}, "router_heads is 3; expected a divisor"),
        (None, {"router_heads": True}, "router_heads is True"),
    ],
)
def test_sizes_that_no_model_has_are_refused_in_a_sentence(folder, part, changes, said):
    config = read_json(folder / CONFIG_NAME)
    (config if part is None else config[part]).update(changes)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        load_model(folder)


def test_deeply_nested_json_and_weights_outside_the_folder_are_refused(folder):
    (folder / INDEX_NAME).write_text('{"weight_map": {"a": "../../x.safetensors"}}')
    with pytest.raises(ValueError, match="names files outside the folder"):
        load_model(folder)
    (folder / CONFIG_NAME).write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"config.json: no JSON"):
        load_model(folder)


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left (os error 28)"), OSError("No space left")]
)
def test_a_full_disk_is_an_error_of_the_system_and_leaves_no_folder_that_looks_complete(
    tmp_path, model, monkeypatch, error
):
    monkeypatch.setattr("vico_pl.model.families.base.save_file", mock.Mock(side_effect=error))
    with pytest.raises(OSError, match="No space left"):
        save_model(model, tmp_path)
    with pytest.raises(ValueError, match="no config"):
        load_model(tmp_path)


def test_what_killed_processes_were_writing_is_removed_once_nothing_changes_it_for_an_hour(tmp_path, model):
    names = (".model.safetensors.7-7.partial", ".config.json.8-8.partial")
    for name, age in zip(names, (4000, 0), strict=True):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    save_model(model, tmp_path)
    assert not (tmp_path / names[0]).exists()
    assert (tmp_path / names[1]).exists(), "another process may be writing it"
    assert load_model(tmp_path)


def test_a_configuration_of_odd_types_is_refused_without_weights_too(tmp_path):
    path = tmp_path / CONFIG_NAME
    config = {"architectures": ["InternVLForConditionalGeneration"], "vision_config": {"image_size": None}}
    path.write_text(json.dumps({**config, "text_config": {"model_type": "qwen3"}}))
    with pytest.raises(ValueError, match=f"{path}: "):
        read_shape(path)
