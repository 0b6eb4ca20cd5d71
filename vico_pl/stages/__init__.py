"""The stages of training. A new one is a file here, a line in `STAGES` and its section in `config.py`.

settings.py   the sections of a recipe that all stages read
base.py       what is trained, the optimizer step over micro-batches and ranks, logging
cost.py       FLOPs of a sample
figures.py    what micro-batches, steps and ranks add up to
validation.py when held-out sets are validated, and their figures over all ranks
"""

from vico_pl.stages.base import ModelSource, Stage
from vico_pl.stages.consistency import ConsistencyStage
from vico_pl.stages.pretrain import PretrainStage
from vico_pl.stages.router import RouterStage
from vico_pl.stages.settings import RunSettings

STAGES: dict[str, type[Stage]] = {
    stage.name: stage for stage in (PretrainStage, ConsistencyStage, RouterStage)
}


def build_stage(run: RunSettings, source: ModelSource) -> Stage:
    """Build the stage that a recipe names, with its models."""
    return STAGES[run.stage].build(run, source)
