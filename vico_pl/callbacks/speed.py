"""How fast a run is, where its time goes and what memory it takes, between two points of its log."""

import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from vico_pl.stages.cost import StageCost
from vico_pl.types import Batch, RankBatch

GIB = 2**30
RATES = ("samples", "tiles", "vision_tokens", "text_tokens")  # logged per second, of all ranks


class Speed(L.Callback):
    """Logs `speed/...` and `memory/...` over the steps since the last point and over all ranks.

    Nothing here waits for a GPU: over many steps the clock of the host shows the time of the device.
    Validations and checkpoints belong to no step. It must be the last callback but the checkpoints'.
    """

    _cost: StageCost

    def __init__(self, *, precision: str) -> None:
        self._dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._ready_s: float | None = None  # when the wait for the next batch began; None: do not count it
        self._begun_s = 0.0
        self._peak: int | None = None  # FLOPs per second of the device, if known

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        """Look up the device, and what the stage makes of a sample."""
        self._cost = trainer.datamodule.cost
        self._peak = get_available_flops(trainer.strategy.root_device, self._dtype)

    def on_train_batch_start(self, *_: Any) -> None:
        """End the wait for data."""
        self._begun_s = time.perf_counter()
        if self._ready_s is not None:
            self._sums["wait_s"] += self._begun_s - self._ready_s

    def on_train_batch_end(self, trainer: L.Trainer, stage: Any, out: Any, batch: RankBatch, *_: Any) -> None:
        """Count the step, and log at the points of the log."""
        self._sums["busy_s"] += time.perf_counter() - self._begun_s
        self._sums["steps"] += 1
        for micro_batch in batch.micro_batches:
            self._count(micro_batch)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            here = dict(self._sums), used_memory(trainer.strategy.root_device)
            sums, memories = zip(*stage.ranks.gather(here), strict=True)
            num_left = trainer.max_steps - trainer.global_step
            for name, value in {**speed(sums, num_left, self._peak), **most(memories)}.items():
                stage.log(name, value, batch_size=1)
            self._sums.clear()
        self._ready_s = time.perf_counter()

    def on_validation_end(self, *_: Any) -> None:
        """Begin to wait for data again."""
        self._ready_s = time.perf_counter()

    def on_save_checkpoint(self, *_: Any) -> None:
        """Leave out the next wait, which began before the checkpoint was written."""
        self._ready_s = None

    def _count(self, batch: Batch) -> None:
        """Count a micro-batch; the lengths of its samples are on the device, so all have the mean one."""
        text_tokens, counts = (len(batch.input_ids) - batch.num_tiles) // batch.num_samples, self._sums
        for position, tiles in zip(batch.positions, batch.tiles_per_image, strict=True):
            if position >= 0:
                per_tile = self._cost.flops.vision_tokens_per_tile
                counts["samples"] += 1
                counts["tiles"] += sum(tiles)
                counts["text_tokens"] += text_tokens
                counts["vision_tokens"] += sum(per_tile[r] for r in self._cost.ratios_at(position, tiles))
                if self._peak is not None:
                    counts["flops"] += self._cost(position, tiles, text_tokens)


def speed(ranks: Sequence[Mapping[str, float]], num_left: int, peak: int | None) -> dict[str, float]:
    """Return `speed/...` of the slowest rank, and rates of all, from the sums of each.

    `num_left` steps are left; `peak`, FLOPs per second of a device, gives the model FLOPs utilisation.

    >>> one = {"steps": 10.0, "busy_s": 4.0, "wait_s": 1.0, "samples": 20.0, "flops": 3e9}
    >>> found = speed([one, {**one, "wait_s": 0.0}], num_left=720, peak=10**9)
    >>> [found[f"speed/{name}"] for name in ("step_s", "data_wait_s", "data_wait_fraction", "samples_per_s")]
    [0.5, 0.1, 0.2, 8.0]
    >>> [found[f"speed/{name}"] for name in ("eta_h", "mfu")]
    [0.1, 0.6]
    """
    slowest = max(ranks, key=lambda sums: sums.get("wait_s", 0))
    wait_s, steps = slowest.get("wait_s", 0.0), slowest["steps"]
    total_s = wait_s + slowest["busy_s"]
    found = {
        "step_s": total_s / steps,
        "data_wait_s": wait_s / steps,
        "data_wait_fraction": wait_s / total_s,
        "eta_h": num_left * total_s / steps / 3600,
        **{f"{name}_per_s": sum(sums.get(name, 0) for sums in ranks) / total_s for name in RATES},
    }
    if peak is not None:
        found["mfu"] = sum(sums.get("flops", 0) for sums in ranks) / total_s / peak / len(ranks)
    return {f"speed/{name}": value for name, value in found.items()}


def most(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the largest value of any rank."""
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]}


def used_memory(device: torch.device) -> dict[str, float]:
    """Return the memory of a process and its data workers, and of its GPU since the last call, in GiB."""
    processes = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
    found = {"memory/host_gib": sum(map(_resident, processes)) / GIB}
    if device.type == "cuda":
        found["memory/device_peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        found["memory/device_reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
        torch.cuda.reset_peak_memory_stats(device)
    return found


def _resident(process: int | None) -> int:
    """Return the bytes of memory that a process occupies; 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except FileNotFoundError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
