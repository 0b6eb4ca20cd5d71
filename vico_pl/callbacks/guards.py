"""What ends a run early, and when: signals, non-finite gradients, diverging ranks; and a watch for hangs.

A signal (of Slurm, `timeout`, systemd or Ctrl-C) can arrive at any instruction, and at a different one on
each rank, so its handler only sets a flag. In the next step all ranks agree to stop (`Stage.training_step`);
they finish it, save, and exit with code 0.
"""

import math
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from vico_pl.errors import STOP_SIGNALS
from vico_pl.files import append_json
from vico_pl.types import RankBatch

MAX_SKIPPED = 3  # steps in a row with non-finite gradients or loss ratios that stop the run
SPIKE_FACTOR = 10.0  # times the median of recent gradient norms is a spike
HISTORY = 100  # steps
REQUEUE_SIGNAL = signal.SIGUSR1  # sent before the time limit; SIGTERM also comes when a user cancels the job


class StopSignals(L.Callback):
    """Turns signals into a request to stop after the step; as a context manager, from the start."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        """Catch signals: one must not kill the run while a large model loads."""
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_train_start(self, *_: Any) -> None:
        """Replace Lightning's handlers, which would save in the middle of a step."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def on_train_batch_start(self, trainer: L.Trainer, stage: Any, *_: Any) -> None:
        """Pass the request to the stage, which informs the other ranks."""
        stage.stop_requested = self.received is not None

    def on_validation_batch_start(self, trainer: L.Trainer, stage: Any, *_: Any) -> None:
        """Do so within a validation, too."""
        self.on_train_batch_start(trainer, stage)

    def on_train_batch_end(self, trainer: L.Trainer, stage: Any, out: Any, *_: Any) -> None:
        """Stop once all ranks have agreed."""
        if out["stop"]:
            saved = f"step {trainer.global_step} is saved"
            rank_zero_info(f"Stopping on request: {saved}. The same command resumes.")
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
    # Said first: Slurm may end this process before the command returns.
    rank_zero_info(f"Requeueing job {name}.")
    try:
        run(["scontrol", "requeue", name], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        rank_zero_warn(f"job {name} could not be requeued ({reason}); submit it again, it resumes")


class StepSeed(L.Callback):
    """Seeds torch by (`seed`, step, rank): dropout of adapters after a resume is as without interruption."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Seed the generator; connectors and router do not draw from it (see `model/connector.py`)."""
        entropy = [self._seed, trainer.global_step, trainer.global_rank, 1]  # 1: the ratio draw has 0
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


class GradientGuard(L.Callback):
    """Logs steps with a non-finite gradient or loss ratio, and warns about spikes of the gradient norm.

    `path` lists the samples of such steps; the third in a row stops the run. With a non-finite gradient a
    step is skipped and changes no weight. `has_trained` says whether any step of the run had a gradient.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._in_a_row, self.has_trained = path, 0, False
        self._norms: deque[float] = deque(maxlen=HISTORY)

    def on_train_batch_end(self, trainer: L.Trainer, stage: Any, out: Any, batch: RankBatch, *_: Any) -> None:
        """Check the norm of the step's gradient and what was left out, the same on all ranks.

        Raises:
            ValueError: one was non-finite three times in a row; all ranks raise it at the same step.
        """
        norm, num_left_out, step = out["grad_norm"], out["num_left_out"], trainer.global_step - 1
        if math.isfinite(norm):
            self.has_trained = self.has_trained or norm > 0
            self._warn_of_spike(norm, step)
            if not num_left_out:
                self._in_a_row = 0
                return
        self._in_a_row += 1
        line = {"step": step, "rank": trainer.global_rank, "grad_norm": str(norm), "ids": batch.ids}
        append_json(self._path, line)
        if num_left_out:
            what, fault = "loss ratios", f"{num_left_out} of its loss ratios are not finite and left out"
            remedy = "look at the weights of model.path and model.reference, and at these samples"
        else:
            what, fault = "gradients", f"its gradient is {norm}"
            remedy = "lower optim.lr, or look at these samples"
        skipped = "" if math.isfinite(norm) else " is skipped"
        rank_zero_warn(f"step {step}{skipped}: {fault}; {self._path} names its samples")
        if self._in_a_row == MAX_SKIPPED:
            raise ValueError(
                f"the {what} of {MAX_SKIPPED} steps in a row are not finite, the last of step {step}; "
                f"their samples are in {self._path}; {remedy}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"has_trained": self.has_trained}

    def on_load_checkpoint(self, trainer: L.Trainer, stage: Any, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint; those of earlier versions do not say whether they have trained."""
        self.has_trained = checkpoint["callbacks"].get(self.state_key, {}).get("has_trained", True)

    def _warn_of_spike(self, norm: float, step: int) -> None:
        usual = median(self._norms) if len(self._norms) == HISTORY else math.inf
        if norm > SPIKE_FACTOR * usual:
            rank_zero_warn(f"step {step}: the gradient norm is {norm:.3g}, usually {usual:.3g}")
        self._norms.append(norm)


class DataGuard(L.Callback):
    """Keeps in checkpoints what the order of samples depends on, and refuses to resume over other data."""

    def on_save_checkpoint(self, trainer: Any, stage: Any, checkpoint: dict[str, Any]) -> None:
        """Add the shards of each source."""
        checkpoint["data_order"] = self._sources(trainer)

    def on_load_checkpoint(self, trainer: Any, stage: Any, checkpoint: dict[str, Any]) -> None:
        """Compare them; checkpoints of earlier versions have none.

        Raises:
            ValueError: the number of samples of a shard has changed.
        """
        now = self._sources(trainer)
        for pair in zip(now, checkpoint.get("data_order", now), strict=True):
            if pair[0] != pair[1]:
                now_in, began_in = (f"{s['num_samples']} samples in {s['num_shards']}" for s in pair)
                raise ValueError(
                    f"{pair[0]['folder']}: {now_in} shards, but this run began with {began_in}, or with "
                    "other numbers in a shard, and would go on in another order; restore them, or set run_dir"
                )

    def _sources(self, trainer: Any) -> list[dict[str, Any]]:
        indexes, shapes = trainer.datamodule.indexes, trainer.datamodule.order.sources
        return [
            {
                "folder": str(index.folder),
                "num_samples": index.num_samples,
                "num_shards": len(shape.shard_sizes),
                "window": shape.window,
                "digest": sha256(repr(list(shape.shard_sizes)).encode()).hexdigest(),
            }
            for index, shape in zip(indexes, shapes, strict=True)
        ]


class SyncGuard(L.Callback):
    """Checks every n steps that all ranks have the same weights under DDP, bit for bit."""

    def __init__(self, *, every: int) -> None:
        self._every = every

    def on_train_batch_end(self, trainer: L.Trainer, stage: Any, *_: Any) -> None:
        """Compare checksums.

        Raises:
            ValueError: some differ; all ranks raise it.
        """
        if trainer.global_step % self._every or not isinstance(trainer.strategy, DDPStrategy):
            return
        sums = stage.ranks.gather(checksum(stage))
        odd = [rank for rank, other in enumerate(sums) if other != sums[0]]
        if odd:
            raise ValueError(
                f"after step {trainer.global_step} ranks {odd} have other weights than rank 0: gradients "
                "were not exchanged; do not use this run's later checkpoints, and report how it was started"
            )


def checksum(module: nn.Module) -> int:
    """Return a checksum over the bits of all trained weights."""
    total = 0
    for parameter in module.parameters():
        if parameter.requires_grad:
            bits = parameter.detach().contiguous().flatten().view(torch.int16)
            total = (total * 31 + int(bits.sum(dtype=torch.int64))) % 2**61
    return total


class Watchdog(L.Callback):
    """Reports a step that takes more than `limit_s` seconds: which rank, where, and its stack in `folder`."""

    def __init__(self, folder: Path, *, limit_s: float) -> None:
        self._folder, self._limit_s = folder, min(limit_s, threading.TIMEOUT_MAX)
        self._timer = threading.Timer(self._limit_s, self._report)  # replaced at each step

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Start the clock."""
        self._timer.cancel()
        where = trainer.global_rank, trainer.global_step, threading.get_ident()
        self._timer = threading.Timer(self._limit_s, self._report, where)
        self._timer.daemon = True
        self._timer.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Restart it."""
        self.on_train_start(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Restart it: a validation may take longer than a step."""
        self.on_train_start(trainer)

    def teardown(self, *_: Any, **__: Any) -> None:
        """Stop it, however the run ended."""
        self._timer.cancel()

    def _report(self, rank: int, step: int, thread: int) -> None:
        frame = sys._current_frames().get(thread)  # noqa: SLF001 - the documented way
        path = self._folder / f"waiting-rank-{rank}.txt"
        path.write_text("".join(traceback.format_stack(frame)))
        place = f"rank {rank} has been at step {step} for {self._limit_s:.0f} s, {describe_frame(frame)}"
        print(f"{place}; stack: {path}", file=sys.stderr, flush=True)  # noqa: T201 - a logger may be what hangs


def describe_frame(frame: FrameType | None) -> str:
    """Name the innermost function of this package on the stack, and the function that is running."""
    stack = traceback.extract_stack(frame)
    own = [entry for entry in stack if "vico_pl" in entry.filename]
    running = f"within {stack[-1].name if stack else '?'}"
    if not own:
        return f"outside vico_pl, {running}"
    return f"in {own[-1].name} ({Path(own[-1].filename).name}:{own[-1].lineno}), {running}"
