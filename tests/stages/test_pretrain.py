import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

from tests.support.tiny import batch_of, encoded_sample, tiny_model
from vico_pl.config import RunConfig
from vico_pl.losses.cross_entropy import response_cross_entropy
from vico_pl.stages.pretrain import PretrainStage

RUN = RunConfig(stage="pretrain", run_dir="x")


def test_its_loss_is_the_language_models_own_over_the_response():
    model = tiny_model(ratios=[4], router_heads=None)
    samples = [encoded_sample(i, images=(), answers=(2, i)) for i in (1, 3)]
    result = PretrainStage(RUN, model).step(batch_of(*samples))
    model.language.set_attn_implementation("eager")
    expected = 0.0
    for sample in samples:
        labels = torch.where(sample.response_mask, sample.input_ids, -100)
        mean = model.language(input_ids=sample.input_ids[None], labels=labels[None]).loss.item()
        expected += mean * int(sample.response_mask.sum())
    assert result.loss_sum.item() == pytest.approx(expected, rel=1e-5)


def test_every_parameter_learns_from_a_step():
    model = tiny_model(ratios=[4], router_heads=None).train()
    result = PretrainStage(RUN, model).step(batch_of(encoded_sample(1, images=(2,))))
    result.loss_sum.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    hits, count = result.metrics["pretrain/token_accuracy"]
    assert 0 <= hits <= count == 3


R, D, V = 11, 6, 17


def inputs(count=R, *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(count, D, generator=generator, dtype=dtype).requires_grad_()
    head = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    return states, head, torch.randint(0, V, (count,), generator=generator)


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 256])  # 4 leaves a chunk of 3
def test_losses_hits_and_gradients_are_those_of_whole_logits(chunk_size):
    states, head, targets = inputs()
    losses, hits = response_cross_entropy(states, head, targets, chunk_size=chunk_size)
    logits = states @ head.T
    expected = cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
    assert torch.equal(hits, logits.argmax(-1) == targets)
    weights = torch.arange(1.0, R + 1)
    found = torch.autograd.grad((losses * weights).sum(), (states, head))
    wanted = torch.autograd.grad((expected * weights).sum(), (states, head))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_finite_differences():
    states, head, targets = inputs(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s, h: response_cross_entropy(s, h, targets, chunk_size=2)[0], (states, head)
    )


def test_no_tokens_give_zero_and_zero_gradients():
    states, head, targets = inputs(0)
    losses, hits = response_cross_entropy(states, head, targets)
    assert losses.shape == hits.shape == (0,)
    losses.sum().backward()
    assert losses.sum() == 0
    assert torch.equal(head.grad, torch.zeros(V, D))


def test_nothing_as_wide_as_the_vocabulary_is_kept_for_the_backward_pass():
    states, head, targets = inputs()
    shapes = []
    with saved_tensors_hooks(lambda tensor: shapes.append(tensor.shape) or tensor, lambda tensor: tensor):
        response_cross_entropy(states, head, targets, chunk_size=4)
    assert shapes
    assert not [shape for shape in shapes if V in shape[1:]]


def test_logits_are_float32_under_autocast():
    states, head, targets = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = response_cross_entropy(states.bfloat16(), head, targets)
    expected = cross_entropy(states.bfloat16().float() @ head.T, targets, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
