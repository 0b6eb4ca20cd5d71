import inspect
import math

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

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


def assert_same_gradients(inputs, copies):
    """Of the policy's states and head."""
    for mine, theirs in zip(inputs[:2], copies[:2], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def log_states(*distributions):
    """States whose logits under the identity as head are the logarithms of `distributions`."""
    return torch.tensor(distributions, dtype=torch.float64).log()


def test_it_is_zero_where_policy_and_reference_agree_and_positive_elsewhere():
    policy, head, *reference = tensors(200)
    assert consistency_kl(policy, head, policy.detach(), head.detach()).abs().max() < 1e-12
    assert (consistency_kl(policy, head, *reference) > 0).all()


def test_it_is_kl_of_the_reference_from_the_policy():
    # .9 ln(.9/.5) + .1 ln(.1/.5) = .3681; the reverse is .5 ln(.5/.9) + .5 ln(.5/.1) = .5108
    policy, reference = log_states([0.5, 0.5]), log_states([0.9, 0.1])
    forward = consistency_kl(policy, IDENTITY, reference, IDENTITY)
    backward = consistency_kl(policy, IDENTITY, reference, IDENTITY, reverse=True)
    assert forward.item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-12)
    assert backward.item() == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5), abs=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_tokens_may_share_a_row_of_the_reference(reverse, chunk_size):
    policy, head, reference, reference_head = tensors(7)
    rows = torch.tensor([2, 0, 0, 5, 5, 5, 2])
    settings = {"temperature": 2.0, "reverse": reverse, "chunk_size": chunk_size}
    shared = consistency_kl(policy, head, reference[:6], reference_head, reference_rows=rows, **settings)
    repeated = consistency_kl(policy, head, reference[rows], reference_head, **settings)
    torch.testing.assert_close(shared, repeated, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(kl.sum(), (policy, head)) for kl in (shared, repeated))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 11, 100])  # 11 tokens: with and without a left-over chunk
def test_values_and_gradients_equal_those_of_the_plain_formula(reverse, temperature, chunk_size):
    inputs, copies = tensors(11), tensors(11)
    settings = {"temperature": temperature, "reverse": reverse}
    ours, plain = consistency_kl(*inputs, **settings, chunk_size=chunk_size), naive_kl(*copies, **settings)
    weights = torch.linspace(1, 2, 11, dtype=torch.float64)
    (ours * weights).sum().backward()
    (plain * weights).sum().backward()
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    assert_same_gradients(inputs, copies)


class Watch(TorchDispatchMode):
    """Notes the operations that run, and the most rows of any result with `vocab` columns."""

    def __init__(self, vocab=13):
        super().__init__()
        self.vocab, self.rows, self.operations = vocab, 0, []

    @property
    def num_products(self):
        return sum(name in ("aten::mm", "aten::addmm") for name in self.operations)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append(function.name().split(".")[0].rstrip("_"))
        shape = getattr(result, "shape", ())
        if len(shape) == 2 and shape[1] == self.vocab:
            self.rows = max(self.rows, shape[0])
        return result


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("uniform", [True, False])
def test_logits_exist_for_a_chunk_at_a_time_in_both_passes(reverse, uniform):
    with Watch() as watch:
        inputs = tensors(10, policy_width=3, reference_width=2)
        kl = consistency_kl(*inputs, chunk_size=4, reverse=reverse)
        (kl if uniform else kl * torch.arange(10)).sum().backward()
    assert watch.rows == 4


def products_and_gradients(inputs, *, loss=torch.sum):
    """How many matrix products the forward and the backward pass take; leaves gradients behind."""
    with Watch() as watch:
        kl = consistency_kl(*inputs)
        forward = watch.num_products
        if kl.requires_grad:
            loss(kl).backward()
    return forward, watch.num_products - forward


