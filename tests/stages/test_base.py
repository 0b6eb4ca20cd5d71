import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn

from tests.helpers import batch_of, encoded_sample
from vico_pl.data.collate import collate
from vico_pl.optim import OptimConfig
from vico_pl.stages.base import Mean, RankFacts, Ranks, Stage, StepResult
from vico_pl.types import BadRecord, RankBatch


class WeightTimesTokens(Stage):
    """A loss of (weight - token id) squared over the response tokens."""

    name = "toy"

    def __init__(self):
        super().__init__(OptimConfig(lr=1.0, max_grad_norm=1e9), num_steps=10)
        self.weight = nn.Parameter(torch.tensor(1.0))

    def step(self, batch):
        ids = batch.input_ids[batch.response_mask]
        return StepResult(loss_sum=(self.weight - ids).square().sum(), metrics={"toy/seen": Mean(3.0, 1)})

    def trained_model(self):
        raise NotImplementedError


class Others:
    """Ranks beside this one, whose facts are known."""

    def __init__(self, *facts):
        self.world, self._facts = 1 + len(facts), facts

    def gather(self, value):
        return [value, *self._facts] if isinstance(value, RankFacts) else [value] * self.world


def facts(**known):
    return RankFacts(
        **{"num_micro_batches": 1, "num_items": 0, "num_samples": 0, "num_bad": 0, "stop": False, **known}
    )


def share_of(*micro_batches, bad=()):
    dummy = collate([encoded_sample(0, images=(1,), answers=())], positions=[-1])
    return RankBatch(micro_batches=list(micro_batches), bad_records=list(bad), dummy=dummy)


def run(share, *others):
    """What one training step of a rank leaves behind."""
    stage, logged, seen = WeightTimesTokens(), {}, []
    stage.log = lambda name, value, **_: logged.update({name: value})
    stage.ranks = Others(*others)
    weight, gradients, events = stage.weight, [], []
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append(weight.grad if weight.grad is None else weight.grad.item())
    )
    stage.optimizers, stage.lr_schedulers = lambda: optimizer, lambda: SimpleNamespace(step=lambda: None)

    @contextmanager
    def here():
        events.append("kept")
        yield

    stage._gradients_stay_local = here
    stage.manual_backward = lambda loss: (
        events.append("backward"),
        seen.append(loss.item()),
        loss.backward(),
    )
    stage.trainer = SimpleNamespace(global_step=1, log_every_n_steps=1, optimizers=[optimizer])
    outputs = stage.training_step(share, 0)
    assert weight.grad is None
    return SimpleNamespace(
        loss=sum(seen),
        gradient=gradients[0],
        num_steps=len(gradients),
        logged=logged,
        outputs=outputs,
        events=events,
        stage=stage,
    )


def test_the_loss_is_the_mean_over_response_tokens():
    batch = batch_of(encoded_sample(1, answers=(3,)), encoded_sample(2, answers=(1,)))
    ids = batch.input_ids[batch.response_mask].float()
    found = run(share_of(batch))
    assert found.loss == pytest.approx((1 - ids).square().mean().item(), rel=1e-6)
    assert found.logged == {
        "toy/loss": pytest.approx(found.loss),
        "toy/seen": 3.0,
        "optim/lr": 1.0,
        "optim/grad_norm": pytest.approx(abs(found.gradient)),
    }


def test_any_split_into_packs_gives_the_step_of_the_whole_batch():
    samples = [encoded_sample(i, answers=(n,)) for i, n in ((1, 3), (2, 9), (3, 1))]
    whole = run(share_of(batch_of(*samples)))
    micro_batches = run(share_of(*map(batch_of, samples)))
    assert micro_batches.gradient == pytest.approx(whole.gradient, rel=1e-6)
    assert micro_batches.logged == pytest.approx(whole.logged, rel=1e-6)
    assert micro_batches.stage.weight.item() == pytest.approx(whole.stage.weight.item(), rel=1e-6)


def test_any_split_over_ranks_gives_the_gradient_of_the_whole_batch():
    # Ranks with 3 and 9 response tokens: a mean of their means would weigh tokens of the first three times.
    first, second = encoded_sample(1, answers=(3,)), encoded_sample(2, answers=(9,))
    whole = run(share_of(batch_of(first, second)))
    ranks = [
        run(share_of(batch_of(sample)), facts(num_items=others))
        for sample, others in ((first, 9), (second, 3))
    ]
    assert sum(rank.gradient for rank in ranks) / 2 == pytest.approx(
        whole.gradient, rel=1e-6
    )  # what DDP does
    assert sum(rank.loss for rank in ranks) / 2 == pytest.approx(whole.loss, rel=1e-6)


def test_a_rank_with_fewer_packs_runs_fillers_that_change_nothing():
    batch = batch_of(encoded_sample(1, answers=(3,)))
    alone, beside = run(share_of(batch)), run(share_of(batch), facts(num_micro_batches=3))
    assert beside.events.count("backward") == 3
    assert beside.gradient == pytest.approx(2 * alone.gradient)  # halved by the mean over two ranks


def test_gradients_are_exchanged_with_the_last_pack_alone():
    micro_batches = [batch_of(encoded_sample(i)) for i in range(3)]
    assert run(share_of(*micro_batches)).events == ["kept", "backward", "kept", "backward", "backward"]


def test_a_step_without_anything_to_learn_from_is_zero():
    found = run(share_of(batch_of(encoded_sample(1, answers=()))))
    assert (found.loss, found.gradient) == (0, 0)
    assert "toy/loss" not in found.logged


def test_callbacks_are_told_of_all_ranks():
    bad = [BadRecord(id="a", reason="b")] * 2
    found = run(share_of(batch_of(encoded_sample(1)), bad=bad), facts(num_samples=6, num_bad=1, stop=True))
    assert found.outputs == {
        "num_samples": 9,
        "num_bad": 3,
        "grad_norm": pytest.approx(abs(found.gradient)),
        "stop": True,
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_no_number_changes_no_weight_and_counts(value, monkeypatch):
    step = WeightTimesTokens.step
    broken = lambda stage, batch: replace(step(stage, batch), loss_sum=value * stage.weight)  # noqa: E731
    monkeypatch.setattr(WeightTimesTokens, "step", broken)
    found = run(share_of(batch_of(encoded_sample(1))))
    assert found.stage.weight.item() == 1.0
    assert (found.gradient, found.num_steps) == (None, 1)
    assert not math.isfinite(found.outputs["grad_norm"])


def test_a_single_rank_gathers_its_own_value():
    assert Ranks(1).gather({"a": 1}) == [{"a": 1}]


def test_a_rank_that_lost_another_says_so_in_a_sentence(monkeypatch):
    def closed(*_, **__):
        raise RuntimeError("Connection closed by peer\nand more of that")

    monkeypatch.setattr(distributed, "new_group", lambda **_: None)
    monkeypatch.setattr(distributed, "all_gather_object", closed)
    expected = r"another rank has ended \(Connection closed by peer\); see its log for the reason"
    with pytest.raises(ConnectionError, match=expected):
        Ranks(2).gather(1)
