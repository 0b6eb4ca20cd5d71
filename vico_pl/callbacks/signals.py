"""Being told to stop: by Slurm before a job's time is over, by whoever preempts it, by a user's Ctrl-C.

A handler may come at any instruction, on each rank at another one, so it only sets a flag. With the next step
all ranks agree on it (`Stage.training_step`); the step is finished, saved, and the run ends with exit code 0.
"""

import os
import signal
import subprocess
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REQUEUE_SIGNAL = signal.SIGUSR1  # comes before the time limit; SIGTERM also when a user cancels the job


class StopSignals(L.Callback):
    """Turns signals into a request to stop after the step; as a context it catches them from the start."""

    def __init__(self) -> None:
        """Catch nothing yet."""
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        """Begin to catch signals: loading a large model takes minutes, in which one must not kill the run."""
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals back from Lightning, which would save in the middle of a step."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Let the stage tell the other ranks."""
        pl_module.stop_requested = self.received is not None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop once all ranks know."""
        if outputs["stop"]:
            rank_zero_info(f"Told to stop: step {trainer.global_step} is saved. The same command goes on.")
            trainer.should_stop = True

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)


def requeue(run: Callable[..., Any] = subprocess.run) -> None:
    """Have Slurm queue this job again, if there is one."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    name = job if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        run(["scontrol", "requeue", name], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        rank_zero_warn(f"job {name} could not be queued again ({said}); submit it again, it goes on")
    else:
        rank_zero_info(f"Job {name} is queued again.")
