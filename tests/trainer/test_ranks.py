"""Runs of several real processes, and runs resumed with another number of ranks."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache

import pytest
import torch

from tests.support import runs as running
from tests.support.runs import (
    audit,
    break_run,
    differing,
    metrics,
    run,
    slow_steps_of_a_group,
    start,
    weights,
)
from vico_pl.callbacks import sharded
from vico_pl.callbacks.checkpoints import AtomicCheckpointIO, newest_checkpoint
from vico_pl.callbacks.sharded import read_checkpoint
from vico_pl.files import remove
from vico_pl.prepare import is_finished
from vico_pl.trainer import export_checkpoint

EXACT = ["seed=3", "model.dropout=0.3"]
ADAPTED = [
    "model.trainable=[vision,connectors,lora]",
    "model.lora={rank: 4}",
    "trainer.activation_checkpointing=true",
]
MIXED = ["trainer.precision=bf16-mixed", "model.frozen_dtype=bfloat16"]


def finish(recipe, run_dir, *settings, ranks, strategy):
    running.finish(recipe, run_dir, *EXACT, f"trainer.strategy={strategy}", *settings, ranks=ranks)
    assert is_finished(run_dir)


def assert_alike(run_dir, other, *, tolerance):
    """Same curve and weights up to the order of float sums, which Adam amplifies."""
    ours, theirs = ({line["step"]: line for line in metrics(folder)} for folder in (run_dir, other))
    # A line is written just after the checkpoint of its step: a kill in between loses it.
    assert len(theirs) - 2 <= len(ours.keys() & theirs.keys()) == len(ours)
    for step, line in ours.items():
        for name in line.keys() - {"router/auroc"}:  # of tiles within a micro-batch, not over micro-batches
            assert line[name] == pytest.approx(theirs[step][name], rel=tolerance, abs=1e-7), name
    expected = weights(other)
    for name, tensor in weights(run_dir).items():
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def alone(runs, tmp_path_factory):
    """Give the folder of a stage's run in one process."""

    @cache
    def run_of(stage):
        folder = tmp_path_factory.mktemp("alone") / stage
        run(runs / f"{stage}.yaml", f"run_dir={folder}", *EXACT)
        return folder

    return run_of


@pytest.mark.parametrize(
    ("stage", "ranks", "strategy"),
    [
        ("pretrain", 2, "fsdp"),
        ("consistency", 4, "ddp"),
        ("consistency", 2, "fsdp"),
        ("router", 2, "ddp"),
        ("router", 2, "fsdp"),
        ("routed/consistency", 2, "fsdp"),
    ],
)
def test_any_number_of_ranks_gives_the_run_of_one(runs, alone, tmp_path, stage, ranks, strategy):
    several = tmp_path / "several"
    finish(runs / f"{stage}.yaml", several, ranks=ranks, strategy=strategy)
    assert_alike(several, alone(stage), tolerance=2e-3)
    assert audit(several).faults == []


