import copy

import pytest
import torch

from tests.helpers import WIDTH, tiny_spec
from vico_pl.model.language import build_language_model, run_packed

LENGTHS = [3, 7, 1, 5]


@pytest.fixture
def language():
    torch.manual_seed(0)
    model = build_language_model(tiny_spec().language).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2)
    return model


def embeddings(lengths, *, seed=1):
    return torch.randn(sum(lengths), WIDTH, generator=torch.Generator().manual_seed(seed))


def positions(lengths):
    return torch.cat([torch.arange(n) for n in lengths])


def one_by_one(model, x, lengths):
    """Each sample alone, with transformers' own attention."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    states = [model.base_model(inputs_embeds=part[None]).last_hidden_state[0] for part in x.split(lengths)]
    return torch.cat(states)


def test_packed_samples_equal_samples_one_by_one(language):
    x = embeddings(LENGTHS)
    packed = run_packed(language, x, positions(LENGTHS), LENGTHS)
    torch.testing.assert_close(packed, one_by_one(language, x, LENGTHS), rtol=0, atol=1e-5)


def test_packed_gradients_equal_those_of_samples_one_by_one(language):
    packed, alone = embeddings(LENGTHS).requires_grad_(), embeddings(LENGTHS).requires_grad_()
    weights = embeddings(LENGTHS, seed=2)
    (run_packed(language.train(), packed, positions(LENGTHS), LENGTHS) * weights).sum().backward()
    (one_by_one(language, alone, LENGTHS) * weights).sum().backward()
    torch.testing.assert_close(packed.grad, alone.grad, rtol=1e-4, atol=1e-5)


def test_a_token_sees_its_own_sample_up_to_itself_and_nothing_else(language):
    x = embeddings(LENGTHS).requires_grad_()
    states = run_packed(language, x, positions(LENGTHS), LENGTHS)
    states[6].sum().backward()  # the fourth token of the second sample, which takes places 3 to 9
    seen = x.grad.abs().sum(1).nonzero().flatten().tolist()
    assert seen == [3, 4, 5, 6]


def test_the_configuration_is_left_as_it_was():
    config = tiny_spec().language
    build_language_model(config)
    assert config == tiny_spec().language
