"""The loggers that a recipe names in `trainer.loggers`; optional ones are imported only then."""

import os
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from vico_pl.files import append_json


class JsonlLogger(Logger):
    """Appends every logged set of metrics as one JSON line."""

    name, version = "jsonl", ""  # Lightning's; a run folder is one run

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line."""
        append_json(self._path, {"step": step, **metrics})

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Settings are in the run's config.yaml."""


def build_logger(name: str, run_dir: Path) -> Logger:
    """Build a logger, one of `stages.settings.LOGGERS`, for a run folder; a resume continues what it wrote.

    Raises:
        ValueError: its package is not installed.
    """
    try:
        match name:
            case "tensorboard":
                return TensorBoardLogger(run_dir, name="tensorboard", version="")
            case "jsonl":
                return JsonlLogger(run_dir / "metrics.jsonl")
            case "csv":  # a file for each attempt, as a resume may add columns
                return CSVLogger(run_dir, name="csv")
            case "wandb":
                return _wandb(run_dir)
            case _:
                return _mlflow(run_dir)
    except ModuleNotFoundError as error:
        missing = f"trainer.loggers names {name}, which is not installed"
        raise ValueError(f"{missing}; pip install 'vico_pl[{name}]', or remove it") from error


def _wandb(run_dir: Path) -> Logger:
    from lightning.pytorch.loggers import WandbLogger

    path = run_dir / "wandb_run_id"
    if not path.exists():
        path.write_text(token_hex(4))
    return WandbLogger(name=run_dir.name, save_dir=run_dir, id=path.read_text(), resume="allow")


def _mlflow(run_dir: Path) -> Logger:
    from lightning.pytorch.loggers import MLFlowLogger

    path = run_dir / "mlflow_run_id"
    known = path.read_text() if path.exists() else None
    # MLflow 3 refuses plain folders.
    server = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run_dir.absolute()}/mlflow.db")
    logger = MLFlowLogger("vico_pl", run_name=run_dir.name, tracking_uri=server, run_id=known)
    if known is None and logger.run_id is not None:  # None: not the first rank
        path.write_text(logger.run_id)
    return logger
