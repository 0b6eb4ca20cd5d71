import math
from contextlib import contextmanager
from dataclasses import replace

import lightning as L
import pytest
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader

from tests.support.tiny import batch_of, encoded_sample, tiny_model
from vico_pl.config import RunConfig
from vico_pl.data.collate import collate
from vico_pl.optim import OptimConfig
from vico_pl.stages.base import Stage, StepResult
from vico_pl.stages.figures import Mean, Ranks
from vico_pl.types import BadRecord, RankBatch

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning")
RUN = RunConfig(stage="toy", run_dir="x", optim=OptimConfig(max_grad_norm=1e9))
QUIET = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)


class WeightTimesTokens(Stage):
    """A loss of (weight - token id) squared over the response tokens."""

    name = "toy"

    def __init__(self):
        super().__init__(RUN, tiny_model())
        self.weight, self.events = nn.Parameter(torch.tensor(1.0)), []

    def step(self, batch):
        ids = batch.input_ids[batch.response_mask]
        return StepResult(loss_sum=(self.weight - ids).square().sum(), metrics={"toy/seen": Mean(3.0, 1)})

    def manual_backward(self, loss):
        self.events.append(loss.item())
        super().manual_backward(loss)

    @contextmanager
    def _gradients_stay_local(self):
        self.events.append("kept")
        yield


class Others:
    """Ranks beside this one, whose counts and numbers of micro-batches are known."""

    def __init__(self, *others):
        self.world, self._others = 1 + len(others), others

    def sums_and_largest(self, counts, number):
        sums = {name: value + sum(other[name] for other in self._others) for name, value in counts.items()}
        return sums, max([number, *(other["num_micro_batches"] for other in self._others)])

    def gather(self, value):
        return [value] * self.world


class Watched(L.Callback):
    """One training step of a rank and what it leaves behind."""

    def __init__(self, rank_batch, *others):
        self.stage, self.others, self.num_updates = WeightTimesTokens(), others, 0
        trainer = L.Trainer(accelerator="cpu", max_steps=1, log_every_n_steps=1, callbacks=self, **QUIET)
        trainer.fit(self.stage, DataLoader([rank_batch], batch_size=None))
        assert self.stage.weight.grad is None
        self.logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.loss = sum(event for event in self.stage.events if event != "kept")

    def on_train_start(self, trainer, stage):
        stage.ranks = Others(*self.others)

    def on_before_optimizer_step(self, trainer, stage, optimizer):
        self.num_updates += 1
        self.gradient = None if stage.weight.grad is None else stage.weight.grad.item()

    def on_train_batch_end(self, trainer, stage, outputs, *_):
        self.outputs = outputs


def other(**known):
    return {"num_micro_batches": 1, "num_items": 0, "num_samples": 0, "num_bad": 0, "stop": 0, **known}


def rank_batch(*micro_batches, bad=()):
    dummy = collate([encoded_sample(0, images=(1,), answers=())], positions=[-1])
    return RankBatch(micro_batches=list(micro_batches), bad_records=list(bad), dummy=dummy)


def test_the_loss_is_the_mean_over_response_tokens():
    batch = batch_of(encoded_sample(1, answers=(3,)), encoded_sample(2, answers=(1,)))
    ids = batch.input_ids[batch.response_mask].float()
    found = Watched(rank_batch(batch))
    assert found.loss == pytest.approx((1 - ids).square().mean().item(), rel=1e-6)
    assert found.logged == {
        "toy/loss": pytest.approx(found.loss),
        "toy/seen": 3.0,
        "optim/lr": pytest.approx(RUN.optim.lr),
        "optim/grad_norm": pytest.approx(abs(found.gradient)),
    }


def test_any_split_into_micro_batches_gives_the_step_of_the_whole_batch():
    samples = [encoded_sample(i, answers=(n,)) for i, n in ((1, 3), (2, 9), (3, 1))]
    whole = Watched(rank_batch(batch_of(*samples)))
    split = Watched(rank_batch(*map(batch_of, samples)))
    assert split.gradient == pytest.approx(whole.gradient, rel=1e-6)
    assert split.logged == pytest.approx(whole.logged, rel=1e-6)
    # Gradients are exchanged with the last micro-batch alone.
    assert [event for event in split.stage.events if event == "kept"] == split.stage.events[:-1:2]


def test_any_split_over_ranks_gives_the_gradient_of_the_whole_batch():
    # Ranks with 3 and 9 response tokens: a mean of their means would weigh tokens of the first three times.
    first, second = encoded_sample(1, answers=(3,)), encoded_sample(2, answers=(9,))
    whole = Watched(rank_batch(batch_of(first, second)))
    ranks = [
        Watched(rank_batch(batch_of(sample)), other(num_items=others))
        for sample, others in ((first, 9), (second, 3))
    ]
    mean_gradient = sum(rank.gradient for rank in ranks) / 2  # as DDP computes it
    assert mean_gradient == pytest.approx(whole.gradient, rel=1e-6)
    assert sum(rank.loss for rank in ranks) / 2 == pytest.approx(whole.loss, rel=1e-6)


def test_a_rank_with_fewer_micro_batches_runs_dummies_that_change_nothing():
    batch = batch_of(encoded_sample(1, answers=(3,)))
    alone, beside = Watched(rank_batch(batch)), Watched(rank_batch(batch), other(num_micro_batches=3))
    assert len(beside.stage.events) == 3 + 2
    assert beside.gradient == pytest.approx(2 * alone.gradient)  # halved by the mean over two ranks


def test_a_step_without_anything_to_learn_from_is_zero():
    found = Watched(rank_batch(batch_of(encoded_sample(1, answers=()))))
    assert (found.loss, found.gradient) == (0, 0)
    assert "toy/loss" not in found.logged


def test_callbacks_are_reported_of_all_ranks():
    bad = [BadRecord(id="a", reason="b")] * 2
    beside = other(num_samples=6, num_bad=1, stop=1)
    found = Watched(rank_batch(batch_of(encoded_sample(1)), bad=bad), beside)
    norm = pytest.approx(abs(found.gradient))
    expected = {"num_samples": 9, "num_bad": 3, "grad_norm": norm, "stop": 1}
    assert {name: found.outputs[name] for name in expected} == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_a_non_finite_gradient_changes_no_weight_and_counts(value, monkeypatch):
    step = WeightTimesTokens.step
    broken = lambda stage, batch: replace(step(stage, batch), loss_sum=value * stage.weight)  # noqa: E731
    monkeypatch.setattr(WeightTimesTokens, "step", broken)
    found = Watched(rank_batch(batch_of(encoded_sample(1))))
    assert found.stage.weight.item() == 1.0
    assert (found.gradient, found.num_updates) == (None, 1)
    assert not math.isfinite(found.outputs["grad_norm"])


@pytest.mark.parametrize("exchange", [lambda ranks: ranks.gather(1), lambda ranks: ranks.largest(1)])
def test_a_rank_that_lost_another_says_so_in_a_sentence(monkeypatch, exchange):
    def closed(*_, **__):
        raise RuntimeError("Connection closed by peer\nand more of that")

    monkeypatch.setattr(distributed, "new_group", lambda **_: None)
    for collective in ("all_gather_object", "all_reduce"):
        monkeypatch.setattr(distributed, collective, closed)
    expected = r"another rank has ended \(Connection closed by peer\); see its log for the reason"
    with pytest.raises(ConnectionError, match=expected):
        exchange(Ranks(2))
