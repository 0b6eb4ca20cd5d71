"""What a run reports: progress, metrics, bad records, and the samples of each step."""

import json
import math
import os
import time
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from vico_pl.types import BadRecord, RankBatch


class JsonlLogger(Logger):
    """Appends every logged set of metrics as one JSON line."""

    def __init__(self, path: Path) -> None:
        """Write to `path`."""
        super().__init__()
        self._path = path

    @property
    def name(self) -> str:
        """Lightning's name of this logger."""
        return "jsonl"

    @property
    def version(self) -> str:
        """No version: a run folder is one run."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Settings are in the run's config.yaml."""


class StepProgressBar(TQDMProgressBar):
    """A bar over all steps of the run, also after a resume."""

    def __init__(self, title: str) -> None:
        """Show `title` before the bar."""
        super().__init__(refresh_rate=5)
        self._title = title

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start at the step that the run resumes from, so that speed and time left are right."""
        super().on_train_start(trainer, pl_module)
        bar = self.train_progress_bar
        bar.reset(total=trainer.max_steps)
        bar.initial = bar.n = bar.last_print_n = trainer.global_step
        bar.set_description(self._title)

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Show no epochs: a run is one count of steps."""


class BadRecordLog(L.Callback):
    """Appends each bad record of a step to `bad_records.jsonl`, counts them and stops if too many.

    `data/bad_records` counts all of this rank, `data/bad_records/SOURCE/KIND` those of one source and kind.
    """

    def __init__(self, path: Path, *, max_bad_fraction: float = 0.05, window: int = 2000) -> None:
        """Write to `path`; allow `max_bad_fraction` of the last `window` samples of all ranks to be bad.

        The window starts empty, also after a resume. Before it is full the same number is allowed: a few bad
        records at the start stop nothing, and shards that are entirely bad stop the run at once.
        """
        self._path, self._window, self._max_bad_fraction = path, window, max_bad_fraction
        self._counts: Counter[str] = Counter()
        self._recent: deque[tuple[int, int]] = deque()  # samples and bad ones of each step, over all ranks
        self._recent_bad: deque[BadRecord] = deque(maxlen=window)  # of this rank
        self._next_line_s = -math.inf  # when the next line may be printed

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: RankBatch, batch_idx: int
    ) -> None:
        """Write the bad records of the step.

        Raises:
            ValueError: too many of the last samples are bad; all ranks raise it at the same step.
        """
        if batch.bad_records:
            self._write(batch.bad_records, trainer.global_step)
            self._count(batch.bad_records)
        for name, count in self._counts.items():
            pl_module.log(name, float(count), batch_size=1)
        self._watch(outputs["num_bad"], outputs["num_samples"])

    def _write(self, bad_records: list[BadRecord], step: int) -> None:
        lines = [
            {"step": step, "source": bad.source, "kind": bad.kind, "id": bad.id, "reason": bad.reason}
            for bad in bad_records
        ]
        with self._path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))

    def _count(self, bad_records: list[BadRecord]) -> None:
        self._counts["data/bad_records"] += len(bad_records)
        self._counts.update(f"data/bad_records/{bad.source}/{bad.kind}" for bad in bad_records)
        self._recent_bad.extend(bad_records)
        if time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + 60
            total, last = self._counts["data/bad_records"], bad_records[-1]
            message = f"{total} bad records so far, the last {last.id!r}: {last.reason}"
            rank_zero_info(f"{message}; see {self._path}")

    def _watch(self, num_bad: int, num_samples: int) -> None:
        self._recent.append((num_bad, num_samples))
        while sum(samples for _, samples in self._recent) - self._recent[0][1] >= self._window:
            self._recent.popleft()
        num_bad = sum(bad for bad, _ in self._recent)
        if num_bad > self._max_bad_fraction * self._window:
            samples = sum(samples for _, samples in self._recent)
            raise ValueError(
                f"{num_bad} of the last {samples} samples are bad; data.max_bad_fraction "
                f"{self._max_bad_fraction} allows {self._max_bad_fraction * self._window:.0f} of "
                f"{self._window}; most frequent: {self._reasons(num_bad)}; all are in {self._path}"
            )

    def _reasons(self, num_bad: int) -> str:
        """List the most frequent kinds on this rank with an example each."""
        recent = list(self._recent_bad)[-num_bad:]
        examples = {bad.kind: f"{bad.id!r}: {bad.reason}" for bad in recent}
        frequent = Counter(bad.kind for bad in recent).most_common(3)
        return ", ".join(f"{kind} ({count}, such as {examples[kind]})" for kind, count in frequent)


class SampleLog(L.Callback):
    """Logs the samples of each step of a rank in `samples-rank-R.jsonl`, for `vico audit`.

        {"attempt": 1, "from_step": 4, "world": 2}                 the run started or resumed at step 4
        {"step": 4, "ids": ["a.tar/7", "a.tar/3"], "bad": [...]}   samples of a step, and bad records if any

    Each line is one write, so a killed run can only truncate the last one; ranks do not wait for each other.
    """

    def __init__(self, folder: Path) -> None:
        """Write into `folder`."""
        self._folder = folder
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Log where this attempt starts: lines of earlier attempts from that step on no longer count."""
        self._step = trainer.global_step
        attempt = trainer.strategy.broadcast(self._num_attempts())  # rank 0 took part in all of them
        line = {"attempt": attempt, "from_step": self._step, "world": trainer.world_size}
        self._append(trainer, line, before=b"\n" if _is_truncated(self._path(trainer)) else b"")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: RankBatch, batch_idx: int
    ) -> None:
        """Write the samples of the step."""
        bad = {"bad": [record.id for record in batch.bad_records]} if batch.bad_records else {}
        self._append(trainer, {"step": self._step, "ids": batch.ids, **bad})
        self._step += 1

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        """Sync the log to disk: it must cover the checkpoint even after a power cut."""
        with self._path(trainer).open("ab") as file:
            os.fsync(file.fileno())

    def _num_attempts(self) -> int:
        path = self._folder / "samples-rank-0.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            return sum(line.startswith(b'{"attempt"') for line in file)

    def _path(self, trainer: L.Trainer) -> Path:
        return self._folder / f"samples-rank-{trainer.global_rank}.jsonl"

    def _append(self, trainer: L.Trainer, line: dict[str, Any], *, before: bytes = b"") -> None:
        with self._path(trainer).open("ab", buffering=0) as file:
            file.write(before + json.dumps(line).encode() + b"\n")


def _is_truncated(path: Path) -> bool:
    """Return whether a file ends within a line."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
