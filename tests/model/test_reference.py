import pytest
import torch
from torch import nn

from tests.support.tiny import batch_of, encoded_sample, tiny_model, tiny_spec
from vico_pl.model.adapters import LoraConfig, add_adapters
from vico_pl.model.reference import FrozenReference


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.Linear(2, 2)
        self.reference = FrozenReference(tiny_model())


@pytest.fixture
def owner():
    return Owner()


def test_its_owner_neither_trains_nor_stores_it(owner):
    assert {name for name, _ in owner.named_parameters()} == {"own.weight", "own.bias"}
    assert set(owner.state_dict()) == {"own.weight", "own.bias"}
    assert list(owner.reference.buffers()) == []


def test_it_stays_in_eval_mode(owner):
    owner.train()
    assert owner.own.training
    assert not any(module.training for module in owner.reference.model.modules())


def test_it_stays_without_gradients(owner, batch):
    owner.requires_grad_()
    assert not any(parameter.requires_grad for parameter in owner.reference.model.parameters())
    assert not owner.reference.response_states(batch).requires_grad


def test_it_moves_with_its_owner(owner):
    owner.to(torch.float64)
    assert owner.reference.head.dtype == torch.float64
    assert owner.reference.model.vision.mean.dtype == torch.float64
    owner.to("meta")
    assert owner.reference.head.device.type == "meta"


def test_its_states_are_those_of_the_model_at_full_tokens(owner, batch):
    model = tiny_model()
    with torch.no_grad():
        expected = model.response_states(batch, model.encode_tiles(batch.tiles), model.full_ratios(batch))
    assert torch.equal(owner.reference.response_states(batch), expected)


def beside(trainable, *, dtype=torch.float32, attention_dropout=0.0, **lora):
    """A policy in training that trains some parts, and a reference beside it."""
    policy = tiny_model(language={**tiny_spec().language, "attention_dropout": attention_dropout})
    for part in {"vision", "connectors", "language"} - set(trainable):
        getattr(policy, part).requires_grad_(requires_grad=False)
    if "lora" in trainable:
        add_adapters(policy.language, LoraConfig(rank=4, **lora))
    return policy.train(), FrozenReference(tiny_model().to(dtype), beside=policy)


def shared_parts(policy, reference):
    parts = ("vision", "connectors", "language", "router")
    return {part for part in parts if getattr(policy, part) is getattr(reference.model, part)}


def response_states(policy, batch):
    return policy.response_states(batch, policy.encode_tiles(batch.tiles), policy.full_ratios(batch))


def train_a_step(policy, batch):
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    response_states(policy, batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("trainable", "shared"),
    [
        (["vision", "connectors", "language"], set()),
        (["connectors", "language"], {"vision"}),
        (["vision", "connectors"], {"language"}),
        (["vision", "lora"], {"language"}),
        (["connectors"], {"vision", "language"}),
        (["lora"], {"vision", "language"}),
    ],
)
def test_what_a_policy_keeps_frozen_is_not_held_twice(trainable, shared):
    policy, reference = beside(trainable)
    assert shared_parts(policy, reference) == shared
    storages = {p.data_ptr() for model in (policy, reference.model) for p in model.parameters()}
    twice = {"vision", "connectors", "language", "router"} - shared
    copies = sum(len(list(getattr(reference.model, part).parameters())) for part in twice)
    assert len(storages) == len(list(policy.parameters())) + copies


def test_parts_of_another_type_are_held_twice():
    policy, reference = beside(["lora"], dtype=torch.bfloat16)
    assert shared_parts(policy, reference) == set()
    assert reference.head.dtype == torch.bfloat16


@pytest.mark.parametrize("trainable", [["connectors", "lora"], ["vision", "lora"], ["connectors"], ["lora"]])
def test_a_shared_reference_is_that_of_a_copy_before_and_after_the_policy_learns(trainable, batch):
    policy, reference = beside(trainable, dropout=0.5, attention_dropout=0.2)
    copy = FrozenReference(tiny_model())
    expected = copy.response_states(batch)
    policy_before = response_states(policy.eval(), batch)
    for _ in range(2):
        assert torch.equal(reference.response_states(batch), expected)
        assert torch.equal(reference.head, copy.head)
        train_a_step(policy.train(), batch)
    assert not torch.equal(response_states(policy.eval(), batch), policy_before)


def test_a_reference_shares_experts_that_have_adapters(batch):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    language = {**tiny_spec().language, "model_type": "qwen3_moe", **experts}
    policy, copy = tiny_model(language=language), FrozenReference(tiny_model(language=language))
    add_adapters(policy.language, LoraConfig(rank=4))
    reference = FrozenReference(tiny_model(language=language), beside=policy)
    assert shared_parts(policy, reference) >= {"language"}
    before = response_states(policy, batch)
    train_a_step(policy, batch)
    assert not torch.equal(response_states(policy, batch), before)
    assert torch.equal(reference.response_states(batch), copy.response_states(batch))


def test_a_shared_reference_leaves_training_as_it_was(batch):
    policy, reference = beside(["connectors", "lora"], dropout=0.5)
    policy.vision.eval()
    modes = {name: module.training for name, module in policy.named_modules()}
    gradients = {name: p.requires_grad for name, p in policy.named_parameters()}
    states = response_states(policy, batch)
    reference.response_states(batch)
    assert {name: module.training for name, module in policy.named_modules()} == modes
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == gradients
    states.sum().backward()
    assert all(p.grad is not None for p in policy.language.parameters() if p.requires_grad)


@pytest.mark.parametrize(("trainable", "passes"), [(["connectors"], 0), (["vision", "connectors"], 1)])
def test_features_of_a_shared_vision_encoder_are_not_computed_twice(trainable, passes, batch):
    policy, reference = beside(trainable)
    expected = reference.response_states(batch)
    features, encoded = policy.encode_tiles(batch.tiles), []
    reference.model.vision.register_forward_hook(lambda *_: encoded.append(True))
    assert torch.equal(reference.response_states(batch, policy_features=features), expected)
    assert len(encoded) == passes


def test_features_of_no_policy_beside_it_are_not_used(owner, batch):
    expected = owner.reference.response_states(batch)
    others = torch.zeros_like(owner.reference.model.encode_tiles(batch.tiles))
    assert torch.equal(owner.reference.response_states(batch, policy_features=others), expected)


def test_adapters_drop_out_for_the_policy_and_not_for_the_reference():
    batch = batch_of(encoded_sample(1))
    policy, reference = beside(["lora"], dropout=0.5)
    train_a_step(policy, batch)
    assert torch.equal(*(reference.response_states(batch) for _ in range(2)))
    assert not torch.equal(*(response_states(policy, batch) for _ in range(2)))


def test_a_shared_reference_moves_with_the_policy(batch):
    policy, reference = beside(["lora"])
    owner = nn.ModuleList([policy, reference]).to(torch.float64)
    assert {p.dtype for p in reference.model.parameters()} == {torch.float64}
    assert shared_parts(policy, reference) == {"vision", "language"}
    assert set(owner.state_dict()) == {f"0.{name}" for name in policy.state_dict()}
