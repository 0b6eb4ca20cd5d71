import pytest
import torch
from torch import nn

from tests.helpers import tiny_model
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
