import json
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from tests.helpers import encoded_sample
from vico_pl.callbacks.guards import (
    HISTORY,
    GradientGuard,
    StepSeed,
    SyncGuard,
    Watchdog,
    checksum,
    describe_frame,
)
from vico_pl.data.collate import collate
from vico_pl.types import RankBatch

NAN = float("nan")


def step(guard, norm, number=4):
    trainer = mock.Mock(spec=L.Trainer, global_step=number + 1, global_rank=0)
    batch = replace(collate([encoded_sample(1)]), ids=["a.tar/1"])
    share = RankBatch(micro_batches=[batch], bad_records=[], dummy=batch)
    guard.on_train_batch_end(trainer, mock.Mock(spec=L.LightningModule), {"grad_norm": norm}, share, 0)


@pytest.mark.filterwarnings("ignore:.*is skipped")
def test_three_steps_in_a_row_that_are_no_numbers_stop_the_run(tmp_path):
    guard = GradientGuard(tmp_path / "skipped.jsonl")
    for norm in (NAN, float("inf"), 1.0, NAN, NAN):
        step(guard, norm)
    with pytest.raises(
        ValueError, match="the gradients of 3 steps in a row are not finite, the last of step 4"
    ):
        step(guard, NAN)
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert lines[1] == {"step": 4, "rank": 0, "grad_norm": "inf", "ids": ["a.tar/1"]}


def test_a_skipped_step_is_told(tmp_path):
    with pytest.warns(UserWarning, match="step 4 is skipped: its gradient is nan"):
        step(GradientGuard(tmp_path / "skipped.jsonl"), NAN)


def test_a_spike_is_told_once_there_is_something_usual(tmp_path):
    guard = GradientGuard(tmp_path / "skipped.jsonl")
    step(guard, 50.0)
    for _ in range(HISTORY):
        step(guard, 1.0)
    step(guard, 9.0)
    with pytest.warns(UserWarning, match="step 4: the gradient norm is 11, usually 1"):
        step(guard, 11.0)
    assert not (tmp_path / "skipped.jsonl").exists()


def compare(*, others, strategy=DDPStrategy, at=20):
    stage = nn.Linear(3, 2)
    stage.ranks = SimpleNamespace(gather=lambda own: [own, *(own + other for other in others)])
    trainer = mock.Mock(spec=L.Trainer, global_step=at, strategy=mock.Mock(spec=strategy))
    batch = collate([encoded_sample(1)])
    SyncGuard(every=10).on_train_batch_end(
        trainer, stage, None, RankBatch(micro_batches=[batch], bad_records=[], dummy=batch), 0
    )


def test_ranks_that_drifted_apart_stop_the_run():
    with pytest.raises(ValueError, match=r"after step 20 ranks \[2\] have other weights than rank 0"):
        compare(others=[0, 1])
    compare(others=[0, 0])
    compare(others=[1], at=21)  # between two comparisons
    compare(others=[1], strategy=L.pytorch.strategies.SingleDeviceStrategy)


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


def test_a_step_that_takes_too_long_is_told_once_with_rank_place_and_stack(tmp_path, capsys):
    dog = Watchdog(tmp_path, limit_s=0.02)
    told = threading.Event()
    tell = dog._report
    dog._report = lambda *given: (tell(*given), told.set())
    dog.on_train_start(mock.Mock(spec=L.Trainer, global_rank=3, global_step=7))
    assert told.wait(60)
    dog.teardown()
    said = capsys.readouterr().err
    assert said.startswith("rank 3 has been at step 7 for ")
    assert "test_a_step_that_takes_too_long" in (tmp_path / "waiting-rank-3.txt").read_text()


def test_a_stack_is_described_by_our_innermost_function_and_what_it_waits_in():
    assert describe_frame(sys._getframe()) == "outside vico_pl, within " + sys._getframe().f_code.co_name
    assert describe_frame(None).startswith("in describe_frame (guards.py:")


def drawn(*, seed=1, step=2, rank=0):
    trainer = mock.Mock(spec=L.Trainer, global_step=step, global_rank=rank)
    StepSeed(seed).on_train_batch_start(trainer, mock.Mock(spec=L.LightningModule), None, 0)
    return torch.rand(4).tolist()


def test_random_numbers_of_a_step_depend_on_seed_step_and_rank_alone():
    first = drawn()
    torch.rand(100)
    assert drawn() == first
    assert len({tuple(x) for x in (first, drawn(seed=2), drawn(step=3), drawn(rank=1))}) == 4
