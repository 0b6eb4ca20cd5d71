import os
import signal
import subprocess
from types import SimpleNamespace
from unittest import mock

import lightning as L
import pytest

from vico_pl.callbacks.signals import STOP_SIGNALS, StopSignals, requeue


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_nothing_else_happens(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
    assert signal.getsignal(number) is before


def test_a_signal_before_training_reaches_the_first_step():
    stage = SimpleNamespace(stop_requested=None)
    with StopSignals() as stop:
        stop.on_train_batch_start(mock.Mock(spec=L.Trainer), stage)
        assert stage.stop_requested is False
        os.kill(os.getpid(), signal.SIGUSR1)
        stop.on_train_batch_start(mock.Mock(spec=L.Trainer), stage)
        assert stage.stop_requested is True


@pytest.mark.parametrize("agreed", [True, False])
def test_a_rank_stops_when_all_ranks_know_and_not_before(agreed):
    trainer = mock.Mock(spec=L.Trainer, should_stop=False, global_step=3)
    module = mock.Mock(spec=L.LightningModule)
    StopSignals().on_train_batch_end(trainer, module, {"stop": agreed}, None, 0)
    assert trainer.should_stop is agreed


def requeued(monkeypatch, **environment):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = mock.Mock()
    requeue(run)
    return [call.args[0] for call in run.call_args_list]


def test_a_job_is_queued_again_by_its_number(monkeypatch):
    assert requeued(monkeypatch) == []
    assert requeued(monkeypatch, SLURM_JOB_ID="7") == [["scontrol", "requeue", "7"]]
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "2"}
    assert requeued(monkeypatch, **array) == [["scontrol", "requeue", "8_2"]]


@pytest.mark.parametrize(
    "fault",
    [FileNotFoundError("scontrol"), subprocess.CalledProcessError(1, "scontrol", stderr="no such job")],
)
def test_a_job_that_cannot_be_queued_again_says_so(monkeypatch, fault):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    with pytest.warns(UserWarning, match="job 7 could not be requeued .*; submit it again, it resumes"):
        requeue(mock.Mock(side_effect=fault))
