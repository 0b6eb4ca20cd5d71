"""From a released checkpoint to Flash with the commands alone: 448 px tiles, JPEGs, a Qwen tokenizer."""

import json
import shutil

import pytest
import torch
import yaml

from tests.support.released import (
    LANGUAGE_CONFIG,
    VISION_CONFIG,
    official_config,
    official_shapes,
    write_official,
)
from tests.support.tiny import encoded_image
from vico_pl.data.decode import read_image
from vico_pl.data.tiling import tile_image, tile_sample
from vico_pl.inference.predictor import Predictor
from vico_pl.model.families.base import CALIBRATION_NAME, StoredTensors
from vico_pl.model.router import compress_probability
from vico_pl.types import Sample

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

SIZES = ((448, 448), (900, 440), (448, 1000), (640, 480))  # width, height: 1, 2, 2 and up to 4 tiles
ANSWERS = {"perception": "red", "reasoning": "2", "ocr": "F0"}


@pytest.fixture
def released(tmp_path):
    """A checkpoint of InternVL's layout that sees tiles of 448 px as the real ones do."""
    vision = {**VISION_CONFIG, "image_size": 448, "num_hidden_layers": 1}
    config = official_config(
        vision_config=vision, llm_config=LANGUAGE_CONFIG, force_image_size=448, max_dynamic_patch=4
    )
    write_official(tmp_path / "released", config=config)
    return tmp_path / "released"


@pytest.fixture
def shards(vico, tmp_path):
    """Shards that `vico shards build` makes of JPEG files and LLaVA's annotations."""
    lines = []
    for number, size in enumerate(SIZES):
        (tmp_path / f"{number}.jpg").write_bytes(encoded_image("JPEG", size=size, seed=number))
        turns = []
        for skill, answer in ANSWERS.items():
            mark = "" if turns else "<image>\n"
            turns += [{"from": "human", "value": f"{mark}What {skill}?"}, {"from": "gpt", "value": answer}]
        lines.append({"image": f"{number}.jpg", "conversations": turns})
    annotations = tmp_path / "annotations.jsonl"
    annotations.write_text("\n".join(map(json.dumps, lines)))
    code, *_ = vico(
        "shards", "build", "--annotations", annotations, "--images", tmp_path, "--output", tmp_path / "shards"
    )
    assert code == 0
    return tmp_path / "shards"


@torch.no_grad()
def compress_two_of_three(model, photo):
    """Set the threshold so that a photo's most detailed tile is kept: Flash always keeps at least one."""
    session = Predictor.load(model)
    tiles = tile_image(read_image(photo), session.tiling)
    scores = compress_probability(session.router_logits(session.model.encode_tiles(tiles))).sort().values
    assert len(scores) == 3
    calibration = json.loads((model / CALIBRATION_NAME).read_text())
    calibration["threshold"] = float(scores[:2].mean())
    (model / CALIBRATION_NAME).write_text(json.dumps(calibration))


@torch.no_grad()
def answer_ids(folder, photo):
    """The tokens of a routed answer, and the ratios it was given at."""
    session = Predictor.load(folder)
    sample = tile_sample(Sample(id="x", images=[read_image(photo)], turns=[], metadata={}), session.tiling)
    features = session.encode(sample.tiles)
    ratios = session.choose_ratios(features)
    ids = session.generate_ids(
        [sample], ["What is it?"], features=[features], ratios=[ratios], max_new_tokens=6
    )
    assert sorted(ratios.tolist()) == [4, 16, 16]
    return ids.tolist(), ratios.tolist()


def test_a_released_checkpoint_becomes_a_flash_checkpoint(vico, train, released, shards, tmp_path):
    policy = train("internvl3_5-1b/consistency", f"model.path={released}")
    start = [f"model.path={policy}", f"model.reference={released}"]
    model = train("internvl3_5-1b/router", *start, "router.min_history=1")

    flash, photo, template = tmp_path / "flash", tmp_path / "1.jpg", tmp_path / "template"
    shutil.copytree(released, template)
    (template / "config.json").write_text(json.dumps(official_config(flash=True)))
    assert vico("calibrate", model, "--data", shards, "--budget", "0.8", "--dtype", "stored")[0] == 0
    compress_two_of_three(model, photo)
    assert vico("export", model, flash, "--layout", "flash", "--template", template)[0] == 0

    config = json.loads((flash / "config.json").read_text())
    assert config["flash_mode"] is True
    assert config["auto_map"] == official_config()["auto_map"]
    assert (flash / "modeling_internvl_chat.py").exists()
    assert StoredTensors(flash).names == dict(official_shapes(config, flash=True)).keys()

    assert answer_ids(flash, photo) == answer_ids(model, photo)
    question = ["--prompt", "What is it?", "--max-new-tokens", "6"]
    before, after = (vico("generate", folder, photo, *question) for folder in (model, flash))
    assert before[:2] == after[:2]
    assert before[0] == 0
    assert before[1].strip()
    assert vico("route", flash, photo, "--output", tmp_path / "routed.png")[0] == 0


def test_a_run_takes_tiles_and_prompts_from_the_released_model(train, released):
    model = train("internvl3_5-1b/consistency", f"model.path={released}")
    data = yaml.safe_load((model.parent / "config.yaml").read_text())["data"]
    assert data["tiling"] == {"tile_size": 448, "min_tiles": 1, "max_tiles": 4, "use_thumbnail": True}
    assert "InternVL" in data["chat"]["system"]
