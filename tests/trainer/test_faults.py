"""Faults in real runs: the message, the state left behind, and that the same command then finishes.

`benchmarks/reliability.py` makes the table of docs/reliability.md from the properties recorded here.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from functools import cache

import pytest
import torch

from tests.helpers import record
from tests.processes import audit, finish, newest_step, start, steps_taken
from tests.runs import differing, metrics, recipe
from vico_pl.callbacks.checkpoints import newest_checkpoint
from vico_pl.callbacks.guards import StepSeed
from vico_pl.data.shards.reader import RecordReader, write_index, write_shard
from vico_pl.prepare import is_finished

STEPS = 12
SETTINGS = [f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=2"]


@pytest.fixture
def told(record_property):
    """Record a row of the table of faults."""

    def tell(fault, outcome, lost_steps):
        for name, value in {"fault": fault, "outcome": outcome, "lost_steps": lost_steps}.items():
            record_property(name, value)

    return tell


@pytest.fixture(scope="session")
def unbroken(runs, tmp_path_factory):
    """An uninterrupted run for each number of ranks."""

    @cache
    def run_of(ranks):
        folder = tmp_path_factory.mktemp("unbroken") / "run"
        finish(runs / "consistency.yaml", folder, *SETTINGS, ranks=ranks)
        return folder

    return run_of


def lost(run_dir):
    """Steps that must be repeated."""
    return steps_taken(run_dir) - newest_step(run_dir)


def assert_finishes_as(unbroken, recipe_path, run_dir, *settings, ranks=1):
    finish(recipe_path, run_dir, *SETTINGS, *settings, ranks=ranks)
    assert differing(run_dir, unbroken(ranks)) == set()
    assert audit(run_dir).faults == []


def slow_steps(_):
    """Slow down steps, so that a signal can arrive within one."""
    seed = StepSeed.on_train_batch_start

    def wait_then_seed(*args):
        time.sleep(0.05)
        seed(*args)

    StepSeed.on_train_batch_start = wait_then_seed


def slow_steps_of_a_group(rank):
    os.setpgid(0, 0)
    slow_steps(rank)


def endless_steps_of_a_group(_):
    os.setpgid(0, 0)
    StepSeed.on_train_batch_start = lambda *_: time.sleep(600)


def endless_reads_of_a_group(_):
    """Let the data worker hang, which also ignores the SIGTERM of PyTorch's loader."""
    os.setpgid(0, 0)
    RecordReader.__call__ = lambda *_: time.sleep(600)


