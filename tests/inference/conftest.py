"""A tiny model folder and an evaluation set that it answers."""

import pytest

from tests.support.folders import answered_records, write_model_folder, write_set
from vico_pl.inference.predictor import Predictor


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("inference") / "model")


@pytest.fixture
def predictor(model_folder):
    return Predictor.load(model_folder)


@pytest.fixture(scope="session")
def answered(tmp_path_factory, model_folder):
    """A set of 16 samples whose expected answers are those of the model at full tokens."""
    records = answered_records(Predictor.load(model_folder), count=16)
    return write_set(tmp_path_factory.mktemp("answered") / "val", records)
