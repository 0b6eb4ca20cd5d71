import pytest
import torch
from torch import nn

from vico_pl.optim import SCHEDULES, OptimConfig, build_optimizer, numbered_by_module


def build(module, *, num_steps=10, **settings):
    built = build_optimizer(module.parameters(), OptimConfig(**settings), num_steps=num_steps)
    return built["optimizer"], built["lr_scheduler"]


def test_matrices_decay_vectors_do_not_and_frozen_parameters_are_left_out():
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    module[1].bias.requires_grad_(requires_grad=False)
    optimizer, _ = build(module, weight_decay=0.3, beta1=0.8, beta2=0.7)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.7)}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decay.get(id(p)) for name, p in module.named_parameters()}
    vectors = {"0.bias": 0.0, "1.weight": 0.0, "1.bias": None, "2.bias": 0.0}
    assert found == {"0.weight": 0.3, "2.weight": 0.3, **vectors}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_needs_no_further_settings(schedule):
    optimizer, built = build(nn.Linear(3, 2), schedule=schedule, warmup_steps=2)
    optimizer.step()
    built["scheduler"].step()
    assert 0 < optimizer.param_groups[0]["lr"] <= OptimConfig().lr


def test_the_rate_warms_up_by_steps_and_falls_to_zero_at_the_end_of_the_run():
    optimizer, schedule = build(nn.Linear(2, 1), lr=1.0, warmup_steps=4, num_steps=12)
    assert schedule["interval"] == "step"
    rates = []
    for _ in range(13):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule["scheduler"].step()
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert rates[8] == pytest.approx(0.5)  # half of the cosine
    assert rates[12] == pytest.approx(0, abs=1e-9)


def test_a_state_numbered_by_the_module_is_loaded_as_the_optimizers_own():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    model[0].weight.requires_grad_(requires_grad=False)

    def optimizer():
        return build_optimizer(model.parameters(), OptimConfig(), num_steps=1)["optimizer"]

    first = optimizer()
    model(torch.ones(1, 3)).square().sum().backward()
    first.step()
    numbered = numbered_by_module(first.state_dict(), first, model)
    # The module lists 0.weight, 0.bias, 1.weight, 1.bias; the groups 1.weight, then 0.bias and 1.bias.
    assert [group["params"] for group in numbered["param_groups"]] == [[2], [1, 3]]
    assert {n: tuple(state["exp_avg"].shape) for n, state in numbered["state"].items()} == {
        1: (2,),
        2: (3, 2),
        3: (3,),
    }
    second = optimizer()
    second.load_state_dict(numbered)
    for parameter in list(model.parameters())[1:]:
        assert torch.equal(second.state[parameter]["exp_avg"], first.state[parameter]["exp_avg"])
