"""Nested pooling trained with cross-entropy, as M3 does (arXiv 2405.17430): a baseline of the study.

    python benchmarks/nested.py train recipes/free/consistency.yaml stage=nested run_dir=RUN
        consistency.ratio_draw=image consistency.cross_entropy=1.0
    python benchmarks/nested.py RUN/model SHARDS REPORT.json

Compressed vision tokens are averages of full ones instead of the output of a connector of their own.
"""

import sys
from dataclasses import replace
from pathlib import Path

from vico_pl.cli import main
from vico_pl.evaluation.baselines import with_pooling
from vico_pl.evaluation.evaluate import evaluate
from vico_pl.evaluation.questions import open_questions
from vico_pl.files import write_json
from vico_pl.inference.predictor import Predictor
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.stages import STAGES
from vico_pl.stages.consistency import ConsistencyStage
from vico_pl.stages.settings import RunSettings


class NestedStage(ConsistencyStage):
    """Stage 1 with pooled vision tokens; the compressed connectors stay as they are."""

    name = "nested"

    @classmethod
    def prepare(cls, model: VisionLanguageModel, run: RunSettings) -> VisionLanguageModel:
        """Let compressed connectors pool the full one's tokens; model folders keep their layout."""
        model = super().prepare(model, run)
        pooled = with_pooling(model).connectors.by_ratio
        for ratio, connector in model.connectors.by_ratio.items():
            if int(ratio) != model.ratios[0]:
                connector.requires_grad_(requires_grad=False)
                connector.forward = pooled[ratio].forward
        return model


def report(model: Path, data: Path, output: Path) -> None:
    """Evaluate full tokens and all tiles pooled."""
    predictor = Predictor.load(model)
    pooled = replace(predictor, model=with_pooling(predictor.model))
    write_json(evaluate(open_questions(pooled, data), seed=0)[0], output)


if __name__ == "__main__":
    STAGES[NestedStage.name] = NestedStage
    if sys.argv[1] == "train":
        main()
    else:
        report(*map(Path, sys.argv[1:]))
