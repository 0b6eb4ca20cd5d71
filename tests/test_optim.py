import re

import pytest
import torch
from torch import nn

from vico_pl.model.router import ResolutionRouter
from vico_pl.optim import (
    SCHEDULES,
    OptimConfig,
    PartConfig,
    PartsConfig,
    build_optimizer,
    check_schedule,
    numbered_by_module,
    part_figures,
)


def build(module, *, num_steps=10, **settings):
    built = build_optimizer(module.named_parameters(), OptimConfig(**settings), num_steps=num_steps)
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


def test_the_routers_query_and_embeddings_decay_as_in_released_training():
    module = nn.ModuleDict({"router": ResolutionRouter(8, num_heads=2), "embeddings": nn.Embedding(3, 2)})
    optimizer, _ = build(module, weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    pooling = module["router"].pooling_before_gating
    assert decay[id(pooling.query_token)] == decay[id(module["embeddings"].weight)] == 0.3
    assert decay[id(pooling.norm1.weight)] == 0


NEEDED = {
    "cosine_with_min_lr": {"min_lr": 1e-7},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 3},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_works_with_the_arguments_that_it_needs(schedule):
    settings = {"schedule": schedule, "warmup_steps": 2, "schedule_args": NEEDED.get(schedule, {})}
    assert list(check_schedule(OptimConfig(**settings), num_steps=10)) == []
    optimizer, built = build(nn.Linear(3, 2), **settings)
    optimizer.step()
    built["scheduler"].step()
    assert 0 < optimizer.param_groups[0]["lr"] <= OptimConfig().lr


@pytest.mark.parametrize(
    ("schedule", "args", "message"),
    [
        ("cosine", {"min_lr": 1}, "schedule_args names min_lr; schedule 'cosine' takes num_cycles$"),
        ("constant", {"power": 1}, "names power; schedule 'constant' takes none"),
        ("warmup_stable_decay", {}, "'warmup_stable_decay' needs .*schedule_args to name num_decay_steps"),
        ("cosine_with_min_lr", {}, r"does not work \(One of .*; it takes num_cycles, min_lr, min_lr_rate"),
        ("polynomial", {"lr_end": 1.0}, "must be smaller than initial lr"),
        ("polynomial", {"power": "two"}, "does not work"),
        ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "log"}, "Unknown decay type: log"),
    ],
)
def test_arguments_that_a_schedule_does_not_take_or_lacks_are_named(schedule, args, message):
    config = OptimConfig(schedule=schedule, schedule_args=args)
    (found,) = check_schedule(config, num_steps=10)
    assert re.search(message, found)


def test_arguments_of_a_schedule_shape_it():
    args = {"num_decay_steps": 4, "decay_type": "linear", "min_lr_ratio": 0.2}
    optimizer, built = build(
        nn.Linear(2, 1), lr=1.0, schedule="warmup_stable_decay", schedule_args=args, num_steps=8
    )
    rates = []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        built["scheduler"].step()
    assert rates == pytest.approx([1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def parts_model():
    """A part of each kind, under the names that a stage gives them."""
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("vision", "connectors", "language")})
    model["language"].q_proj = nn.ModuleDict({"lora_A": nn.Linear(2, 2, bias=False)})
    return nn.ModuleDict({"model": model, "router": nn.Linear(2, 2)})


def test_parts_have_a_rate_and_a_decay_of_their_own_under_one_schedule():
    parts = PartsConfig(vision=PartConfig(lr=0.1), lora=PartConfig(lr=4.0, weight_decay=0.0))
    model = parts_model()
    optimizer, built = build(model, lr=1.0, weight_decay=0.3, parts=parts, schedule="linear", num_steps=4)
    optimizer.step()
    built["scheduler"].step()
    by_id = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    found = {name: by_id[id(p)] for name, p in model.named_parameters()}
    assert {found["model.connectors.weight"], found["model.language.weight"], found["router.weight"]} == {
        (0.75, 0.3)
    }
    assert found["model.vision.weight"] == pytest.approx((0.075, 0.3))
    assert found["model.vision.bias"] == pytest.approx((0.075, 0.0))
    assert found["model.language.q_proj.lora_A.weight"] == pytest.approx((3.0, 0.0))
    assert found["model.language.bias"] == (0.75, 0.0)
    assert all(group["params"] for group in optimizer.param_groups)  # FSDP loads one empty group at most


def test_without_parts_there_are_two_groups_as_in_older_checkpoints():
    optimizer, _ = build(parts_model())
    assert [len(group["params"]) for group in optimizer.param_groups] == [5, 4]


def test_figures_of_parts_are_their_norms_and_their_own_rates():
    model, config = parts_model(), OptimConfig(lr=1.0, parts=PartsConfig(vision=PartConfig(lr=0.5)))
    optimizer = build_optimizer(model.named_parameters(), config, num_steps=9)["optimizer"]
    model["model"]["vision"].bias.grad = torch.tensor([3.0, 4.0])
    assert part_figures(model.named_parameters(), optimizer, config) == {"optim/lr_vision": 0.5}
    model["router"].bias.grad = torch.tensor([6.0, 8.0])
    assert part_figures(model.named_parameters(), optimizer, config) == {
        "optim/lr_vision": 0.5,
        "optim/grad_norm_vision": 5.0,
        "optim/grad_norm_router": 10.0,
    }


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
        return build_optimizer(model.named_parameters(), OptimConfig(), num_steps=1)["optimizer"]

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