@pytest.mark.parametrize(
    ("states_train", "head_trains", "products"),
    [(True, True, 4), (True, False, 3), (False, True, 3), (False, False, 2)],
)
def test_what_is_frozen_costs_no_matrix_product_and_gets_no_gradient(states_train, head_trains, products):
    inputs, copies = tensors(5), tensors(5)
    inputs[0].requires_grad_(states_train)
    inputs[1].requires_grad_(head_trains)
    assert products_and_gradients(inputs) == (products, 0)
    naive_kl(*copies).sum().backward()
    for mine, theirs, trains in zip(inputs, copies, [states_train, head_trains, False, False], strict=True):
        assert (mine.grad is not None) == trains
        if trains:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_without_gradients_there_are_two_matrix_products_whatever_requires_them():
    inputs = tensors(5)
    with torch.no_grad():
        assert products_and_gradients(inputs) == (2, 0)
        kl = consistency_kl(*inputs)
    assert not kl.requires_grad
    torch.testing.assert_close(kl, naive_kl(*inputs).detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "again"),
    [
        (torch.sum, 0),
        (lambda kl: kl.sum() / 7 * 3, 0),
        (torch.mean, 0),
        (lambda kl: kl[:2].sum(), 3),
        (lambda kl: kl.square().sum(), 3),
    ],
    ids=["sum", "scaled sum", "mean", "part of the tokens", "squares"],
)
def test_gradients_are_exact_for_any_loss_and_made_again_only_where_tokens_count_differently(loss, again):
    inputs, copies = tensors(5), tensors(5)
    assert products_and_gradients(inputs, loss=loss) == (4, again)
    loss(naive_kl(*copies)).backward()
    assert_same_gradients(inputs, copies)


def test_the_loss_of_training_is_known_to_be_uniform_without_reading_its_gradient():
    # Reading it would make the processor wait for the GPU in every step.
    with Watch() as watch:
        (consistency_kl(*tensors(5)).sum() / 7 * 3).backward()
    assert "aten::_local_scalar_dense" not in watch.operations


def test_a_graph_used_twice_gives_the_gradient_twice():
    inputs = tensors(5)
    loss = consistency_kl(*inputs, temperature=2.0, chunk_size=2).sum()
    once = torch.autograd.grad(loss, inputs[:2], retain_graph=True)
    twice = torch.autograd.grad(3 * loss, inputs[:2])
    for first, second in zip(once, twice, strict=True):
        torch.testing.assert_close(second, 3 * first, rtol=1e-12, atol=1e-13)


def test_a_head_that_is_the_embedding_too_gets_both_gradients():
    def tied_gradient(kl):
        _, head, reference, reference_head = tensors(7)
        kl(head[:7].tanh(), head, reference, reference_head).sum().backward()
        return head.grad

    torch.testing.assert_close(tied_gradient(consistency_kl), tied_gradient(naive_kl), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("states_type", "head_type", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.bfloat16, torch.bfloat16, 1e-2),
        (torch.float16, torch.float16, 1e-3),
    ],
)
def test_any_types_of_operands_give_float32_values_and_gradients_of_their_own_type(
    states_type, head_type, tolerance
):
    types = (states_type, head_type) * 2
    strided = [x.detach().to(dtype).T.contiguous().T for x, dtype in zip(tensors(9), types, strict=True)]
    inputs = [tensor.requires_grad_() for tensor in strided]
    copies = [tensor.detach().double().requires_grad_() for tensor in inputs]
    kl, exact = consistency_kl(*inputs, chunk_size=4), naive_kl(*copies)
    kl.sum().backward()
    exact.sum().backward()
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(inputs[:2], copies[:2], strict=True):
        assert mine.grad.dtype == mine.dtype
        assert relative_error(mine.grad, theirs.grad) < tolerance
    assert inputs[2].grad is inputs[3].grad is None


@pytest.mark.parametrize(("rows", "words"), [(4, 13), (5, 12)])
def test_sides_that_do_not_belong_together_are_refused(rows, words):
    policy, head, reference, reference_head = tensors(5)
    without_shape_checks = inspect.unwrap(consistency_kl)
    with pytest.raises(ValueError, match="tokens and words; expected the same of both"):
        without_shape_checks(policy, head, reference[:rows], reference_head[:words])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_response_is_zero_with_zero_gradients(dtype):
    inputs = tensors(0, dtype=dtype)
    kl = consistency_kl(*inputs)
    assert (kl.shape, kl.dtype) == ((0,), torch.float32)
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
    assert_same_gradients(parts, whole)