# --- Asked to stop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "ranks", "told_ranks"),
    [
        (signal.SIGTERM, 1, [0]),
        pytest.param(signal.SIGUSR1, 2, [1], marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, [0, 1], marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_run_after_the_step_and_loses_nothing(
    runs, unbroken, tmp_path, told, number, ranks, told_ranks
):
    run_dir = tmp_path / "run"
    running = start(runs / "consistency.yaml", run_dir, *SETTINGS, ranks=ranks, before=slow_steps)
    running.wait_for_checkpoint(step=2)
    running.signal(number, ranks=told_ranks)
    assert set(running.wait()) == {0}, running.said()
    assert not is_finished(run_dir)
    assert f"Stopping on request: step {newest_step(run_dir)} is saved" in running.said()
    assert lost(run_dir) == 0
    assert_finishes_as(unbroken, runs / "consistency.yaml", run_dir, ranks=ranks)
    who = (
        "a process alone"
        if ranks == 1
        else f"rank {told_ranks[-1]} of {ranks}"
        if len(told_ranks) == 1
        else "all ranks"
    )
    told(f"{number.name} to {who}, within a step", "all end after the step, exit code 0", 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_process_group_ends_the_run_after_the_step(runs, unbroken, tmp_path, told, number):
    """Data workers get it, too: from `timeout`, systemd, Slurm and Ctrl-C."""
    run_dir = tmp_path / "run"
    running = start(
        runs / "consistency.yaml", run_dir, *SETTINGS, "data.num_workers=1", before=slow_steps_of_a_group
    )
    running.wait_for_checkpoint(step=2)
    os.killpg(running.ranks[0].pid, number)
    assert running.wait() == [0], running.said()
    assert f"Stopping on request: step {newest_step(run_dir)} is saved" in running.said()
    assert lost(run_dir) == 0
    assert_finishes_as(unbroken, runs / "consistency.yaml", run_dir)
    told(f"{number.name} to a process and its data worker", "all end after the step, exit code 0", 0)


@pytest.mark.parametrize(
    ("before", "when"),
    [(endless_steps_of_a_group, "within a step"), (endless_reads_of_a_group, "while a data worker hangs")],
)
def test_a_second_ctrl_c_ends_the_run_at_once(runs, unbroken, tmp_path, told, before, when):
    run_dir = tmp_path / "run"
    running = start(runs / "consistency.yaml", run_dir, *SETTINGS, "data.num_workers=1", before=before)
    running.wait_for(lambda: (run_dir / "samples-rank-0.jsonl").is_file())
    for _ in range(2):
        time.sleep(0.2)
        os.killpg(running.ranks[0].pid, signal.SIGINT)
    assert running.wait() == [130], running.said()
    assert "Stopping after this step. Press Ctrl-C again" in running.said()
    again = lost(run_dir)
    assert_finishes_as(unbroken, runs / "consistency.yaml", run_dir)
    told(f"Ctrl-C twice, {when}", "ends at once with exit code 130", again)


# --- Killed -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_soon(runs, unbroken, tmp_path, told, victim):
    run_dir = tmp_path / "run"
    running = start(runs / "consistency.yaml", run_dir, *SETTINGS, ranks=2, before=slow_steps)
    running.wait_for_checkpoint(step=2)
    time.sleep(random.Random(victim).uniform(0, 0.3))
    begun = time.monotonic()
    running.signal(signal.SIGKILL, ranks=[victim])
    codes = running.wait()
    waited = time.monotonic() - begun
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] not in (0, -signal.SIGKILL)
    assert "Connection closed by peer" in running.said() or "Connection reset" in running.said()
    assert waited < 60
    again = lost(run_dir)
    assert again <= 2 + 1
    assert_finishes_as(unbroken, runs / "consistency.yaml", run_dir, ranks=2)
    told(
        f"kill -9 of rank {victim} of 2",
        f"the other ended within {waited:.1f} s, naming the connection",
        again,
    )


# --- Checkpoints --------------------------------------------------------------------------------------------


def small_files(_):
    """Limit checkpoint files to 64 KiB, less than one needs, as on a full disk."""
    save = torch.save

    def save_what_fits(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
        try:
            save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    torch.save = save_what_fits


def stopped_at_a_checkpoint(recipe_path, run_dir):
    running = start(recipe_path, run_dir, *SETTINGS, before=slow_steps)
    running.wait_for_checkpoint(step=4)
    running.signal(signal.SIGKILL)
    running.wait(supervised=True)


def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoint_before(runs, unbroken, tmp_path, told):
    run_dir = tmp_path / "run"
    stopped_at_a_checkpoint(runs / "consistency.yaml", run_dir)
    before = newest_step(run_dir)
    running = start(runs / "consistency.yaml", run_dir, *SETTINGS, before=small_files)
    assert running.wait() == [2], running.said()
    assert "could not be written" in running.said()
    assert "the previous checkpoint is intact" in running.said()
    assert newest_step(run_dir) == before
    assert not list(run_dir.rglob("*.partial"))
    again = lost(run_dir)
    assert_finishes_as(unbroken, runs / "consistency.yaml", run_dir)
    told(
        "a write fails while a checkpoint is saved", "one sentence; the previous checkpoint is intact", again
    )


@contextlib.contextmanager
def small_disk(folder):
    """Mount a disk of 8 MiB."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_told_before_saving_begins(runs, unbroken, tmp_path, told):
    with small_disk(tmp_path / "disk") as disk:
        run_dir = disk / "run"
        stopped_at_a_checkpoint(runs / "consistency.yaml", run_dir)
        before, ballast = newest_step(run_dir), disk / "ballast"
        ballast.write_bytes(b"\1" * (shutil.disk_usage(disk).free - 2**17))
        running = start(runs / "consistency.yaml", run_dir, *SETTINGS)
        assert running.wait() == [2], running.said()
        assert "GiB are free and a checkpoint needs" in running.said()
        assert newest_step(run_dir) == before
        ballast.unlink()
        again = lost(run_dir)
        assert_finishes_as(unbroken, runs / "consistency.yaml", run_dir)
    told(
        "the disk has no room for a checkpoint",
        "one sentence before writing starts; the previous one is intact",
        again,
    )


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(runs, unbroken, tmp_path, told):
    run_dir = tmp_path / "run"
    stopped_at_a_checkpoint(runs / "consistency.yaml", run_dir)
    path = newest_checkpoint(run_dir)
    newest = newest_step(run_dir)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.warns(UserWarning, match="is skipped"):
        again = lost(run_dir)
    running = start(runs / "consistency.yaml", run_dir, *SETTINGS)
    assert running.wait() == [0], running.said()
    assert f"step-{newest:08d}.ckpt is skipped: it cannot be read" in running.said()
    assert differing(run_dir, unbroken(1)) == set()
    assert audit(run_dir).faults == []
    told("the newest checkpoint is truncated", "named and skipped; the previous one is used", again)


# --- Ranks that wait ----------------------------------------------------------------------------------------


def slow_rank_one(rank):
    """Let rank 1 hang in its fifth step."""
    seed, calls = StepSeed.on_train_batch_start, iter(range(1000))

    def hang_then_seed(*args):
        if rank == 1 and next(calls) == 4:
            time.sleep(6)
        seed(*args)

    StepSeed.on_train_batch_start = hang_then_seed


@pytest.mark.slow
def test_a_slow_rank_is_told_apart_from_those_that_wait_for_it(runs, unbroken, tmp_path, told):
    run_dir = tmp_path / "run"
    settings = [*SETTINGS, "trainer.watchdog_s=2"]
    running = start(runs / "consistency.yaml", run_dir, *settings, ranks=2, before=slow_rank_one)
    assert running.wait() == [0, 0], running.said()
    said = running.said()
    assert "rank 0 has been at step 4" in said
    assert "rank 1 has been at step 4" in said
    assert "all_gather_object" in (run_dir / "waiting-rank-0.txt").read_text()
    assert "hang_then_seed" in (run_dir / "waiting-rank-1.txt").read_text()
    assert differing(run_dir, unbroken(2)) == set()
    told(
        "a rank hangs for longer than trainer.watchdog_s",
        "each logs where it is; the stacks show which one hangs",
        0,
    )


# --- Numbers and data ---------------------------------------------------------------------------------------


def nan_from_step_six(_):
    """Make gradients NaN from step six on."""
    seed = StepSeed.on_train_batch_start

    def spoil_then_seed(callback, trainer, module, *rest):
        if trainer.global_step >= 6:
            first = next(p for p in module.parameters() if p.requires_grad and p.grad is None)
            first.register_hook(lambda gradient: gradient * float("nan"))
        seed(callback, trainer, module, *rest)

    StepSeed.on_train_batch_start = spoil_then_seed


def test_gradients_that_are_not_finite_change_no_weight_and_stop_the_run(runs, tmp_path, told):
    run_dir = tmp_path / "run"
    running = start(runs / "consistency.yaml", run_dir, *SETTINGS, before=nan_from_step_six)
    assert running.wait() == [2], running.said()
    assert "the gradients of 3 steps in a row are not finite, the last of step 8" in running.said()
    skipped = [json.loads(line) for line in (run_dir / "skipped_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in skipped] == [6, 7, 8]
    assert all(line["ids"] for line in skipped)
    before, after = (
        torch.load(path)["state_dict"] for path in sorted((run_dir / "checkpoints").glob("step*"))
    )
    assert newest_step(run_dir) == 8
    assert all(torch.equal(before[name], after[name]) for name in before)
    told(
        "non-finite gradients, three steps in a row",
        "no weight changed; samples in skipped_steps.jsonl; the run stops",
        "0 of those with finite gradients",
    )


def test_shards_that_vanish_are_counted_and_asked_for(runs, tmp_path, told):
    shards, run_dir = tmp_path / "shards", tmp_path / "run"
    names = [f"train-{number:06d}.tar" for number in range(24)]
    for name in names:
        write_shard(shards / name, [("0", record(text=f"<image>\n{name}?").files)])
    write_index(shards)
    model = {"path": str(runs / "pretrain" / "model"), "ratios": [4, 16]}
    path = recipe(tmp_path, "consistency", shards, model=model)
    running = start(path, run_dir, *SETTINGS, before=slow_steps)
    running.wait_for_checkpoint(step=2)
    gone = {name for name in names if name not in (run_dir / "samples-rank-0.jsonl").read_text()}
    for name in sorted(gone)[-3:]:
        (shards / name).rename(shards / f"{name}.gone")
    assert running.wait() == [0], running.said()
    bad = [json.loads(line) for line in (run_dir / "bad_records.jsonl").read_text().splitlines()]
    assert {next(name for name in names if name in line["reason"]) for line in bad} <= gone
    assert metrics(run_dir)[-1]["data/bad_records"] == len(bad) > 0
    assert all("absent; restore it" in line["reason"] for line in bad)
    for path in shards.glob("*.gone"):  # the audit reads the names of samples from their shards
        path.rename(path.with_suffix(""))
    assert audit(run_dir).faults == []
    told(
        "shards are removed during the run", "their samples count as bad and are logged; the run continues", 0
    )
