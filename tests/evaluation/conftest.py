"""A tiny calibrated model folder and an evaluation set that it answers."""

import numpy as np
import pytest
import torch

from tests.support.folders import answered_records, router_probabilities, write_model_folder, write_set
from vico_pl.files import write_json
from vico_pl.inference.predictor import Predictor
from vico_pl.model.families.base import CALIBRATION_NAME


@pytest.fixture(scope="session")
def answered_by_folder(tmp_path_factory):
    """A model folder, calibrated to compress half of the tiles of a set whose answers are the model's own."""
    folder = write_model_folder(tmp_path_factory.mktemp("evaluation") / "model")
    records = answered_records(Predictor.load(folder), count=14)
    answered = write_set(tmp_path_factory.mktemp("answered") / "val", records)
    threshold = float(np.median(router_probabilities(Predictor.load(folder), answered)))
    write_json({"threshold": threshold}, folder / CALIBRATION_NAME)
    return folder, answered


@pytest.fixture(scope="session")
def model_folder(answered_by_folder):
    return answered_by_folder[0]


@pytest.fixture(scope="session")
def answered(answered_by_folder):
    return answered_by_folder[1]


@pytest.fixture
def predictor(model_folder):
    return Predictor.load(model_folder)


@pytest.fixture
def other(model_folder):
    """A model like that of the folder, but not quite."""
    found = Predictor.load(model_folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in found.model.connectors.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return found
