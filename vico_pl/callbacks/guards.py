"""Guards against irreproducible dropout, non-finite gradients, diverging ranks and hangs."""

import json
import math
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from vico_pl.types import RankBatch

MAX_SKIPPED = 3  # non-finite gradients in a row that stop the run
SPIKE_FACTOR = 10.0  # times the median of recent gradient norms is a spike
HISTORY = 100  # steps


class StepSeed(L.Callback):
    """Seeds torch at each step: dropout masks after a resume match those of an uninterrupted run."""

    def __init__(self, seed: int) -> None:
        """Derive each seed from (`seed`, step, rank)."""
        self._seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Seed the generator of dropout."""
        entropy = [self._seed, trainer.global_step, trainer.global_rank, 1]  # 1: the ratio draw has 0
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


class GradientGuard(L.Callback):
    """Logs steps skipped for a non-finite gradient, and warns about spikes of the gradient norm.

    `skipped_steps.jsonl` lists the samples of skipped steps; the third in a row stops the run. A skipped step
    changes no weight.
    """

    def __init__(self, path: Path) -> None:
        """Write to `path`."""
        self._path = path
        self._in_a_row = 0
        self._norms: deque[float] = deque(maxlen=HISTORY)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: RankBatch, batch_idx: int
    ) -> None:
        """Check the norm of the step's gradient, which is the same on all ranks.

        Raises:
            ValueError: it was non-finite three times in a row; all ranks raise it at the same step.
        """
        norm, step = outputs["grad_norm"], trainer.global_step - 1
        if math.isfinite(norm):
            self._in_a_row = 0
            self._warn_of_spike(norm, step)
            return
        self._in_a_row += 1
        with self._path.open("a") as file:
            line = {"step": step, "rank": trainer.global_rank, "grad_norm": str(norm), "ids": batch.ids}
            file.write(json.dumps(line) + "\n")
        rank_zero_warn(f"step {step} is skipped: its gradient is {norm}; {self._path} names its samples")
        if self._in_a_row == MAX_SKIPPED:
            raise ValueError(
                f"the gradients of {MAX_SKIPPED} steps in a row are not finite, the last of step {step}; "
                f"their samples are in {self._path}; lower optim.lr, or look at these samples"
            )

    def _warn_of_spike(self, norm: float, step: int) -> None:
        usual = median(self._norms) if len(self._norms) == HISTORY else math.inf
        if norm > SPIKE_FACTOR * usual:
            rank_zero_warn(f"step {step}: the gradient norm is {norm:.3g}, usually {usual:.3g}")
        self._norms.append(norm)


class SyncGuard(L.Callback):
    """Checks every n steps that all ranks have the same weights under DDP, bit for bit."""

    def __init__(self, *, every: int) -> None:
        """Compare every `every` steps."""
        self._every = every

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RankBatch, batch_idx: int
    ) -> None:
        """Compare checksums.

        Raises:
            ValueError: some differ; all ranks raise it.
        """
        if trainer.global_step % self._every or not isinstance(trainer.strategy, DDPStrategy):
            return
        sums = pl_module.ranks.gather(checksum(pl_module))
        odd = [rank for rank, other in enumerate(sums) if other != sums[0]]
        if odd:
            raise ValueError(
                f"after step {trainer.global_step} ranks {odd} have other weights than rank 0: gradients "
                "were not exchanged; do not use this run's later checkpoints, and report how it was started"
            )


class Watchdog(L.Callback):
    """Reports a step that takes too long: which rank, where in the code, and for how long."""

    def __init__(self, folder: Path, *, limit_s: float) -> None:
        """Write stack traces into `folder` if a step takes more than `limit_s` seconds."""
        self._folder, self._limit_s = folder, limit_s
        self._last_s, self._step, self._rank = time.monotonic(), 0, 0
        self._over = threading.Event()

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Start watching."""
        self._rank, self._step, self._last_s = trainer.global_rank, trainer.global_step, time.monotonic()
        main = threading.main_thread().ident
        threading.Thread(target=self._watch, args=(main,), daemon=True).start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Restart the clock."""
        self._step, self._last_s = trainer.global_step, time.monotonic()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Stop watching, however the run ended."""
        self._over.set()

    def _watch(self, main: int) -> None:
        reported = None
        while not self._over.wait(min(self._limit_s / 4, 5.0)):
            waited = time.monotonic() - self._last_s
            if waited > self._limit_s and reported != self._step:
                reported = self._step
                self._report(waited, sys._current_frames().get(main))  # noqa: SLF001 - the documented way

    def _report(self, waited: float, frame: FrameType | None) -> None:
        path = self._folder / f"waiting-rank-{self._rank}.txt"
        path.write_text("".join(traceback.format_stack(frame)))
        where = describe_frame(frame)
        message = (
            f"rank {self._rank} has been at step {self._step} for {waited:.0f} s, {where}; stack: {path}"
        )
        print(message, file=sys.stderr, flush=True)  # noqa: T201 - a logger may be what hangs


def describe_frame(frame: FrameType | None) -> str:
    """Name the innermost function of this package on the stack, and the function that is running."""
    stack = traceback.extract_stack(frame)
    inner = stack[-1].name if stack else "?"
    own = [entry for entry in stack if "vico_pl" in entry.filename]
    place = (
        f"in {own[-1].name} ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else "outside vico_pl"
    )
    return f"{place}, within {inner}"


def checksum(module: nn.Module) -> int:
    """Return a checksum over the bits of all trained weights."""
    total = 0
    for parameter in module.parameters():
        if parameter.requires_grad:
            bits = parameter.detach().contiguous().flatten().view(torch.int16)
            total = (total * 31 + int(bits.sum(dtype=torch.int64))) % 2**61
    return total
