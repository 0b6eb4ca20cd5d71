import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from tests.callbacks.steps import StageLog, TrainerAt, rank_batch
from vico_pl.callbacks.guards import (
    HISTORY,
    GradientGuard,
    StepSeed,
    StopSignals,
    SyncGuard,
    Watchdog,
    checksum,
    describe_frame,
    requeue,
)
from vico_pl.errors import STOP_SIGNALS

NAN = float("nan")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_reaches_the_next_step(number):
    before, stage = signal.getsignal(number), StageLog()
    with StopSignals() as stop:
        stop.on_train_batch_start(TrainerAt(0), stage)
        assert stage.stop_requested is False
        os.kill(os.getpid(), number)
        assert stop.received == number
        stop.on_train_batch_start(TrainerAt(0), stage)
        assert stage.stop_requested is True
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("agreed", [True, False])
def test_a_rank_stops_when_all_ranks_know_and_not_before(agreed):
    trainer = TrainerAt(3)
    StopSignals().on_train_batch_end(trainer, StageLog(), {"stop": agreed})
    assert trainer.should_stop is agreed


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, "7"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "2"}, "8_2"),
    ],
)
def test_a_job_is_queued_again_by_its_number(monkeypatch, environment, name):
    for variable in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    commands = []
    requeue(lambda command, **_: commands.append(command))
    assert commands == ([["scontrol", "requeue", name]] if name else [])


@pytest.mark.parametrize(
    "fault",
    [FileNotFoundError("scontrol"), subprocess.CalledProcessError(1, "scontrol", stderr="no such job")],
)
def test_a_job_that_cannot_be_queued_again_says_so(monkeypatch, fault):
    def fail(*_, **__):
        raise fault

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    with pytest.warns(UserWarning, match="job 7 could not be requeued .*; submit it again, it resumes"):
        requeue(fail)


def step(guard, norm, num_left_out=0):
    out = {"grad_norm": norm, "num_left_out": num_left_out}
    guard.on_train_batch_end(TrainerAt(5), StageLog(), out, rank_batch(), 4)


@pytest.mark.filterwarnings("ignore:.*is skipped")
def test_three_steps_in_a_row_with_non_finite_gradients_stop_the_run(tmp_path):
    guard = GradientGuard(tmp_path / "skipped.jsonl")
    for norm in (NAN, float("inf"), 1.0, NAN, NAN):
        step(guard, norm)
    expected = "the gradients of 3 steps in a row are not finite, the last of step 4"
    with pytest.raises(ValueError, match=expected):
        step(guard, NAN)
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert lines[1] == {"step": 4, "rank": 0, "grad_norm": "inf", "ids": ["a.tar/1"]}
    with pytest.warns(UserWarning, match="step 4 is skipped: its gradient is nan"):
        step(GradientGuard(tmp_path / "skipped.jsonl"), NAN)


@pytest.mark.filterwarnings("ignore:.*are not finite and left out")
def test_three_steps_in_a_row_with_loss_ratios_left_out_stop_the_run(tmp_path):
    guard = GradientGuard(tmp_path / "skipped.jsonl")
    for num_left_out in (1, 2, 0, 1, 1):
        step(guard, 1.0, num_left_out)
    with pytest.raises(ValueError, match=r"loss ratios of 3 steps in a row are not finite.*model\.reference"):
        step(guard, 1.0, 1)


@pytest.mark.filterwarnings("ignore:.*is skipped")
def test_a_run_has_trained_once_a_gradient_was_finite_and_not_zero(tmp_path):
    guard = GradientGuard(tmp_path / "skipped.jsonl")
    for norm, trained in ((0.0, False), (NAN, False), (0.5, True), (0.0, True)):
        step(guard, norm)
        assert guard.has_trained is trained
    resumed = GradientGuard(tmp_path / "skipped.jsonl")
    for states, trained in (({guard.state_key: {"has_trained": False}}, False), ({}, True)):
        resumed.on_load_checkpoint(TrainerAt(5), StageLog(), {"callbacks": states})
        assert resumed.has_trained is trained  # one of an earlier version does not say


def test_a_spike_is_reported_once_there_is_something_usual(tmp_path):
    guard = GradientGuard(tmp_path / "skipped.jsonl")
    for norm in (50.0, *[1.0] * HISTORY, 9.0):
        step(guard, norm)
    with pytest.warns(UserWarning, match="step 4: the gradient norm is 11, usually 1"):
        step(guard, 11.0)
    assert not (tmp_path / "skipped.jsonl").exists()


class Ranks:
    """Three ranks, of which the last may have other weights."""

    def __init__(self, difference):
        self.difference = difference

    def gather(self, own):
        return [own, own, own + self.difference]


def test_ranks_that_drifted_apart_stop_the_run():
    stage, compare = nn.Linear(3, 2), SyncGuard(every=10).on_train_batch_end
    stage.ranks = Ranks(0)
    compare(TrainerAt(20, strategy=DDPStrategy()), stage)
    stage.ranks = Ranks(1)
    compare(TrainerAt(21, strategy=DDPStrategy()), stage)  # between two comparisons
    compare(TrainerAt(20, strategy=SingleDeviceStrategy()), stage)
    with pytest.raises(ValueError, match=r"after step 20 ranks \[2\] have other weights than rank 0"):
        compare(TrainerAt(20, strategy=DDPStrategy()), stage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_changes_with_any_bit_of_what_is_trained(dtype):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).to(dtype)
    model[1].bias.requires_grad_(requires_grad=False)
    first = checksum(model)
    assert checksum(model) == first
    with torch.no_grad():
        model[1].bias += 1
        assert checksum(model) == first
        model[0].weight[1, 2] = torch.nextafter(model[0].weight[1, 2], torch.tensor(9.0, dtype=dtype))
    assert checksum(model) != first


def test_a_step_that_takes_too_long_is_reported_with_rank_place_and_stack(tmp_path, capsys):
    dog = Watchdog(tmp_path, limit_s=0.02)
    dog.on_train_start(TrainerAt(7, rank=3))
    dog._timer.join(60)
    assert capsys.readouterr().err.startswith("rank 3 has been at step 7 for ")
    assert "test_a_step_that_takes_too_long" in (tmp_path / "waiting-rank-3.txt").read_text()


@pytest.mark.parametrize("event", ["on_train_batch_end", "on_validation_batch_end"])
def test_steps_in_time_are_not_reported(tmp_path, event):
    dog = Watchdog(tmp_path, limit_s=0.4)
    dog.on_train_start(TrainerAt(7))
    for _ in range(3):
        time.sleep(0.2)
        getattr(dog, event)(TrainerAt(8))
    dog.teardown()
    time.sleep(0.3)
    assert list(tmp_path.iterdir()) == []


def test_a_stack_is_described_by_our_innermost_function_and_what_it_waits_in():
    assert describe_frame(sys._getframe()) == "outside vico_pl, within " + sys._getframe().f_code.co_name
    assert describe_frame(None).startswith("in describe_frame (guards.py:")


def drawn(*, seed=1, step=2, rank=0):
    StepSeed(seed).on_train_batch_start(TrainerAt(step, rank=rank), StageLog(), None, 0)
    return torch.rand(4).tolist()


def test_random_numbers_of_a_step_depend_on_seed_step_and_rank_alone():
    first = drawn()
    torch.rand(100)
    assert drawn() == first
    assert len({tuple(x) for x in (first, drawn(seed=2), drawn(step=3), drawn(rank=1))}) == 4
