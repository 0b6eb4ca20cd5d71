"""A stage of its own: only the compressed connectors are trained, to give the mean of the full vision tokens.

python docs/extending/stage.py recipes/demo/consistency.yaml run_dir=runs/warmup model.connector_start=random
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.functional import mse_loss

from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.prepare import prepare_run
from vico_pl.stages import STAGES
from vico_pl.stages.base import Stage, StepResult
from vico_pl.stages.figures import Mean
from vico_pl.stages.settings import RunSettings
from vico_pl.trainer import train
from vico_pl.types import Batch


class WarmupStage(Stage):
    """Fits the vision tokens of a tile at the coarsest ratio to those at full tokens."""

    name = "warmup"
    compares = False  # it needs no reference

    def __init__(self, run: RunSettings, model: VisionLanguageModel) -> None:
        super().__init__(run, model)
        self.model = model  # what checkpoints hold
        model.connectors.by_ratio["4"].requires_grad_(requires_grad=False)

    @classmethod
    def check(cls, run: RunSettings) -> Iterator[str]:
        """Yield what is wrong in a recipe, a sentence each."""
        yield from super().check(run)
        if run.model.trainable != ["connectors"]:
            yield f"model.trainable is {run.model.trainable}; stage warmup trains [connectors] alone"

    def num_items(self, batch: Batch) -> int:
        """Return what the loss sums over: tiles, not response tokens."""
        return batch.num_tiles

    def step(self, batch: Batch) -> StepResult:
        """Compare both connectors on the tiles of a micro-batch."""
        features = self.model.encode_tiles(batch.tiles)  # (T, P, C)
        by_ratio, coarsest = self.model.connectors.by_ratio, self.model.ratios[-1]
        full = by_ratio["4"](features)  # (T, P / 4, D)
        compressed = by_ratio[str(coarsest)](features)  # (T, P / 16, D)
        side = int(full.shape[1] ** 0.5)
        grid = full.unflatten(1, (side, side)).movedim(-1, 1)  # (T, D, side, side)
        target = torch.nn.functional.avg_pool2d(grid, int((coarsest // 4) ** 0.5)).flatten(2).mT
        loss = mse_loss(compressed, target.detach(), reduction="none").mean((1, 2)).sum()
        spread = Mean(target.detach().var(0).mean() * batch.num_tiles, batch.num_tiles)
        return StepResult(loss_sum=loss, metrics={"warmup/target_variance": spread})


STAGES[WarmupStage.name] = WarmupStage

if __name__ == "__main__":
    recipe, *settings = sys.argv[1:]
    fixed = ["stage=warmup", "model.trainable=[connectors]"]
    print(train(prepare_run(Path(recipe), [*fixed, *settings])), "is written")
