import math
from unittest import mock

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from vico_pl.losses import consistency
from vico_pl.losses.consistency import consistency_kl

IDENTITY = torch.eye(2, dtype=torch.float64)


def tensors(num_tokens, *, vocab=13, policy_width=6, reference_width=4, dtype=torch.float64, seed=0):
    """Random policy states and head, both with gradients, and reference states and head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    policy = normal(num_tokens, policy_width).requires_grad_()
    policy_head = normal(vocab, policy_width).requires_grad_()
    return policy, policy_head, normal(num_tokens, reference_width), normal(vocab, reference_width)


def naive_kl(policy, policy_head, reference, reference_head, *, temperature=1.0, reverse=False):
    log_q = log_softmax(policy.double() @ policy_head.double().T / temperature, dim=-1)
    log_p = log_softmax(reference.double() @ reference_head.double().T / temperature, dim=-1)
    input_, target = (log_p, log_q) if reverse else (log_q, log_p)
    return kl_div(input_, target, reduction="none", log_target=True).sum(-1)


def log_states(*distributions):
    """States whose logits under the identity as head are the logarithms of `distributions`."""
    return torch.tensor(distributions, dtype=torch.float64).log()


def test_it_is_zero_where_policy_and_reference_agree():
    policy, head, _, _ = tensors(5)
    assert consistency_kl(policy, head, policy.detach(), head.detach()).abs().max() < 1e-12


def test_it_is_never_negative_and_positive_where_they_differ():
    kl = consistency_kl(*tensors(200))
    assert (kl > 0).all()


def test_it_is_kl_of_the_reference_from_the_policy():
    # .9 ln(.9/.5) + .1 ln(.1/.5) = .3681; the reverse is .5 ln(.5/.9) + .5 ln(.5/.1) = .5108
    policy, reference = log_states([0.5, 0.5]), log_states([0.9, 0.1])
    forward = consistency_kl(policy, IDENTITY, reference, IDENTITY)
    backward = consistency_kl(policy, IDENTITY, reference, IDENTITY, reverse=True)
    assert forward.item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-12)
    assert backward.item() == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5), abs=1e-12)


def test_temperature_divides_the_logits():
    # Odds of 9 become odds of 3 at temperature 2: (.75, .25) against (.5, .5).
    policy, reference = log_states([0.5, 0.5]), log_states([0.9, 0.1])
    kl = consistency_kl(policy, IDENTITY, reference, IDENTITY, temperature=2.0)
    assert kl.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_values_and_gradients_equal_those_of_the_plain_formula(reverse, temperature):
    inputs, copies = tensors(11), tensors(11)
    ours = consistency_kl(*inputs, temperature=temperature, reverse=reverse, chunk_size=4)
    plain = naive_kl(*copies, temperature=temperature, reverse=reverse)
    weights = torch.linspace(1, 2, 11, dtype=torch.float64)
    (ours * weights).sum().backward()
    (plain * weights).sum().backward()
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(inputs[:2], copies[:2], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 10, 100])  # 10 tokens: with and without a left-over chunk
def test_chunks_change_nothing(chunk_size):
    inputs, copies = tensors(10), tensors(10)
    chunked, whole = consistency_kl(*inputs, chunk_size=chunk_size), consistency_kl(*copies, chunk_size=10)
    chunked.sum().backward()
    whole.sum().backward()
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-13)
    for mine, theirs in zip(inputs[:2], copies[:2], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-13)


def test_logits_exist_for_a_chunk_at_a_time_in_both_passes():
    real, rows = consistency._logits, []

    def counting(states, head):
        rows.append(len(states))
        return real(states, head)

    with mock.patch.object(consistency, "_logits", counting):
        kl = consistency_kl(*tensors(10), chunk_size=4)
        in_forward = len(rows)
        kl.sum().backward()
    assert max(rows) == 4
    assert len(rows) > in_forward, "the backward pass makes the logits again instead of keeping them"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_response_is_zero_with_zero_gradients(dtype):
    inputs = tensors(0, dtype=dtype)
    kl = consistency_kl(*inputs)
    assert kl.shape == (0,)
    assert kl.dtype == torch.float32
    kl.sum().backward()
    # Zeros, not None: under DDP a parameter without a gradient would leave the other ranks waiting.
    assert inputs[0].grad.shape == (0, 6)
    assert torch.equal(inputs[1].grad, torch.zeros_like(inputs[1]))


def test_gradients_of_two_micro_batches_sum_to_that_of_their_union():
    whole, parts = tensors(9), tensors(9)
    consistency_kl(*whole).sum().backward()
    policy, head, reference, reference_head = parts
    for rows in (slice(0, 2), slice(2, 9)):
        consistency_kl(policy[rows], head, reference[rows], reference_head).sum().backward()
    torch.testing.assert_close(policy.grad, whole[0].grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(head.grad, whole[1].grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_the_derivatives(reverse):
    policy, head, reference, reference_head = tensors(3, vocab=5, policy_width=2, reference_width=2)
    assert torch.autograd.gradcheck(
        lambda p, h: consistency_kl(
            p, h, reference, reference_head, reverse=reverse, chunk_size=2, temperature=1.5
        ),
        (policy, head),
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_a_small_divergence_of_bfloat16_states_is_not_lost_in_rounding(autocast):
    # Logits rounded to bfloat16 would make such values wrong by most of their size.
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(64, 32, generator=generator).bfloat16()
    head = torch.randn(500, 32, generator=generator).bfloat16()
    nudge = 0.003 * torch.randn(64, 32, generator=generator)
    policy = (reference.float() + nudge).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        kl = consistency_kl(policy, head, reference, head)
    exact = naive_kl(policy, head, reference, head)
    assert 1e-5 < exact.mean() < 1e-3
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double().mean(), exact.mean(), rtol=1e-3, atol=0)
