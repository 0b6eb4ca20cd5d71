import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from tests.helpers import tiny_spec
from tests.released import official_config, write_native, write_official
from vico_pl.data.collate import MicroBatchLimits
from vico_pl.data.shards.index import INDEX_NAME, Contents, ShardEntry, write_entries, write_sidecar
from vico_pl.data.shards.sizes import SampleSize
from vico_pl.model.families.folder import open_folder, read_shape, save_model
from vico_pl.model.flops import build_without_weights
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.planning.sources import (
    RELEASED,
    MicroBatch,
    SampleShape,
    find_model,
    largest_micro_batch,
    read_samples,
)
from vico_pl.stages.settings import ModelConfig

SAMPLE = SampleShape(tiles=2.0, text_tokens=10.0, response_tokens=4.0, num_samples=None, origin="test")
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
    absent = ModelConfig(path="runs/none/model", reference="OpenGVLab/InternVL3_5-2B")
    assert find_model(absent).spec.language == RELEASED["2b"][1]


@pytest.mark.parametrize("path", ["runs/none/model", "someone/something", "OpenGVLab/InternVL3_5-9000B"])
def test_an_unknown_shape_is_an_error(path):
    with pytest.raises(ValueError, match=r"--shape 1b\|2b"):
        find_model(ModelConfig(path=path))


def test_an_unknown_size_is_an_error():
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_the_weights_is_read(tmp_path, dtype):
    (tmp_path / "config.json").write_text(json.dumps(official_config()))
    assert read_shape(tmp_path / "config.json")[1] == torch.bfloat16
    save_model(VisionLanguageModel(tiny_spec()).to(dtype), tmp_path)
    spec, found = read_shape(tmp_path / "config.json")
    assert found == dtype
    assert asdict(spec) == asdict(tiny_spec())


@pytest.mark.parametrize("content", ["{}", "no JSON", '{"architectures": ["InternVLChatModel"]}', "[]"])
def test_other_configs_are_errors(tmp_path, content):
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


@pytest.mark.parametrize(
    ("limits", "batch_size", "world", "expected"),
    [
        (MicroBatchLimits(max_tiles=9, max_tokens=1000), 16, 1, 4),  # 4 x 2 tiles
        (MicroBatchLimits(max_tiles=99, max_tokens=60), 16, 1, 3),  # 3 x 18 tokens
        (MicroBatchLimits(max_tiles=99, max_tokens=1000), 16, 8, 2),  # the samples of a rank
        (MicroBatchLimits(max_tiles=1, max_tokens=1), 16, 1, 1),  # one sample that exceeds them
    ],
)
def test_micro_batches_keep_to_the_limits(config, limits, batch_size, world, expected):
    data = replace(config().data, micro_batch=limits, batch_size=batch_size)
    found = largest_micro_batch(data, SAMPLE, tokens_per_tile=4, world=world)
    assert found == MicroBatch(num_samples=expected, tiles=2, text_tokens=10, response_tokens=4)


def test_shards_have_their_sizes(config, tmp_path):
    """Two samples of 1000 x 500 px, of three tiles each, and 20 and 40 tokens of text."""
    write_entries([ShardEntry(name="a.tar", num_samples=2)], tmp_path / INDEX_NAME)
    sizes = [SampleSize(text_tokens=n, num_images=1, width=1000, height=500) for n in (20, 40)]
    write_sidecar(Contents(np.array([0, 5, 9]), np.array(sizes)), tmp_path / "a.tar")
    found = read_samples(config(data={"sources": [{"path": str(tmp_path)}]}).data)
    assert (found.num_samples, found.tiles, found.text_tokens, found.response_tokens) == (2, 3, 30, 15)
    assert found.origin.startswith("mean of 2 samples")


def test_without_sizes_typical_figures_are_assumed(config, tmp_path):
    write_entries([ShardEntry(name="a.tar", num_samples=9)], tmp_path / INDEX_NAME)
    counted = read_samples(config(data={"sources": [{"path": str(tmp_path)}]}).data)
    unknown = read_samples(config().data)
    assert [(s.num_samples, s.tiles, s.text_tokens) for s in (counted, unknown)] == [
        (9, 5, 200),
        (None, 5, 200),
    ]
    assert all("assumed" in sample.origin for sample in (counted, unknown))


def test_a_range_of_shards_counts_what_it_names(config, tmp_path):
    names = ["train-0.tar", "train-1.tar", "train-2.tar"]
    entries = [ShardEntry(name=name, num_samples=count) for name, count in zip(names, (9, 7, 5), strict=True)]
    write_entries(entries, tmp_path / INDEX_NAME)
    for name in names:
        (tmp_path / name).touch()

    def count(named):
        return read_samples(config(data={"sources": [{"path": f"{tmp_path}/{named}"}]}).data).num_samples

    assert count("train-{0..1}.tar") == 16
    assert count("train-[12].tar") == 12
    assert count("train-{0..3}.tar") is None  # the last is not counted
    assert count("other-*.tar") is None