@pytest.mark.parametrize(
    "strategies",
    [
        pytest.param(("ddp", "auto", "ddp"), marks=pytest.mark.slow),
        pytest.param(("fsdp", "fsdp", "fsdp"), marks=pytest.mark.slow),
        ("fsdp", "auto", "ddp"),
    ],
)
def test_a_killed_run_is_finished_by_other_numbers_of_ranks_and_workers(runs, tmp_path, strategies):
    recipe, unbroken, changed = runs / "consistency.yaml", tmp_path / "unbroken", tmp_path / "changed"
    length = "trainer.max_steps=12"
    run(recipe, f"run_dir={unbroken}", *EXACT, length)
    for step, ranks, workers, strategy in zip((2, 6), (2, 1), (1, 2), strategies[:2], strict=True):
        parallel = [f"data.num_workers={workers}", f"trainer.strategy={strategy}"]
        running = start(recipe, changed, *EXACT, length, *parallel, ranks=ranks, before=slow_steps_of_a_group)
        running.wait_for_checkpoint(step=step)
        for rank in running.ranks:
            os.killpg(rank.pid, signal.SIGKILL)
        running.wait(supervised=True)
    finish(recipe, changed, length, ranks=4, strategy=strategies[2])
    assert_alike(changed, unbroken, tolerance=5e-3)
    found = audit(changed)
    assert (found.faults, found.num_steps, found.num_attempts) == ([], 12, 3)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_killed_ranks_end_with_the_weights_of_an_unbroken_run_bit_for_bit(runs, tmp_path, strategy):
    """One command starts both ranks; the others in this file are started as by Slurm."""
    recipe, unbroken, killed = runs / "consistency.yaml", tmp_path / "unbroken", tmp_path / "killed"
    finish(recipe, unbroken, ranks=2, strategy=strategy)
    settings = [*EXACT, "trainer.devices=2", f"trainer.strategy={strategy}"]
    command = [sys.executable, "-m", "vico_pl", "train", str(recipe), f"run_dir={killed}", *settings]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    while process.poll() is None and not (killed / "checkpoints" / "step-00000002.ckpt").exists():
        time.sleep(0.005)
    assert process.poll() is None, (tmp_path / "log").read_text()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=200)
    finish(recipe, killed, ranks=2, strategy=strategy)
    assert differing(killed, unbroken) == set()


def stay_near(run_dir, other, *, loss):
    """Compare the curves of two runs."""
    ours, theirs = ({line["step"]: line for line in metrics(folder)} for folder in (run_dir, other))
    assert ours.keys() == theirs.keys()
    for step, line in ours.items():
        for name, tolerance in (("consistency/loss", loss), ("optim/grad_norm", 10 * loss)):
            assert line[name] == pytest.approx(theirs[step][name], rel=tolerance, abs=1e-7), (step, name)


def apart(run_dir, other, *, start):
    """Distance between the weights of two runs over the distance that one has moved."""
    ours, theirs, began = map(weights, (run_dir, other, start))
    pairs = [(ours[n], theirs[n]) for n in began], [(theirs[n], began[n]) for n in began]
    lengths = [sum((a.double() - b.double()).square().sum() for a, b in pair) for pair in pairs]
    return float(lengths[0] / lengths[1]) ** 0.5


def go_on_from(run_dir, *, step):
    """Remove what a run wrote after a checkpoint."""
    for path in (run_dir / "checkpoints").glob("step-*.ckpt"):
        if path.name > f"step-{step:08d}.ckpt":
            remove(path)
    (run_dir / "model" / "config.json").unlink(missing_ok=True)


# bfloat16 keeps 8 bits of a number. Sharded weights are rounded before they compute, hidden states between
# blocks; a single process rounds only what is multiplied. Losses came out up to 1 % apart, weights 3 %.
@pytest.mark.parametrize(
    ("settings", "loss", "weight"),
    [pytest.param([], 1e-5, 2e-3, id="float32"), pytest.param(MIXED, 0.03, 0.1, id="bf16-mixed")],
)
def test_adapters_and_recomputation_go_on_sharded_and_back(
    runs, tmp_path, monkeypatch, settings, loss, weight
):
    recipe, alone, changing = runs / "consistency.yaml", tmp_path / "alone", tmp_path / "changing"
    settings = [*ADAPTED, *settings]
    run(recipe, f"run_dir={alone}", *EXACT, *settings)
    break_run(monkeypatch, recipe, f"run_dir={changing}", *EXACT, *settings)
    go_on_from(changing, step=2)
    finish(recipe, changing, *settings, ranks=2, strategy="fsdp")
    stay_near(changing, alone, loss=loss)
    checkpoint = read_checkpoint(newest_checkpoint(changing))
    (optimizer,) = checkpoint["optimizer_states"]
    saved = [checkpoint["state_dict"], *optimizer["state"].values()]
    assert {tensor.dtype for tensors in saved for tensor in tensors.values()} == {torch.float32}
    go_on_from(changing, step=4)
    run(recipe, f"run_dir={changing}", *EXACT, *settings)
    stay_near(changing, alone, loss=loss)
    assert apart(changing, alone, start=runs / "pretrain") < weight
    assert audit(changing).faults == []


