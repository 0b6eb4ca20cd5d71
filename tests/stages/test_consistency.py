import copy
from unittest import mock

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from tests.helpers import batch_of, encoded_sample, mixed_samples, tiny_model
from vico_pl.data.collate import collate
from vico_pl.losses.consistency import consistency_kl
from vico_pl.model.reference import FrozenReference
from vico_pl.optim import OptimConfig
from vico_pl.stages.base import Ranks
from vico_pl.stages.consistency import ConsistencyConfig, ConsistencyStage, draw_ratios


def stage_of(model, reference=None, *, seed=0, **config):
    reference = FrozenReference(copy.deepcopy(reference or model))
    stage = ConsistencyStage(
        model, reference, ConsistencyConfig(**config), OptimConfig(), num_steps=10, seed=seed
    )
    stage.ranks = Ranks(1)
    return stage


def many_images():
    """400 images of three tiles each."""
    return batch_of(*[encoded_sample(i, images=(3, 3), answers=(1,)) for i in range(200)])


def draw(batch, *, mode, ratios=(4, 16), seed=0):
    return draw_ratios(batch, ratios, mode=mode, seed=seed)


def drawn_by(stage, batch):
    return draw_ratios(batch, stage.model.ratios, mode=stage.config.ratio_draw, seed=stage.seed)


def fraction_of_uniform_images(ratios):
    return (ratios.view(-1, 3) == ratios.view(-1, 3)[:, :1]).all(1).float().mean().item()


def test_image_draws_one_ratio_per_image():
    assert fraction_of_uniform_images(draw(many_images(), mode="image")) == 1


def test_tile_draws_each_tile_by_itself():
    assert fraction_of_uniform_images(draw(many_images(), mode="tile")) == pytest.approx(1 / 4, abs=0.1)


def test_mixed_does_either_with_probability_one_half():
    expected = 0.5 * 1 + 0.5 * 1 / 4
    assert fraction_of_uniform_images(draw(many_images(), mode="mixed")) == pytest.approx(expected, abs=0.1)


def test_images_of_one_sample_draw_by_themselves():
    per_image = draw(many_images(), mode="image").view(-1, 2, 3)[:, :, 0]
    assert (per_image[:, 0] == per_image[:, 1]).float().mean().item() == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("mode", ["image", "tile", "mixed"])
def test_all_ratios_are_drawn_alike(mode):
    ratios = draw(many_images(), mode=mode, ratios=(4, 16, 64))
    for ratio in (4, 16, 64):
        assert (ratios == ratio).float().mean().item() == pytest.approx(1 / 3, abs=0.08)


@pytest.mark.parametrize("mode", ["image", "tile", "mixed"])
def test_a_batch_of_text_alone_draws_nothing(mode):
    assert draw(batch_of(encoded_sample(1, images=())), mode=mode).shape == (0,)


