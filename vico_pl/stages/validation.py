"""Validation while training: when it runs, and the figures of each set over all its samples and all ranks.

Lightning's loop calls `Stage.validation_step`, a stage says what a micro-batch gives (`Stage.validate`) and
what follows for the whole set (`Stage.summary`), in eval mode and without gradients. Each sample counts once,
however it is assigned; dummy samples count for nothing.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from vico_pl.stages.figures import Figures, combine
from vico_pl.types import BadRecord, RankBatch


class Validation(L.Callback):
    """Validates every n steps and after the last one, and logs figures as `val/SET/FIGURE`.

    A run that is asked to stop does not begin a validation, and ends the present one without logging it.
    """

    def __init__(self, names: Sequence[str], *, every: int) -> None:
        """Keep the names of the sets, in the order of their loaders."""
        self._names, self._every = names, every
        self._figures: dict[int, list[Figures]] = defaultdict(list)
        self._bad: dict[int, list[BadRecord]] = defaultdict(list)
        self._reported: set[str] = set()

    def on_train_start(self, trainer: L.Trainer, stage: Any) -> None:
        """Decide from now on when to validate.

        Checkpoints are written before the validation of their step, which a resumed run therefore repeats.
        """
        loop, first = trainer.fit_loop.epoch_loop, trainer.global_step
        stage.validated_step = 0  # of the last complete validation
        # Lightning's own rule leaves out the last step, and validates before it stops on request.
        loop._should_check_val_fx = lambda _: trainer.global_step > first and self._is_due(trainer)  # type: ignore[method-assign, assignment]  # noqa: SLF001
        if first and self._is_due(trainer):
            trainer.validating, loop.val_loop.restarting = True, False
            loop.val_loop.run()
            trainer.training = True

    def on_validation_batch_start(self, trainer: L.Trainer, stage: Any, *_: Any) -> None:
        """End the loop if a rank was asked to stop.

        Raises:
            StopIteration: which Lightning's loop takes for the end of the data.
        """
        if stage.ranks.largest(int(stage.stop_requested)):
            self._forget()
            raise StopIteration

    def on_validation_batch_end(
        self, trainer: Any, stage: Any, out: Any, batch: RankBatch, number: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the figures of this rank."""
        self._figures[dataloader_idx] += out
        self._bad[dataloader_idx] += batch.bad_records

    def on_validation_epoch_end(self, trainer: L.Trainer, stage: Any) -> None:
        """Log the figures of all ranks, the same on each."""
        if not self._figures:
            return
        for number, name in enumerate(self._names):
            here = combine(self._figures[number]), self._bad[number]
            figures, bad = zip(*stage.ranks.gather(here), strict=True)
            found = stage.summary(combine(figures)) | self._count_bad(name, list(chain(*bad)))
            for figure, value in found.items():
                stage.log(f"val/{name}/{figure}", value, batch_size=1)
        stage.validated_step = trainer.global_step
        self._forget()

    def _forget(self) -> None:
        self._figures.clear()
        self._bad.clear()

    def _is_due(self, trainer: L.Trainer) -> bool:
        step = trainer.global_step
        return not trainer.should_stop and (step % self._every == 0 or step == trainer.max_steps)

    def _count_bad(self, name: str, bad: list[BadRecord]) -> dict[str, float]:
        if bad and name not in self._reported:
            self._reported.add(name)
            example = f"such as {bad[0].id!r}: {bad[0].reason}"
            rank_zero_warn(f"data.validation '{name}': {len(bad)} bad records are left out, {example}")
        return {"bad_records": float(len(bad))} if bad else {}
