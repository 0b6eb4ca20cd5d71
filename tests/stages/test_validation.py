"""What each stage computes of a validation set; whole runs are in tests/trainer/test_validation.py."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from tests.stages.test_consistency import stage_of as consistency_stage
from tests.stages.test_router import ratios_of
from tests.stages.test_router import stage_of as router_stage
from tests.support.tiny import batch_of, encoded_sample, mixed_samples, tiny_model
from vico_pl.data.collate import collate
from vico_pl.stages import router as router_module
from vico_pl.stages.figures import Mean, combine


def kl_of(model, reference, ratios, batch):
    """The mean KL per response token, by PyTorch's own functions."""
    states = model.response_states(batch, model.encode_tiles(batch.tiles), ratios)
    target = reference.response_states(batch)
    sides = [log_softmax(s @ m.head.T, -1) for s, m in ((states, model), (target, reference))]
    return kl_div(*sides, log_target=True, reduction="sum").item() / len(target)


def validate(stage, *batches):
    with torch.no_grad():
        figures = [stage.validate(batch, place=(i,)) for i, batch in enumerate(batches)]
    return stage.summary(combine(figures))


@torch.no_grad()
def test_stage_one_compares_at_every_ratio_and_at_draws_of_its_own():
    model, batch = tiny_model(1), batch_of(*mixed_samples())  # seven tiles
    stage = consistency_stage(model, tiny_model(2)).eval()
    found, full = validate(stage, batch), model.full_ratios(batch)
    for ratio in (4, 16):
        expected = kl_of(model, stage.reference, torch.full_like(full, ratio), batch)
        assert found[f"kl_ratio_{ratio}"] == pytest.approx(expected, rel=1e-4)
    assert found["kl"] not in (found["kl_ratio_4"], found["kl_ratio_16"])
    fractions = [(7 - n + n / 4) / 7 for n in range(8)]  # n tiles at ratio 16
    assert min(abs(found["vision_token_fraction"] - fraction) for fraction in fractions[1:7]) < 1e-6
    others = consistency_stage(model, tiny_model(2), seed=5, ratio_draw="full").eval()
    assert validate(others, batch) == found


def test_the_dummy_and_the_order_of_samples_count_for_nothing():
    stage, samples = consistency_stage(tiny_model(1), tiny_model(2)).eval(), mixed_samples()
    whole = validate(stage, batch_of(*samples))
    dummy = encoded_sample(9, images=(1,), answers=())
    parts = [
        collate(samples[2:], positions=[2, 3]),
        collate([*samples[:2], dummy], positions=[0, 1, -1]),
        collate([dummy], positions=[-1]),
    ]
    assert validate(stage, *parts) == pytest.approx(whole, rel=1e-5)


def test_stage_two_scores_the_router_against_the_percentile_of_the_set(monkeypatch):
    """P(keep) is 0.2, 0.6, 0.4 and 0.9; the labels are compress, compress, keep, keep."""
    stage, keep = router_stage(), torch.tensor([0.2, 0.6, 0.4, 0.9])
    labels = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    monkeypatch.setattr(router_module, "tile_loss_ratios", lambda *_, **__: labels)
    stage.router.forward = lambda _: torch.stack([(1 - keep).log(), keep.log()], dim=1)
    batch = batch_of(encoded_sample(1, images=(4,)))
    found = validate(stage, batch)
    assert found["auroc"] == pytest.approx(0.75)
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["compressed_fraction"] == pytest.approx(0.5)
    assert found["brier"] == pytest.approx((0.2**2 + 0.6**2 + 0.6**2 + 0.1**2) / 4)
    # Each in a bin of its own: the mean distance of probability and label.
    assert found["calibration_error"] == pytest.approx((0.2 + 0.6 + 0.6 + 0.1) / 4)
    # P(compress) is 0.8, 0.4, 0.6 and 0.1; a compressed tile keeps a quarter of its tokens.
    fractions = {0.3: 1 / 4 + 3 / 16, 0.5: 2 / 4 + 2 / 16, 0.7: 3 / 4 + 1 / 16}
    policy = stage.trained_model()
    for threshold, fraction in fractions.items():
        assert found[f"token_fraction_at_{threshold}"] == pytest.approx(fraction)
        ratios = torch.where(1 - keep >= threshold, 16, 4)
        with torch.no_grad():
            expected = kl_of(policy, stage.reference, ratios, batch)
        assert found[f"kl_at_{threshold}"] == pytest.approx(expected, rel=1e-4)


def test_labels_are_computed_once_and_then_kept(monkeypatch):
    stage, samples = router_stage(), mixed_samples()
    first = validate(stage, batch_of(*samples))
    expected = ratios_of(stage.trained_model(), stage.reference, *samples)
    assert torch.allclose(stage._loss_ratios[0,], expected, rtol=1e-5)
    monkeypatch.setattr(router_module, "tile_loss_ratios", lambda *_, **__: pytest.fail("once more"))
    assert validate(stage, batch_of(*samples)) == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("labels", [[float("nan")] * 4, [1.0] * 4])
def test_without_labels_or_with_a_single_one_there_is_no_auroc(monkeypatch, labels):
    stage = router_stage()
    monkeypatch.setattr(router_module, "tile_loss_ratios", lambda *_, **__: torch.tensor(labels)[:, None])
    found = validate(stage, batch_of(encoded_sample(1, images=(4,))))
    assert "auroc" not in found
    assert ("accuracy" in found) == (labels[0] == 1)
    assert found["kl_at_0.5"] >= 0


def test_figures_without_items_are_left_out():
    stage = consistency_stage()
    assert stage.summary({"kl": Mean(0.0, 0), "loss": Mean(3.0, 2)}) == {"loss": 1.5}
