"""What a run reports: progress, bad records, its environment, and the samples of each step."""

import math
import os
import platform
import subprocess
import sys
import time
from base64 import b64decode, b64encode
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from operator import sub
from pathlib import Path
from typing import Any
from zlib import compress, crc32, decompress

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from vico_pl.files import append_json
from vico_pl.types import BadRecord, RankBatch

SAMPLE_LOG = "samples-rank-{rank}.jsonl"
ATTEMPT = b'{"attempt"'  # the start of a line of `SampleLog` where an attempt starts
BLOCK_BYTES = 65_536  # that are read of a log at a time


class StepProgressBar(TQDMProgressBar):
    """A bar over all steps of the run, also after a resume; in log files a line per minute instead."""

    def __init__(self, title: str) -> None:
        super().__init__(refresh_rate=5 if sys.stdout.isatty() else 0)  # 0: no bar
        self._title, self._start = title, (0, 0.0)  # step and time at which this attempt began
        self._next_line_s = -math.inf  # when the next line may be printed

    def on_train_start(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        """Start at the step that the run resumes from, so that speed and time left are right."""
        super().on_train_start(trainer, stage)
        self._start = trainer.global_step, time.monotonic()
        bar = self.train_progress_bar
        bar.reset(total=trainer.max_steps)
        bar.initial = bar.n = bar.last_print_n = trainer.global_step
        bar.set_description(self._title)

    def on_train_batch_end(self, trainer: L.Trainer, stage: Any, *arguments: Any) -> None:
        """Advance the bar, or print a line."""
        super().on_train_batch_end(trainer, stage, *arguments)
        step, steps = trainer.global_step, trainer.max_steps
        if self.is_disabled and (time.monotonic() >= self._next_line_s or step == steps):
            self._next_line_s = time.monotonic() + 60
            loss = self.get_metrics(trainer, stage).get(f"{self._title}/loss")
            known = "" if loss is None else f", loss {float(loss):.4g}"  # type: ignore[arg-type]
            rank_zero_info(f"{self._title}: step {step} of {steps}{known}{self._time_left(step, steps)}")

    def on_train_end(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        """Print the figures of the last validation."""
        super().on_train_end(trainer, stage)
        known = trainer.callback_metrics if trainer.global_step == trainer.max_steps else {}
        for name in sorted(name for name in known if name.startswith("val/")):
            rank_zero_info(f"  {name:40} {float(known[name]):.4g}")

    def _time_left(self, step: int, num_steps: int) -> str:
        """Say how long the steps that are left take at the speed since the start."""
        first, start_s = self._start
        if step <= first + 1 or step == num_steps:  # the first step alone says little
            return ""
        minutes = (time.monotonic() - start_s) / (step - first) * (num_steps - step) / 60
        return f", {minutes:.0f} min left" if minutes < 120 else f", {minutes / 60:.1f} h left"

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Show no epochs: a run is one count of steps."""


class BadRecordLog(L.Callback):
    """Appends each bad record of a step to `path`, counts them and stops the run if there are too many.

    `data/bad_records` counts all of this rank, `data/bad_records/SOURCE/KIND` those of one source and kind.
    Of the last `window` samples of all ranks, `max_bad_fraction` may be bad. The window starts empty, also
    after a resume. Before it is full the same number is allowed: a few bad records at the start stop nothing,
    and shards that are entirely bad stop the run at once.
    """

    def __init__(self, path: Path, *, max_bad_fraction: float = 0.05, window: int = 2000) -> None:
        self._path, self._window, self._max_bad_fraction = path, window, max_bad_fraction
        self._counts: Counter[str] = Counter()
        self._recent: deque[tuple[int, int]] = deque()  # samples and bad ones of each step, over all ranks
        self._recent_bad: deque[BadRecord] = deque(maxlen=window)  # of this rank
        self._next_line_s = -math.inf  # when the next line may be printed

    def on_train_batch_end(self, trainer: L.Trainer, stage: Any, out: Any, batch: RankBatch, *_: Any) -> None:
        """Write the bad records of the step.

        Raises:
            ValueError: too many of the last samples are bad; all ranks raise it at the same step.
        """
        if batch.bad_records:
            step = trainer.global_step
            lines = [
                {"step": step, "source": bad.source, "kind": bad.kind, "id": bad.id, "reason": bad.reason}
                for bad in batch.bad_records
            ]
            append_json(self._path, *lines)
            self._count(batch.bad_records)
        for name, count in self._counts.items():
            stage.log(name, float(count), batch_size=1)
        self._watch(out["num_bad"], out["num_samples"])

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
        num_bad, num_samples = map(sum, zip(*self._recent, strict=True))
        allowed = self._max_bad_fraction * self._window
        if num_bad > allowed:
            raise ValueError(
                f"{num_bad} of the last {num_samples} samples are bad; data.max_bad_fraction "
                f"{self._max_bad_fraction} allows {allowed:.0f} of {self._window}; "
                f"most frequent: {self._reasons(num_bad)}; all are in {self._path}"
            )

    def _reasons(self, num_bad: int) -> str:
        """List the most frequent kinds on this rank with an example each."""
        recent = list(self._recent_bad)[-num_bad:]
        examples = {bad.kind: f"{bad.id!r}: {bad.reason}" for bad in recent}
        frequent = Counter(bad.kind for bad in recent).most_common(3)
        return ", ".join(f"{kind} ({count}, such as {examples[kind]})" for kind, count in frequent)


class EnvironmentLog(L.Callback):
    """Appends to `path` what each attempt of a run ran on: versions, commit and hardware."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Append one line."""
        device = trainer.strategy.root_device
        is_cuda = device.type == "cuda"
        line = {
            "from_step": trainer.global_step,
            **software(),
            "host": platform.node(),
            "device": torch.cuda.get_device_name(device) if is_cuda else f"cpu ({platform.machine()})",
            "num_ranks": trainer.world_size,
            "num_nodes": trainer.num_nodes,
        }
        append_json(self._path, line)


def software() -> dict[str, str | None]:
    """Return the versions that a result depends on, and the commit if this is a checkout."""
    packages = ("vico_pl", "torch", "transformers", "lightning")
    versions = {name: _version(name) for name in packages}
    return {**versions, "commit": _commit(), "python": platform.python_version()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return None


def _commit() -> str | None:
    """Return the commit of the checkout that this code lies in, if it does, and whether it was changed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class SampleLog(L.Callback):
    """Logs the samples of each step of a rank in `SAMPLE_LOG` of `folder`, for `vico audit`.

        {"attempt": 1, "from_step": 4, "world": 2}    the run started or resumed at step 4
        {"step": 4, "used": "eNozNlIwVDAFAAO6AQw=", "crc32": 1685046178, "bad": ["a.tar/7"]}

    A step has the positions of its samples in the order of the run (`pack_positions`: here 32, 33, 38), the
    checksum of their names, and the names of bad records if any. Ranks do not wait for each other.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._step = folder, 0

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Log where this attempt starts: lines of earlier attempts from that step on no longer count."""
        self._step = trainer.global_step
        attempt = trainer.strategy.broadcast(self._num_attempts())
        path = self._path(trainer.global_rank)
        is_truncated = any(not last.endswith(b"\n") for last in deque(read_lines(path), maxlen=1))
        line = {"attempt": attempt, "from_step": self._step, "world": trainer.world_size}
        append_json(path, line, before=b"\n" if is_truncated else b"")

    def on_train_batch_end(self, trainer: L.Trainer, stage: Any, out: Any, batch: RankBatch, *_: Any) -> None:
        """Write the samples of the step."""
        batches = (zip(each.positions, each.ids, strict=True) for each in batch.micro_batches)
        samples = sorted(sample for of_batch in batches for sample in of_batch if sample[1])  # no dummies
        used = pack_positions([position for position, _ in samples])
        line = {"step": self._step, "used": used, "crc32": checksum(name for _, name in samples)}
        bad = {"bad": [record.id for record in batch.bad_records]} if batch.bad_records else {}
        append_json(self._path(trainer.global_rank), line | bad)
        self._step += 1

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        """Sync the log to disk: it must cover the checkpoint even after a power cut."""
        with self._path(trainer.global_rank).open("ab") as file:
            os.fsync(file.fileno())

    def _num_attempts(self) -> int:
        """Count in the log of rank 0, which took part in all of them."""
        return sum(line.startswith(ATTEMPT) for line in read_lines(self._path(0)))

    def _path(self, rank: int) -> Path:
        return self._folder / SAMPLE_LOG.format(rank=rank)


def pack_positions(positions: list[int]) -> str:
    """Return rising positions as text: the first and the gaps between them, compressed, in base64.

    >>> unpack_positions(pack_positions([32, 33, 38]))
    [32, 33, 38]
    """
    gaps = map(sub, positions, [0, *positions])
    return b64encode(compress(" ".join(map(str, gaps)).encode(), level=9)).decode()


def unpack_positions(packed: str) -> list[int]:
    """Return the positions in a text of `pack_positions`.

    Raises:
        ValueError, zlib.error: the text is damaged.
    """
    positions = list(accumulate(map(int, decompress(b64decode(packed)).split())))
    if min(positions, default=0) < 0:
        raise ValueError(f"position {min(positions)}; expected 0 or more")
    return positions


def checksum(names: Iterable[str]) -> int:
    """Return the CRC-32 of names in their order."""
    return crc32("\n".join(names).encode(errors="surrogateescape"))


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, none if it does not exist; no descriptor stays open between blocks."""
    start, lines = 0, [b""] if path.exists() else []
    while lines:
        with path.open("rb") as file:
            file.seek(start)
            lines = file.readlines(BLOCK_BYTES)
            start = file.tell()
        yield from lines
