"""Running the `vico` command, and the folders that it works on."""

import shutil
import sys

import numpy as np
import pytest
import yaml

import vico_pl.cli
from tests.support.folders import answered_records, router_probabilities, write_model_folder, write_set
from tests.support.tiny import TILE, encoded_image
from vico_pl.files import write_json
from vico_pl.inference.predictor import Predictor
from vico_pl.model.families.base import CALIBRATION_NAME

TWO_STEPS = [
    "data.batch_size=2",
    "data.num_workers=0",
    "optim.warmup_steps=0",
    "trainer.max_steps=2",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
]


@pytest.fixture
def vico(monkeypatch, capsys):
    """Run the command; returns (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vico", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            vico_pl.cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


@pytest.fixture
def refused(vico):
    """Run a command that must be refused; returns the one sentence it says."""

    def run(*arguments):
        code, out, err = vico(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("vico: ")
        assert err.count("\n") == 1, err
        return err.removeprefix("vico: ").rstrip("\n")

    return run


@pytest.fixture
def train(vico, shards, tmp_path):
    """Train two steps of one of the repository's recipes; returns the folder of the model."""

    def run(recipe, *settings):
        run_dir = tmp_path / recipe.split("/")[1]
        places = [f"data.sources=[{{path: {shards}}}]", f"run_dir={run_dir}"]
        code, _, err = vico("train", f"recipes/{recipe}.yaml", *TWO_STEPS, *places, *settings)
        assert code == 0, err
        return run_dir / "model"

    return run


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory):
    """A model folder that compresses half of the tiles of an evaluation set, and that set."""
    folder = write_model_folder(tmp_path_factory.mktemp("cli") / "model")
    answered = write_set(folder.parent / "val", answered_records(Predictor.load(folder), count=8))
    threshold = float(np.median(router_probabilities(Predictor.load(folder), answered)))
    write_json({"threshold": threshold}, folder / CALIBRATION_NAME)
    return folder, answered


@pytest.fixture
def model(calibrated, tmp_path):
    """A copy of the calibrated model folder that a test may change."""
    return shutil.copytree(calibrated[0], tmp_path / "model")


@pytest.fixture
def answered(calibrated):
    return calibrated[1]


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(encoded_image("PNG", size=(64, 64)))
    return path


@pytest.fixture
def recipe(tmp_path, model, shards):
    """Write a recipe of stage router: `recipe(seed=3)` adds to it."""

    def write(**changes):
        settings = {
            "stage": "router",
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(model), "router_heads": 4},
            "data": {"sources": [{"path": str(shards)}], "batch_size": 2, "tiling": {"tile_size": TILE}},
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write
