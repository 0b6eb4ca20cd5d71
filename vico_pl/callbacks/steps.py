"""What is done around each step: show how far the run is, and make chance repeatable."""

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import TQDMProgressBar


class StepProgressBar(TQDMProgressBar):
    """A bar over the steps of the whole run, also when the run goes on in the middle."""

    def __init__(self, title: str) -> None:
        """Show `title` before the bar."""
        super().__init__(refresh_rate=5)
        self._title = title

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the step that the run resumes from, so that speed and time left are right."""
        super().on_train_start(trainer, pl_module)
        bar = self.train_progress_bar
        bar.reset(total=trainer.max_steps)
        bar.initial = bar.n = bar.last_print_n = trainer.global_step
        bar.set_description(self._title)

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """There are no epochs to show: a run is one count of steps."""


class StepSeed(L.Callback):
    """Seeds torch at each step from (seed, step, rank): a resumed run drops out what an unbroken one does."""

    def __init__(self, seed: int) -> None:
        """Derive all seeds from `seed`."""
        self._seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Seed the generator that dropout draws from."""
        entropy = [self._seed, trainer.global_step, trainer.global_rank, 1]  # 1: not that of the ratio draw
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