def die_before_meta(_):
    """Kill the first rank in its second save, once all ranks have written their parts."""
    die_at_the_second_call("_finish")


def die_before_the_rename(_):
    """Kill it once the folder is complete."""
    die_at_the_second_call("publish")


def die_at_the_second_call(name):
    calls, function = iter(range(1000)), getattr(sharded, name)

    def act(*args):
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        function(*args)

    setattr(sharded, name, act)


@pytest.fixture(scope="module")
def sharded_run(runs, tmp_path_factory):
    """The folder of a run that two ranks have finished."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    finish(runs / "pretrain.yaml", folder, ranks=2, strategy="fsdp")
    return folder


@pytest.mark.parametrize("moment", [die_before_meta, die_before_the_rename])
def test_a_folder_whose_save_was_killed_never_appears(runs, tmp_path, moment):
    recipe, killed = runs / "pretrain.yaml", tmp_path / "killed"
    settings = [*EXACT, "trainer.strategy=fsdp"]
    started = start(recipe, killed, *settings, ranks=2, before=moment)
    started.wait(supervised=True)
    names = {path.name for path in (killed / "checkpoints").iterdir()}
    assert names == {"step-00000002.ckpt", "last.ckpt", ".step-00000004.ckpt.partial"}
    assert newest_checkpoint(killed).name == "step-00000002.ckpt"
    finish(recipe, killed, ranks=2, strategy="fsdp")
    assert not list((killed / "checkpoints").glob(".*"))


def test_a_folder_and_a_file_of_its_content_resume_alike_bit_for_bit(runs, tmp_path):
    """One process reads what two wrote, and two what one wrote, as earlier versions did."""
    recipe, run_dir = runs / "consistency.yaml", tmp_path / "run"
    finish(recipe, run_dir, ranks=2, strategy="fsdp")
    expected, folder = weights(run_dir), newest_checkpoint(run_dir)
    assert folder.is_dir()
    export_checkpoint(folder, tmp_path / "exported" / "model")
    assert differing(tmp_path / "exported", run_dir) == set()
    go_on_from(run_dir, step=4)
    path = newest_checkpoint(run_dir)
    AtomicCheckpointIO().save_checkpoint(read_checkpoint(path), path)
    assert path.is_file()
    finish(recipe, run_dir, ranks=2, strategy="fsdp")
    assert weights(run_dir).keys() == expected.keys()
    assert {
        name for name, tensor in weights(run_dir).items() if not torch.equal(tensor, expected[name])
    } == set()


@pytest.mark.parametrize("damage", ["missing", "truncated", "no meta.pt"])
def test_a_damaged_folder_is_skipped(tmp_path, sharded_run, damage):
    run_dir = shutil.copytree(sharded_run, tmp_path / "run", symlinks=True)
    newest = newest_checkpoint(run_dir)
    part = newest / ("meta.pt" if damage == "no meta.pt" else "__1_0.distcp")
    if damage == "truncated":
        os.truncate(part, part.stat().st_size - 1)
    else:
        part.unlink()
    with pytest.warns(UserWarning, match=rf"{newest} is skipped: it cannot be read \(.*{part.name}"):
        assert newest_checkpoint(run_dir).name == "step-00000004.ckpt"


def fail_to_write(rank):
    """Let the second rank find the disk full when it writes its part."""
    write = sharded.FileSystemWriter.write_data

    def fail(*args):
        if rank == 1:
            raise OSError("No space left on device")
        return write(*args)

    sharded.FileSystemWriter.write_data = fail


def test_a_rank_that_cannot_write_its_part_ends_all_with_one_sentence(runs, tmp_path):
    settings = [*EXACT, "trainer.strategy=fsdp"]
    started = start(runs / "pretrain.yaml", tmp_path, *settings, ranks=2, before=fail_to_write)
    assert started.wait() == [2, 2], started.said()
    assert "could not be written (No space left on device); the previous checkpoint is" in started.said()
    assert not list((tmp_path / "checkpoints").iterdir())
