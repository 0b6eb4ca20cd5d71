import csv

import pytest

from vico_pl.callbacks.loggers import build_logger


def test_csv_has_the_metrics(tmp_path):
    logger = build_logger("csv", tmp_path)
    logger.log_metrics({"a": 1.5}, step=3)
    logger.finalize("success")
    (path,) = tmp_path.glob("csv/*/metrics.csv")
    assert list(csv.DictReader(path.read_text().splitlines())) == [{"a": "1.5", "step": "3"}]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_named_with_the_remedy(tmp_path, monkeypatch, name):
    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", _missing)
    monkeypatch.setattr("lightning.pytorch.loggers.MLFlowLogger", _missing)
    with pytest.raises(ValueError, match=f"trainer.loggers names {name}, .* pip install .vico_pl.{name}"):
        build_logger(name, tmp_path)


def _missing(*_, **__):
    raise ModuleNotFoundError("No module named 'x'")


def test_mlflow_continues_its_run(tmp_path):
    pytest.importorskip("mlflow")
    ids = {build_logger("mlflow", tmp_path).run_id for _ in range(2)}
    assert len(ids) == 1


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = {build_logger("wandb", tmp_path).version for _ in range(2)}
    assert len(ids) == 1
