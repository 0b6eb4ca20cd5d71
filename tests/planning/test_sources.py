import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from tests.support.released import official_config, write_native, write_official
from tests.support.tiny import tiny_spec
from vico_pl.data.collate import MicroBatchLimits
from vico_pl.data.shards.index import INDEX_NAME, ShardEntry, write_entries, write_sidecar
from vico_pl.data.shards.tars import SampleSize
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


@pytest.mark.parametrize(
    ("shape", "vision", "language"),
    [
        ("1b", 304e6, 752e6),
        ("2b", 304e6, 2032e6),
        ("4b", 304e6, 4411e6),
        ("8b", 304e6, 8191e6),
        ("14b", 304e6, 14768e6),
        ("38b", 5538e6, 32762e6),
        ("30b-a3b", 304e6, 30532e6),
    ],
)
def test_released_shapes_have_the_parameters_of_their_names(shape, vision, language):
    source = find_model(ModelConfig(), shape)
    model = build_without_weights(source.spec)
    parts = (model.vision, model.language)
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    assert counts == pytest.approx([vision, language], rel=0.01)
    assert source.dtype == torch.bfloat16


def test_a_released_name_needs_no_folder():
    source = find_model(ModelConfig(path="OpenGVLab/InternVL3_5-8B"))
    assert (source.spec.vision, source.spec.language) == RELEASED["8b"]
    assert "as released" in source.name
    absent = ModelConfig(path="runs/none/model", reference="OpenGVLab/InternVL3_5-2B")
    assert find_model(absent).spec.language == RELEASED["2b"][1]


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        ({"path": "runs/none/model"}, None, r"--shape 1b\|2b"),
        ({"path": "someone/something"}, None, r"--shape 1b\|2b"),
        ({"path": "OpenGVLab/InternVL3_5-9000B"}, None, r"--shape 1b\|2b"),
        ({"path": "anything"}, "9b", "--shape is '9b'; expected one of 1b"),
        ({"vision": {"open_clip": "NoSuchTower"}}, None, "which open_clip does not know"),
        ({"language": {"path": "someone/nothing"}}, None, "its shape is not known here"),
    ],
)
def test_what_is_not_known_is_an_error(model, shape, message):
    with pytest.raises(ValueError, match=message):
        find_model(ModelConfig(**model), shape)


@pytest.mark.parametrize("write", [write_official, write_native])
def test_a_config_alone_gives_the_shape_of_the_whole_folder(tmp_path, write):
    write(tmp_path)
    whole = open_folder(tmp_path).contents.spec
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    spec, _ = read_shape(tmp_path / "config.json")
    ours, theirs = (build_without_weights(each).named_parameters() for each in (spec, whole))
    assert [(name, p.shape) for name, p in ours] == [(name, p.shape) for name, p in theirs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_the_weights_is_read(tmp_path, dtype):
    (tmp_path / "config.json").write_text(json.dumps(official_config()))
    assert read_shape(tmp_path / "config.json")[1] == torch.bfloat16
    save_model(VisionLanguageModel(tiny_spec()).to(dtype), tmp_path)
    spec, found = read_shape(tmp_path / "config.json")
    assert (asdict(spec), found) == (asdict(tiny_spec()), dtype)


@pytest.mark.parametrize("content", ["{}", "no JSON", '{"architectures": ["InternVLChatModel"]}', "[]"])
def test_other_configs_are_errors(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: "):
        read_shape(tmp_path / "config.json")


def test_parts_that_a_recipe_names():
    vision, language = {"open_clip": "ViT-B-16", "image_size": 448}, {"path": "Qwen/Qwen3-0.6B"}
    found = find_model(ModelConfig(vision=vision, language=language, ratios=[4]))
    model = build_without_weights(found.spec)
    assert (model.vision.tile_size, model.language.config.hidden_size) == (448, 1024)


@pytest.mark.parametrize(
    ("limits", "world", "expected"),
    [
        (MicroBatchLimits(max_tiles=9, max_tokens=1000), 1, 4),  # 4 x 2 tiles
        (MicroBatchLimits(max_tiles=99, max_tokens=60), 1, 3),  # 3 x 18 tokens
        (MicroBatchLimits(max_tiles=99, max_tokens=1000), 8, 2),  # the samples of a rank
        (MicroBatchLimits(max_tiles=1, max_tokens=1), 1, 1),  # one sample that exceeds them
    ],
)
def test_micro_batches_keep_to_the_limits(config, limits, world, expected):
    data = replace(config().data, micro_batch=limits, batch_size=16)
    found = largest_micro_batch(data, SAMPLE, tokens_per_tile=4, world=world)
    assert found == MicroBatch(num_samples=expected, tiles=2, text_tokens=10, response_tokens=4)


@pytest.fixture
def samples(config, tmp_path):
    """Read the samples of shards in `tmp_path`, or elsewhere."""
    return lambda path=tmp_path: read_samples(config(data={"sources": [{"path": str(path)}]}).data)


def test_shards_have_their_sizes(samples, tmp_path):
    """Two samples of 1000 x 500 px, of three tiles each, and 20 and 40 tokens of text."""
    write_entries([ShardEntry(name="a.tar", num_samples=2)], tmp_path / INDEX_NAME)
    sizes = [SampleSize(text_tokens=n, num_images=1, width=1000, height=500) for n in (20, 40)]
    write_sidecar(np.array([(0, *sizes[0]), (5, *sizes[1]), (9, 0, 0, 0, 0)]), tmp_path / "a.tar")
    found = samples()
    assert (found.num_samples, found.tiles, found.text_tokens, found.response_tokens) == (2, 3, 30, 15)
    assert found.origin.startswith("mean of 2 samples")


def test_without_sizes_typical_figures_are_assumed(samples, tmp_path):
    write_entries([ShardEntry(name="a.tar", num_samples=9)], tmp_path / INDEX_NAME)
    for found, count in ((samples(), 9), (samples("nowhere"), None)):
        assert (found.num_samples, found.tiles, found.text_tokens) == (count, 5, 200)
        assert "assumed" in found.origin


def test_a_range_of_shards_counts_what_it_names(samples, tmp_path):
    counts = {"train-0.tar": 9, "train-1.tar": 7, "train-2.tar": 5}
    entries = [ShardEntry(name=name, num_samples=count) for name, count in counts.items()]
    write_entries(entries, tmp_path / INDEX_NAME)
    for name in counts:
        (tmp_path / name).touch()
    assert samples(tmp_path / "train-{0..1}.tar").num_samples == 16
    assert samples(tmp_path / "train-[12].tar").num_samples == 12
    assert samples(tmp_path / "train-{0..3}.tar").num_samples is None  # the last is not counted
    assert samples(tmp_path / "other-*.tar").num_samples is None
