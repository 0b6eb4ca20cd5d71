"""Stopping on a signal (of Slurm, `timeout`, systemd or Ctrl-C) without losing a step.

A signal can arrive at any instruction, and at a different one on each rank, so the handler only sets a flag.
In the next step all ranks agree to stop (`Stage.training_step`); they finish it, save, and exit with code 0.
"""

import os
import signal
import subprocess
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REQUEUE_SIGNAL = signal.SIGUSR1  # sent before the time limit; SIGTERM also comes when a user cancels the job


class StopSignals(L.Callback):
    """Turns signals into a request to stop after the step; as a context manager, from the start."""

    def __init__(self) -> None:
        """Catch no signal yet."""
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        """Catch signals: one must not kill the run while a large model loads."""
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace Lightning's handlers, which would save in the middle of a step."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Pass the request to the stage, which informs the other ranks."""
        pl_module.stop_requested = self.received is not None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop once all ranks have agreed."""
        if outputs["stop"]:
            rank_zero_info(
                f"Stopping on request: step {trainer.global_step} is saved. The same command resumes."
            )
            trainer.should_stop = True

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.received == signal.SIGINT:
                raise KeyboardInterrupt
            # Not print(): the signal may have interrupted one.
            os.write(2, b"\nStopping after this step. Press Ctrl-C again to stop at once, without saving.\n")
        self.received = signal.Signals(number)


def requeue(run: Callable[..., Any] = subprocess.run) -> None:
    """Requeue this job, if it is a Slurm job."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    name = job if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        run(["scontrol", "requeue", name], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        rank_zero_warn(f"job {name} could not be requeued ({reason}); submit it again, it resumes")
    else:
        rank_zero_info(f"Job {name} is requeued.")
