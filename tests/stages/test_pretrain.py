import pytest
import torch

from tests.helpers import batch_of, encoded_sample, tiny_model
from vico_pl.config import RunConfig
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
