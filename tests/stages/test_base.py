from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.helpers import batch_of, encoded_sample
from vico_pl.optim import OptimConfig
from vico_pl.stages.base import Stage, StepResult


class WeightTimesTokens(Stage):
    """A loss of (weight - token id) squared over the response tokens."""

    area = "toy"

    def __init__(self):
        super().__init__(OptimConfig(), num_steps=10)
        self.weight = nn.Parameter(torch.tensor(1.0))

    def step(self, batch):
        ids = batch.input_ids[batch.response_mask]
        return StepResult(
            loss_sum=(self.weight - ids).square().sum(), count=len(ids), metrics={"toy/seen": 3.0}
        )

    def trained_model(self):
        raise NotImplementedError


def run(batch, *, world=1, everywhere=None):
    """Loss, gradient and log of one training step of a rank; all ranks come to the count `everywhere`."""
    stage, logged = WeightTimesTokens(), {}
    stage.log = lambda name, value, **_: logged.update({name: float(value)})
    stage.trainer = SimpleNamespace(
        world_size=world,
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.25}])],
        strategy=SimpleNamespace(reduce=lambda _, reduce_op: {"sum": everywhere}[reduce_op]),
    )
    loss = stage.training_step(batch, 0)
    loss.backward()
    return loss.item(), stage.weight.grad.item(), logged


def test_the_loss_is_the_mean_over_response_tokens():
    batch = batch_of(encoded_sample(1, answers=(3,)), encoded_sample(2, answers=(1,)))
    ids = batch.input_ids[batch.response_mask].float()
    loss, _, logged = run(batch)
    assert loss == pytest.approx((1 - ids).square().mean().item(), rel=1e-6)
    assert logged == {"toy/loss": pytest.approx(loss), "toy/seen": 3.0, "optim/lr": 0.25}


def test_any_split_over_ranks_gives_the_gradient_of_the_whole_batch():
    # Ranks with 3 and 9 response tokens: a mean of their means would weigh tokens of the first three times.
    first, second = encoded_sample(1, answers=(3,)), encoded_sample(2, answers=(9,))
    loss, gradient, _ = run(batch_of(first, second))
    ranks = [run(batch_of(sample), world=2, everywhere=12.0) for sample in (first, second)]
    assert sum(rank[1] for rank in ranks) / 2 == pytest.approx(gradient, rel=1e-6)  # what DDP makes of it
    assert sum(rank[0] for rank in ranks) / 2 == pytest.approx(loss, rel=1e-6)
    assert sum(rank[2]["toy/loss"] for rank in ranks) / 2 == pytest.approx(loss, rel=1e-6)


def test_a_step_without_anything_to_learn_from_is_zero():
    batch = batch_of(encoded_sample(1, answers=()))
    loss, gradient, _ = run(batch)
    assert (loss, gradient) == (0, 0)
