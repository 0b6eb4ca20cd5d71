import json
from dataclasses import asdict

import pytest
import torch

from tests.helpers import tiny_spec
from tests.released import official_config, write_native, write_official
from vico_pl.model.families.folder import open_folder, save_model
from vico_pl.model.families.shape import read_shape
from vico_pl.model.flops import build_without_weights
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.planning.sources import RELEASED, find_model
from vico_pl.stages.settings import ModelConfig

MILLION = 1e6


def num_parameters(part):
    return sum(parameter.numel() for parameter in part.parameters())


@pytest.mark.parametrize(
    ("shape", "vision", "language"),
    [
        ("1b", 304, 752),
        ("2b", 304, 2032),
        ("4b", 304, 4411),
        ("8b", 304, 8191),
        ("14b", 304, 14768),
        ("38b", 5538, 32762),
        ("30b-a3b", 304, 30532),
    ],
)
def test_released_shapes_have_the_parameters_of_their_names(shape, vision, language):
    source = find_model(ModelConfig(), shape)
    model = build_without_weights(source.spec)
    assert num_parameters(model.vision) / MILLION == pytest.approx(vision, rel=0.01)
    assert num_parameters(model.language) / MILLION == pytest.approx(language, rel=0.01)
    assert source.dtype == torch.bfloat16


def test_a_released_name_needs_no_folder():
    source = find_model(ModelConfig(path="OpenGVLab/InternVL3_5-8B"))
    assert (source.spec.vision, source.spec.language) == RELEASED["8b"]
    assert "as released" in source.name


def test_a_folder_that_is_not_there_yet_has_the_shape_of_its_reference():
    config = ModelConfig(path="runs/none/model", reference="OpenGVLab/InternVL3_5-2B")
    assert find_model(config).spec.language == RELEASED["2b"][1]


@pytest.mark.parametrize("path", ["runs/none/model", "someone/something", "OpenGVLab/InternVL3_5-9000B"])
def test_a_shape_that_nothing_here_knows_is_told(path):
    with pytest.raises(ValueError, match=r"--shape 1b\|2b"):
        find_model(ModelConfig(path=path))


def test_an_unknown_size_is_told():
    with pytest.raises(ValueError, match="--shape is '9b'; expected one of 1b"):
        find_model(ModelConfig(path="anything"), "9b")


@pytest.mark.parametrize("write", [write_official, write_native])
def test_a_config_alone_gives_the_shape_of_the_whole_folder(tmp_path, write):
    write(tmp_path / "whole")
    whole = open_folder(tmp_path / "whole").contents.spec
    (tmp_path / "bare").mkdir()
    (tmp_path / "whole" / "config.json").rename(tmp_path / "bare" / "config.json")
    spec, _ = read_shape(tmp_path / "bare" / "config.json")
    shapes = [
        {name: p.shape for name, p in build_without_weights(s).named_parameters()} for s in (spec, whole)
    ]
    assert shapes[0] == shapes[1]


def test_the_type_of_the_weights_is_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(official_config()))
    assert read_shape(tmp_path / "config.json")[1] == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_folders_tell_the_type_by_their_weights(tmp_path, dtype):
    save_model(VisionLanguageModel(tiny_spec()).to(dtype), tmp_path)
    spec, found = read_shape(tmp_path / "config.json")
    assert found == dtype
    assert asdict(spec) == asdict(tiny_spec())


@pytest.mark.parametrize("content", ["{}", "no JSON", '{"architectures": ["InternVLChatModel"]}', "[]"])
def test_other_configs_are_told(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: "):
        read_shape(tmp_path / "config.json")


def test_parts_that_a_recipe_names(tmp_path):
    config = ModelConfig(
        vision={"open_clip": "ViT-B-16", "image_size": 448}, language={"path": "Qwen/Qwen3-0.6B"}, ratios=[4]
    )
    model = build_without_weights(find_model(config).spec)
    assert model.vision.tile_size == 448
    assert model.language.config.hidden_size == 1024


@pytest.mark.parametrize(
    ("vision", "language", "message"),
    [
        ({"open_clip": "NoSuchTower"}, {}, "which open_clip does not know"),
        ({}, {"path": "someone/nothing"}, "its shape is not known here"),
    ],
)
def test_parts_that_are_not_known(vision, language, message):
    with pytest.raises(ValueError, match=message):
        find_model(ModelConfig(vision=vision, language=language))