@pytest.mark.parametrize("reduce", [torch.Tensor.clone, torch.sum], ids=["per token", "sum"])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_the_derivatives(reverse, reduce):
    policy, head, reference, reference_head = tensors(3, vocab=5, policy_width=2, reference_width=2)
    settings = {"reverse": reverse, "chunk_size": 2, "temperature": 1.5}
    assert torch.autograd.gradcheck(
        lambda p, h: reduce(consistency_kl(p, h, reference, reference_head, **settings)),
        (policy, head),
        nondet_tol=1e-12,  # the second use of a graph makes the head's gradient again, and rounds otherwise
    )


def relative_error(measured, exact):
    return ((measured.double() - exact).norm() / exact.norm()).item()


def check_small_divergence(device="cpu"):
    """Value and gradients within 1 % at 1e-4 nats per token, where bfloat16 logits are of no use."""
    generator = torch.Generator().manual_seed(0)
    reference, head, step = (torch.randn(n, 32, generator=generator) for n in (64, 500, 64))
    reference, head = reference.bfloat16(), head.bfloat16()
    policy = (reference.float() + 0.003 * step).bfloat16().requires_grad_()
    inputs = policy, head.clone().requires_grad_(), reference, head
    copies = [tensor.detach().double().requires_grad_() for tensor in inputs]
    kl, exact = consistency_kl(*(tensor.to(device) for tensor in inputs)), naive_kl(*copies)
    (kl.sum() + exact.sum().to(device)).backward()
    assert kl.dtype == torch.float32
    assert 5e-5 < exact.mean() < 2e-4
    assert relative_error(kl.detach().cpu(), exact.detach()) < 0.01
    for mine, theirs in zip(inputs[:2], copies[:2], strict=True):
        assert relative_error(mine.grad, theirs.grad) < 0.01


@pytest.mark.parametrize("autocast", [False, True])
def test_a_small_divergence_of_bfloat16_states_is_not_lost_in_rounding(autocast):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        check_small_divergence()


@pytest.fixture
def widening(monkeypatch):
    """Products as on CUDA, which take bfloat16 and give float32; returns the types of all that were made."""
    real, seen = (torch.mm, torch.addmm), []

    def mm(left, right, *, out, out_dtype=None):
        seen.append({left.dtype, right.dtype})
        return real[0](left.float(), right.float(), out=out)

    def addmm(added, left, right, *, out, out_dtype):
        seen.append({left.dtype, right.dtype})
        return out.copy_(real[1](added, left.float(), right.float()))

    monkeypatch.setattr(consistency, "WIDENING", ("cpu",))
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    return seen


def test_a_small_divergence_survives_slopes_in_bfloat16(widening):
    check_small_divergence()
    assert set.union(*widening) == {torch.bfloat16}


def test_under_autocast_float32_weights_are_rounded_as_for_all_other_products(widening):
    inputs = tensors(9, dtype=torch.float32)
    rounded = [tensor.detach().bfloat16().double().requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kl = consistency_kl(*inputs, chunk_size=4)
    exact = naive_kl(*rounded)
    kl.sum().backward()
    exact.sum().backward()
    assert set.union(*widening) == {torch.bfloat16}
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(inputs[:2], rounded[:2], strict=True):
        assert mine.grad.dtype == torch.float32
        assert (mine.grad.bfloat16() != mine.grad).any(), "a sum in bfloat16 would fit into it"
        assert relative_error(mine.grad, theirs.grad) < 1e-2


@pytest.mark.gpu
def test_a_small_divergence_is_not_lost_on_cuda():
    check_small_divergence("cuda")


def test_autocast_changes_nothing_where_products_round():
    plain, cast = tensors(9, dtype=torch.float32), tensors(9, dtype=torch.float32)
    weights = torch.linspace(1, 2, 9)
    (consistency_kl(*plain) * weights).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (consistency_kl(*cast) * weights).sum().backward()
    for mine, theirs in zip(plain[:2], cast[:2], strict=True):
        assert torch.equal(mine.grad, theirs.grad)