def test_a_sample_draws_the_same_whatever_it_shares_the_batch_with():
    samples, positions = mixed_samples(), [70, 3, 12, 9]
    together = draw(collate(samples, positions=positions), mode="mixed")
    alone = [
        draw(collate([sample], positions=[position]), mode="mixed")
        for sample, position in zip(samples, positions, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("mode", ["image", "tile", "mixed"])
def test_positions_and_seeds_draw_by_themselves(mode):
    samples = [encoded_sample(i, images=(3, 3), answers=(1,)) for i in range(200)]
    draws = [
        draw(collate(samples, positions=range(start, start + 200)), mode=mode, seed=seed)
        for start, seed in ((0, 0), (0, 0), (200, 0), (0, 1))
    ]
    assert torch.equal(draws[0], draws[1])
    for one, other in ((0, 2), (0, 3), (2, 3)):
        assert (draws[one] == draws[other]).float().mean().item() == pytest.approx(0.5, abs=0.1)


@torch.no_grad()
def naive_loss(stage, samples, ratios, *, temperature=1.0, reverse=False):
    """Sum of divergences, one sample after the other and with torch's own KL in float64."""
    total = 0.0
    for sample, own in zip(samples, ratios.split([len(s.tiles) for s in samples]), strict=True):
        batch, policy, reference = batch_of(sample), stage.model, stage.reference.model
        logits = policy.response_states(batch, policy.encode_tiles(batch.tiles), own) @ policy.head.T
        wanted = (
            reference.response_states(batch, reference.encode_tiles(batch.tiles), torch.full_like(own, 4))
            @ reference.head.T
        )
        log_q, log_p = (log_softmax(x.double() / temperature, -1) for x in (logits, wanted))
        if reverse:
            log_q, log_p = log_p, log_q
        total += kl_div(log_q, log_p, reduction="sum", log_target=True).item()
    return total


@pytest.mark.parametrize("config", [{}, {"reverse_kl": True, "temperature": 2.0}, {"chunk_size": 3}])
def test_the_loss_is_kl_of_the_reference_at_full_tokens_from_the_policy_at_drawn_ratios(config):
    samples = mixed_samples()
    stage = stage_of(tiny_model(1), tiny_model(2), **config)
    result = stage.step(batch_of(*samples))
    ratios = drawn_by(stage, batch_of(*samples))
    expected = naive_loss(
        stage,
        samples,
        ratios,
        reverse=config.get("reverse_kl", False),
        temperature=config.get("temperature", 1.0),
    )
    assert result.loss_sum.item() == pytest.approx(expected, rel=1e-4)
    total, count = result.metrics["vision_tokens/fraction"]
    assert (total.item(), count) == (pytest.approx((4 / ratios).sum().item()), 7)


def test_kernel_liger_is_given_the_same_sides_and_settings(monkeypatch):
    def by_ours(*sides, **settings):
        return consistency_kl(*sides, **settings).sum()

    called = mock.Mock(wraps=by_ours)
    monkeypatch.setattr("vico_pl.stages.consistency.liger_kl_sum", called)
    settings = {"reverse_kl": True, "temperature": 2.0}
    losses = [
        stage_of(tiny_model(1), tiny_model(2), kernel=kernel, **settings).step(batch_of(*mixed_samples()))
        for kernel in ("native", "liger")
    ]
    assert called.call_count == 1
    assert losses[0].loss_sum.item() == losses[1].loss_sum.item()


def test_a_policy_at_full_tokens_that_is_the_reference_loses_nothing():
    result = stage_of(tiny_model(ratios=[4])).step(batch_of(*mixed_samples()))
    assert result.loss_sum.item() == pytest.approx(0, abs=1e-4)
    assert result.metrics["vision_tokens/fraction"] == (7, 7)


@pytest.mark.parametrize("images", [(), (3,)])
def test_a_step_gives_every_trained_parameter_a_gradient_and_the_reference_none(images):
    model = tiny_model().train()
    stage = stage_of(model)
    result = stage.step(batch_of(encoded_sample(1, images=images)))
    result.loss_sum.backward()
    trained = {name: p for name, p in stage.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in trained.values())
    assert all(p.grad is None for p in stage.reference.model.parameters())
    assert not any("router" in name for name in trained)


def test_checkpoints_hold_the_policy_and_nothing_of_the_reference():
    model = tiny_model()
    assert stage_of(model).state_dict().keys() == {f"model.{name}" for name in model.state_dict()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ratio_draw": "patch"},
            "consistency.ratio_draw is 'patch'; expected one of image, tile, mixed, full",
        ),
        ({"temperature": 0.0}, "consistency.temperature is 0.0; expected more than 0"),
        ({"chunk_size": 0}, "consistency.chunk_size is 0; expected 1 or more"),
    ],
)
def test_settings_that_the_stage_cannot_follow_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ConsistencyConfig(**settings)


def test_checkpoints_leave_out_frozen_weights_of_the_model_folder_and_get_them_back():
    model = tiny_model()
    for part in (model.vision, model.language, model.connectors.by_ratio["16"]):
        part.requires_grad_(requires_grad=False)
    stage = stage_of(model)
    checkpoint = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(checkpoint)
    # A connector that is fresh is in no folder; frozen or not, it stays.
    assert {name.split(".")[1] for name in checkpoint["state_dict"]} == {"connectors", "router"}
    assert any("by_ratio.16" in name for name in checkpoint["state_dict"])
    stage.on_load_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == stage.state_dict().keys()
