"""Tiny training runs on CPU: in this process, to observe and break them; in others, to signal and kill them.

A fork server with all imports starts those within a second. Ranks are started separately, as by Slurm.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import vico_pl.trainer
from tests.support.tiny import TILE
from vico_pl.audit import audit_run
from vico_pl.callbacks.checkpoints import newest_checkpoint
from vico_pl.callbacks.guards import StepSeed
from vico_pl.config import load_config
from vico_pl.prepare import prepare_run
from vico_pl.stages import build_stage
from vico_pl.trainer import train

STEPS = 6
PATIENCE_S = 240  # timeout of a wait
GRACE_S = 5  # for the ranks left after one fails
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(  # what `vico train` imports, the last two only when it needs them
    [
        "vico_pl.config",
        "vico_pl.trainer",
        "torch.utils.tensorboard",
        "transformers.models.qwen3.modeling_qwen3",
    ]
)


def recipe(folder, stage, shards, **sections):
    """Write a recipe of a tiny run that checkpoints every other step."""
    settings = {
        "stage": stage,
        "run_dir": str(folder / stage),
        "data": {
            "sources": [{"path": str(shards)}],
            "batch_size": 4,
            "num_workers": 0,
            "tiling": {"tile_size": TILE, "max_tiles": 2},
        },
        "optim": {"lr": 3e-3},
        "trainer": {"max_steps": STEPS, "checkpoint_every": 2, "log_every": 1, "accelerator": "cpu"},
        **sections,
    }
    path = folder / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(recipe_path, *overrides):
    return train(prepare_run(recipe_path, overrides))


def weights(run_dir):
    return load_file(run_dir / "model" / "model.safetensors")


def differing(run_dir, other):
    ours, theirs = weights(run_dir), weights(other)
    return {name for name in ours.keys() | theirs.keys() if not same(ours.get(name), theirs.get(name))}


def same(a, b):
    return a is not None and b is not None and torch.equal(a, b)


def metrics(run_dir, *, timed=False):
    """The logged points of a run, without figures that depend on the machine unless `timed`."""
    points = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    hidden = () if timed else ("speed/", "memory/")
    return [{k: v for k, v in point.items() if not k.startswith(hidden)} for point in points]


def before_each_step(action):
    """Call `action(trainer, stage)` before each step of a process."""
    seed = StepSeed.on_train_batch_start

    def act_then_seed(callback, trainer, stage, *rest):
        action(trainer, stage)
        seed(callback, trainer, stage, *rest)

    StepSeed.on_train_batch_start = act_then_seed


def slow_steps(_):
    """Slow down steps, so that a signal can arrive within one."""
    before_each_step(lambda *_: time.sleep(0.05))


def slow_steps_of_a_group(rank):
    """Do so with data workers, which hold the lock of the run, killable together with the rank."""
    os.setpgid(0, 0)
    slow_steps(rank)


def watch_steps(monkeypatch, before_step):
    """Call `before_step(stage)` before each step of a run."""

    def build(*args):
        stage = build_stage(*args)
        results = stage.results

        def watched(micro_batches):
            before_step(stage)
            return results(micro_batches)

        stage.results = watched
        return stage

    monkeypatch.setattr(vico_pl.trainer, "build_stage", build)


def break_run(monkeypatch, path, *overrides):
    """Start a run that fails at step five."""

    def break_at_step_five(stage):
        if stage.trainer.global_step == 5:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        watch_steps(patch, break_at_step_five)
        with pytest.raises(RuntimeError, match="power cut"):
            run(path, *overrides)


@dataclass(frozen=True, kw_only=True)
class Running:
    """A run with one process per rank."""

    run_dir: Path
    ranks: list[multiprocessing.Process]
    log: Path

    def said(self):
        return self.log.read_text()

    def signal(self, number, *, ranks=None):
        """Send a signal to all or some ranks; ended ones ignore it."""
        for rank in range(len(self.ranks)) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.ranks[rank].pid, number)

    def wait_for(self, happened):
        """Wait for a condition; fail if all ranks end or time runs out first."""
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            if not any(rank.is_alive() for rank in self.ranks) or time.monotonic() > deadline:
                pytest.fail(f"the expected event did not happen; output: {self.said()}")
            time.sleep(0.01)

    def wait_for_checkpoint(self, *, step):
        self.wait_for(lambda: newest_step(self.run_dir) >= step)

    def wait(self, *, supervised=False):
        """Wait for the end; return the exit codes. `supervised` kills the others soon after a rank fails."""
        deadline = time.monotonic() + PATIENCE_S
        while any(rank.is_alive() for rank in self.ranks) and time.monotonic() < deadline:
            time.sleep(0.01)
            if supervised and any(rank.exitcode not in (None, 0) for rank in self.ranks):
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if supervised:
            self.signal(signal.SIGKILL)
            for rank in self.ranks:
                rank.join()
        waiting = [number for number, rank in enumerate(self.ranks) if rank.is_alive()]
        if waiting:
            self.signal(signal.SIGKILL)
            pytest.fail(f"ranks {waiting} did not end; output: {self.said()}")
        return [rank.exitcode for rank in self.ranks]


def start(recipe, run_dir, *settings, ranks=1, before=None):
    """Start a run; each rank calls `before(rank)` first, in its own process."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    log, port = run_dir.parent / f"{run_dir.name}.log", free_port()
    command = ["train", str(recipe), f"run_dir={run_dir}", f"trainer.devices={ranks}", *map(str, settings)]
    processes = [
        _FORKED.Process(target=_train, args=(command, log, rank, ranks, port, before))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return Running(run_dir=run_dir, ranks=processes, log=log)


def finish(recipe, run_dir, *settings, **options):
    """Run to the end, or fail with the output."""
    running = start(recipe, run_dir, *settings, **options)
    codes = running.wait()
    assert set(codes) == {0}, running.said()
    return running


def kill_at_random(recipe, run_dir, *settings, rng, ranks=1):
    """Start a run and kill -9 some or all ranks at a random moment; returns the run."""
    before = num_lines(run_dir)
    running = start(recipe, run_dir, *settings, ranks=ranks)
    victims = rng.choice([[rank] for rank in range(ranks)] + [list(range(ranks))])
    lines, delay_s = rng.choice([(0, 1.5), (0, 1.5), *((lines, 0.2) for lines in range(1, 7))])
    while num_lines(run_dir) < before + lines and running.ranks[0].is_alive():
        time.sleep(0.002)
    running.ranks[0].join(rng.uniform(0, delay_s))
    running.signal(signal.SIGKILL, ranks=victims)
    return running


def num_lines(run_dir):
    """Lines that rank 0 has logged: one per attempt and one per step."""
    path = run_dir / "samples-rank-0.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def newest_step(run_dir):
    """The step of the newest checkpoint; 0 without one."""
    path = newest_checkpoint(run_dir)
    return 0 if path is None else int(path.stem.split("-")[1])


def steps_taken(run_dir, *, rank=0):
    """Steps that a rank has finished, the maximum over attempts."""
    path = run_dir / f"samples-rank-{rank}.jsonl"
    steps = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # truncated by a kill
            steps.append(json.loads(line).get("step", -1) + 1)
    return max(steps, default=0)


def audit(run_dir):
    """Audit the sample logs of a finished run."""
    config = load_config(run_dir / "config.yaml", [])
    steps = config.trainer.max_steps
    return audit_run(run_dir, config.data, seed=config.seed, completed_steps=steps)


def free_port():
    """Return an unused port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _train(command, log, rank, ranks, port, before):
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if ranks > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    # Data workers are forked as in a process that a user starts, so they share its process group and patches.
    multiprocessing.set_start_method("fork", force=True)
    if before is not None:
        before(rank)
    from vico_pl.cli import main

    sys.argv = ["vico", *command]
    main()
