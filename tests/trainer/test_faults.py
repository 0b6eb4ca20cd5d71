"""Faults in real runs: the message, the state left behind, and that the same command then finishes.

`benchmarks/reliability.py` makes the table of docs/reliability.md from the properties recorded here.
"""

import contextlib
import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from tests.support.runs import (
    audit,
    before_each_step,
    differing,
    finish,
    metrics,
    newest_step,
    recipe,
    slow_steps,
    slow_steps_of_a_group,
    start,
    steps_taken,
)
from tests.support.tiny import record
from vico_pl.callbacks.checkpoints import newest_checkpoint
from vico_pl.callbacks.records import unpack_positions
from vico_pl.config import load_config
from vico_pl.data.module import build_order, open_sources
from vico_pl.data.shards.reader import RecordReader, write_index, write_shard
from vico_pl.prepare import is_finished
from vico_pl.tokens import load_tokenizer

SETTINGS = ["trainer.max_steps=12", "trainer.checkpoint_every=2"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run that meets a fault, and the row of the table of faults that it gives."""

    recipe: Path
    run_dir: Path
    unbroken: object  # (number of ranks) -> folder of an uninterrupted run
    record: object
    ranks: int = 1
    settings: list[str] = field(default_factory=list)

    def start(self, *settings, before=None):
        options = {"ranks": self.ranks, "before": before}
        return start(self.recipe, self.run_dir, *SETTINGS, *self.settings, *settings, **options)

    def start_until(self, *, step, before):
        running = self.start(before=before)
        running.wait_for_checkpoint(step=step)
        return running

    def fail(self, **options):
        """Run into an error that ends with one sentence."""
        running = self.start(**options)
        assert running.wait() == [2], running.said()
        return running.said()

    def lost_steps(self):
        return steps_taken(self.run_dir) - newest_step(self.run_dir)

    def finish(self):
        """Run the same command again, to the result of an uninterrupted run; return the steps lost."""
        lost = self.lost_steps()
        finish(self.recipe, self.run_dir, *SETTINGS, ranks=self.ranks)
        self.check_result()
        return lost

    def check_result(self):
        assert differing(self.run_dir, self.unbroken(self.ranks)) == set()
        assert audit(self.run_dir).faults == []

    def add_row(self, fault, outcome, lost_steps):
        for name, value in {"fault": fault, "outcome": outcome, "lost_steps": lost_steps}.items():
            self.record(name, value)


@pytest.fixture(scope="session")
def unbroken(runs, tmp_path_factory):
    @cache
    def run_of(ranks):
        folder = tmp_path_factory.mktemp("unbroken") / "run"
        finish(runs / "consistency.yaml", folder, *SETTINGS, ranks=ranks)
        return folder

    return run_of


@pytest.fixture
def case(runs, unbroken, tmp_path, record_property):
    path, run_dir = runs / "consistency.yaml", tmp_path / "run"
    return Case(recipe=path, run_dir=run_dir, unbroken=unbroken, record=record_property)


def endless_steps_of_a_group(_):
    os.setpgid(0, 0)
    before_each_step(lambda *_: time.sleep(600))


def endless_reads_of_a_group(_):
    """Let the data worker hang, which also ignores the SIGTERM of PyTorch's loader."""
    os.setpgid(0, 0)
    RecordReader.__call__ = lambda *_: time.sleep(600)


# --- Asked to stop, or killed -------------------------------------------------------------------------------


def stops_after_the_step(case, running):
    assert set(running.wait()) == {0}, running.said()
    assert not is_finished(case.run_dir)
    assert f"Stopping on request: step {newest_step(case.run_dir)} is saved" in running.said()
    assert case.finish() == 0


@pytest.mark.parametrize(
    ("number", "ranks", "signalled", "who"),
    [
        (signal.SIGTERM, 1, [0], "a process alone"),
        pytest.param(signal.SIGUSR1, 2, [1], "rank 1 of 2", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, [0, 1], "all ranks", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_run_after_the_step_and_loses_nothing(case, number, ranks, signalled, who):
    case = replace(case, ranks=ranks)
    running = case.start_until(step=2, before=slow_steps)
    running.signal(number, ranks=signalled)
    stops_after_the_step(case, running)
    case.add_row(f"{number.name} to {who}, within a step", "all end after the step, exit code 0", 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_process_group_ends_the_run_after_the_step(case, number):
    """Data workers get it, too: from `timeout`, systemd, Slurm and Ctrl-C."""
    case = replace(case, settings=["data.num_workers=1"])
    running = case.start_until(step=2, before=slow_steps_of_a_group)
    os.killpg(running.ranks[0].pid, number)
    stops_after_the_step(case, running)
    case.add_row(f"{number.name} to a process and its data worker", "all end after the step, exit code 0", 0)


@pytest.mark.parametrize(
    ("before", "when"),
    [(endless_steps_of_a_group, "within a step"), (endless_reads_of_a_group, "while a data worker hangs")],
)
def test_a_second_ctrl_c_ends_the_run_at_once(case, before, when):
    running = case.start("data.num_workers=1", before=before)
    running.wait_for(lambda: (case.run_dir / "samples-rank-0.jsonl").is_file())
    for _ in range(2):
        time.sleep(0.2)
        os.killpg(running.ranks[0].pid, signal.SIGINT)
    assert running.wait() == [130], running.said()
    assert "Stopping after this step. Press Ctrl-C again" in running.said()
    case.add_row(f"Ctrl-C twice, {when}", "ends at once with exit code 130", case.finish())


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_soon(case, victim):
    case = replace(case, ranks=2)
    running = case.start_until(step=2, before=slow_steps)
    time.sleep(random.Random(victim).uniform(0, 0.3))
    begun = time.monotonic()
    running.signal(signal.SIGKILL, ranks=[victim])
    codes = running.wait()
    waited = time.monotonic() - begun
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] not in (0, -signal.SIGKILL)
    assert "Connection closed by peer" in running.said() or "Connection reset" in running.said()
    assert waited < 60
    lost = case.finish()
    assert lost <= 2 + 1
    ended = f"the other ended within {waited:.1f} s, naming the connection"
    case.add_row(f"kill -9 of rank {victim} of 2", ended, lost)


# --- Checkpoints --------------------------------------------------------------------------------------------


def kill_at_a_checkpoint(case, before=slow_steps):
    running = case.start_until(step=4, before=before)
    running.signal(signal.SIGKILL)
    running.wait(supervised=True)
    return newest_step(case.run_dir)


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


def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoint_before(case):
    before = kill_at_a_checkpoint(case)
    said = case.fail(before=small_files)
    assert "could not be written" in said
    assert "the previous checkpoint is intact" in said
    assert newest_step(case.run_dir) == before
    assert not list(case.run_dir.rglob("*.partial"))
    outcome = "one sentence; the previous checkpoint is intact"
    case.add_row("a write fails while a checkpoint is saved", outcome, case.finish())


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


def test_a_full_disk_is_reported_before_saving_begins(case, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        case = replace(case, run_dir=disk / "run")
        before, ballast = kill_at_a_checkpoint(case), disk / "ballast"
        ballast.write_bytes(b"\1" * (shutil.disk_usage(disk).free - 2**17))
        assert "MiB are free and a checkpoint needs" in case.fail()
        assert newest_step(case.run_dir) == before
        ballast.unlink()
        lost = case.finish()
    outcome = "one sentence before writing starts; the previous one is intact"
    case.add_row("the disk has no room for a checkpoint", outcome, lost)


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(case):
    newest = kill_at_a_checkpoint(case)
    path = newest_checkpoint(case.run_dir)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.warns(UserWarning, match="is skipped"):
        lost = case.lost_steps()
    running = case.start()
    assert running.wait() == [0], running.said()
    assert f"step-{newest:08d}.ckpt is skipped: it cannot be read" in running.said()
    case.check_result()
    case.add_row("the newest checkpoint is truncated", "named and skipped; the previous one is used", lost)


def log_syncs(log, _):
    """Note which content is on disk for certain: file, size and last change when it was synced."""
    sync = os.fsync

    def sync_and_note(descriptor):
        sync(descriptor)
        with log.open("a") as file:
            file.write(content_of(os.fstat(descriptor)))

    os.fsync = sync_and_note
    slow_steps(_)


def content_of(status):
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}\n"


def cut_power(folder, log):
    """Empty the files that were not synced since their last change; of the folder, return if it was."""
    with log.open() as lines:
        on_disk = set(lines)
    for path in folder.rglob("*"):
        if path.is_file() and content_of(path.stat()) not in on_disk:
            os.truncate(path, 0)
    return content_of(folder.stat()) in on_disk


def test_a_power_cut_while_training_leaves_the_newest_checkpoint(case, tmp_path):
    before = kill_at_a_checkpoint(case, before=partial(log_syncs, tmp_path / "synced"))
    cut_power(case.run_dir / "checkpoints", tmp_path / "synced")
    assert newest_step(case.run_dir) == before
    assert (case.run_dir / "config.yaml").stat().st_size > 0
    outcome = "checkpoints are whole; without the syncs before renaming they would be empty"
    case.add_row("a power cut while it trains", outcome, case.finish())


def test_a_power_cut_after_the_end_leaves_a_whole_model(case, tmp_path):
    running = case.start(before=partial(log_syncs, tmp_path / "synced"))
    assert running.wait() == [0], running.said()
    names = {path.name for path in (case.run_dir / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert cut_power(case.run_dir / "model", tmp_path / "synced"), "a name may not be on disk"
    assert is_finished(case.run_dir)
    load_tokenizer(case.run_dir / "model")
    case.check_result()
    case.add_row("a power cut when it has ended", "weights, tokenizer and configuration are whole", 0)


def without_locks(_):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.flock = refuse


def test_a_file_system_without_locks_is_named_and_used(case):
    running = case.start(before=without_locks)
    assert running.wait() == [0], running.said()
    assert "its file system has no locks" in running.said()
    case.check_result()
    case.add_row("the file system has no locks", "said at the start; the run goes on without", 0)


# --- Ranks that wait, numbers and data ----------------------------------------------------------------------


def slow_rank_one(rank):
    """Let rank 1 hang in its fifth step."""
    calls = iter(range(1000))
    before_each_step(lambda *_: time.sleep(6) if rank == 1 and next(calls) == 4 else None)


@pytest.mark.slow
def test_a_slow_rank_is_reported_apart_from_those_that_wait_for_it(case):
    case = replace(case, ranks=2)
    running = case.start("trainer.watchdog_s=2", before=slow_rank_one)
    assert running.wait() == [0, 0], running.said()
    said = running.said()
    assert "rank 0 has been at step 4" in said
    assert "rank 1 has been at step 4" in said
    assert "sums_and_largest" in (case.run_dir / "waiting-rank-0.txt").read_text()
    assert "act_then_seed" in (case.run_dir / "waiting-rank-1.txt").read_text()
    case.check_result()
    outcome = "each logs where it is; the stacks show which one hangs"
    case.add_row("a rank hangs for longer than trainer.watchdog_s", outcome, 0)


def nan_from_step_six(_):
    """Make gradients NaN from step six on."""

    def spoil(trainer, stage):
        if trainer.global_step >= 6:
            first = next(p for p in stage.parameters() if p.requires_grad and p.grad is None)
            first.register_hook(lambda gradient: gradient * float("nan"))

    before_each_step(spoil)


def test_gradients_that_are_not_finite_change_no_weight_and_stop_the_run(case):
    said = case.fail(before=nan_from_step_six)
    assert "the gradients of 3 steps in a row are not finite, the last of step 8" in said
    skipped = [json.loads(line) for line in (case.run_dir / "skipped_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in skipped] == [6, 7, 8]
    assert all(line["ids"] for line in skipped)
    paths = sorted((case.run_dir / "checkpoints").glob("step*"))
    before, after = (torch.load(path)["state_dict"] for path in paths)
    assert newest_step(case.run_dir) == 8
    assert all(torch.equal(before[name], after[name]) for name in before)
    outcome = "no weight changed; samples in skipped_steps.jsonl; the run stops"
    case.add_row("non-finite gradients, three steps in a row", outcome, "0 of those with finite gradients")


def test_shards_that_vanish_are_counted_and_asked_for(case, runs, tmp_path):
    shards, run_dir = tmp_path / "shards", case.run_dir
    names = [f"train-{number:06d}.tar" for number in range(24)]
    for name in names:
        write_shard(shards / name, [("0", record(text=f"<image>\n{name}?").files)])
    write_index(shards)
    model = {"path": str(runs / "pretrain" / "model"), "ratios": [4, 16]}
    case = replace(case, recipe=recipe(tmp_path, "consistency", shards, model=model))
    config = load_config(case.recipe, [])
    order = build_order(config.data, open_sources(config.data), seed=config.seed)
    running = case.start_until(step=2, before=slow_steps)
    logged = (run_dir / "samples-rank-0.jsonl").read_text().splitlines()[1:]
    used = {
        order(position).sample for line in logged for position in unpack_positions(json.loads(line)["used"])
    }
    gone = {name for number, name in enumerate(names) if number not in used}
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
    outcome = "their samples count as bad and are logged; the run continues"
    case.add_row("shards are removed during the run", outcome, 0)
