import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from tests.support.tiny import batch_of, encoded_sample, mixed_samples, tiny_model
from vico_pl.config import RunConfig
from vico_pl.data.collate import collate
from vico_pl.losses.consistency import consistency_kl
from vico_pl.model.reference import FrozenReference
from vico_pl.model.router import RoutingRule, choose_ratios
from vico_pl.stages.consistency import ConsistencyConfig, ConsistencyStage
from vico_pl.stages.settings import ModelConfig


def stage_of(model=None, reference=None, *, seed=0, ratios=(4, 16), **config):
    model, settings = model or tiny_model(), {"seed": seed, "model": ModelConfig(ratios=list(ratios))}
    run = RunConfig(stage="consistency", run_dir="x", consistency=ConsistencyConfig(**config), **settings)
    return ConsistencyStage(run, model, FrozenReference(copy.deepcopy(reference or model)))


def draw(*, mode, start=0, **settings):
    """Draw ratios for 400 images of three tiles each, two in a sample."""
    samples = [encoded_sample(i, images=(3, 3), answers=(1,)) for i in range(200)]
    batch = collate(samples, positions=range(start, start + 200))
    return stage_of(ratio_draw=mode, **settings).draw_ratios(batch).view(200, 2, 3)


def fraction_equal(ratios, others):
    return (ratios == others).float().mean().item()


@pytest.mark.parametrize(("mode", "uniform"), [("image", 1), ("tile", 1 / 4), ("mixed", (1 + 1 / 4) / 2)])
def test_tiles_of_an_image_draw_the_same_ratio_by_mode(mode, uniform):
    ratios = draw(mode=mode)
    same = (ratios == ratios[:, :, :1]).all(-1).float().mean().item()
    assert same == pytest.approx(uniform, abs=0.1)


@pytest.mark.parametrize("mode", ["image", "tile", "mixed"])
def test_all_ratios_are_drawn_alike_and_images_positions_and_seeds_draw_by_themselves(mode):
    ratios = draw(mode=mode, ratios=(4, 16, 64))
    for ratio in (4, 16, 64):
        assert fraction_equal(ratios, ratio) == pytest.approx(1 / 3, abs=0.08)
    first = draw(mode=mode)
    assert torch.equal(first, draw(mode=mode))
    others = draw(mode=mode, start=200), draw(mode=mode, seed=1)
    for one, other in ((first[:, 0], first[:, 1]), (first, others[0]), (first, others[1]), others):
        assert fraction_equal(one, other) == pytest.approx(0.5, abs=0.12)


def test_a_sample_draws_the_same_whatever_it_shares_the_batch_with():
    samples, positions = mixed_samples(), [70, 3, 12, 9]
    batches = [collate(samples, positions=positions)]
    batches += [collate([s], positions=[p]) for s, p in zip(samples, positions, strict=True)]
    together, *alone = map(stage_of().draw_ratios, batches)
    assert torch.equal(together, torch.cat(alone))


@torch.no_grad()
def naive_loss(stage, samples, ratios, *, temperature, reverse):
    """Sum of divergences, one sample after the other and with torch's own KL in float64."""
    total = 0.0
    for sample, own in zip(samples, ratios.split([len(s.tiles) for s in samples]), strict=True):
        sides = (stage.model, own), (stage.reference.model, torch.full_like(own, 4))
        log_q, log_p = (log_probabilities(m, sample, at, temperature=temperature) for m, at in sides)
        if reverse:
            log_q, log_p = log_p, log_q
        total += kl_div(log_q, log_p, reduction="sum", log_target=True).item()
    return total


def log_probabilities(model, sample, ratios, *, temperature):
    batch = batch_of(sample)
    logits = model.response_states(batch, model.encode_tiles(batch.tiles), ratios) @ model.head.T
    return log_softmax(logits.double() / temperature, -1)


@pytest.mark.parametrize("config", [{}, {"reverse_kl": True, "temperature": 2.0}, {"chunk_size": 3}])
def test_the_loss_is_kl_of_the_reference_at_full_tokens_from_the_policy_at_drawn_ratios(config):
    samples = mixed_samples()
    stage, batch = stage_of(tiny_model(1), tiny_model(2), **config), batch_of(*samples)
    result, ratios = stage.step(batch), stage.draw_ratios(batch)
    settings = {"reverse": config.get("reverse_kl", False), "temperature": config.get("temperature", 1.0)}
    assert result.loss_sum.item() == pytest.approx(naive_loss(stage, samples, ratios, **settings), rel=1e-4)
    total, count = result.metrics["vision_tokens/fraction"]
    assert (total.item(), count) == (pytest.approx((4 / ratios).sum().item()), 7)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_weight_of_cross_entropy_moves_the_loss_from_the_reference_to_the_data(weight):
    stage, batch = stage_of(tiny_model(1), tiny_model(2), cross_entropy=weight), batch_of(*mixed_samples())
    kl = stage_of(tiny_model(1), tiny_model(2)).step(batch).loss_sum.item()
    states = stage.model.response_states(
        batch, stage.model.encode_tiles(batch.tiles), stage.draw_ratios(batch)
    )
    targets = batch.input_ids[batch.response_mask]
    of_data = cross_entropy(states @ stage.model.head.T, targets, reduction="sum").item()
    assert abs(of_data - kl) > 1
    result = stage.step(batch)
    assert result.loss_sum.item() == pytest.approx((1 - weight) * kl + weight * of_data, rel=1e-5)
    for name, value in (("kl", kl), ("cross_entropy", of_data)):
        total, count = result.metrics[f"consistency/{name}"]
        assert (total.item(), count) == (pytest.approx(value, rel=1e-5), batch.num_response_tokens)


def test_settings_of_the_kl_have_no_effect_on_cross_entropy_alone():
    config = ConsistencyConfig(cross_entropy=1.0, temperature=2.0, reverse_kl=True)
    run = RunConfig(stage="consistency", run_dir="x", consistency=config)
    found = [text for text in ConsistencyStage.doubtful_settings(run) if "cross-entropy" in text]
    assert [text.split()[0] for text in found] == ["consistency.temperature", "consistency.reverse_kl"]


# --- Stage 3 ------------------------------------------------------------------------------------------------


class Models:
    """A policy, its reference and the rule by which it is routed."""

    same_weights = True

    def __init__(self, rule):
        self._rule = rule

    def policy(self):
        return tiny_model(1)

    def reference(self):
        return tiny_model(2)

    def rule(self):
        return self._rule


def routed_stage(rule, **config):
    config = ConsistencyConfig(ratio_draw="routed", **config)
    run = RunConfig(stage="consistency", run_dir="x", model=ModelConfig(path="MODEL"), consistency=config)
    return ConsistencyStage.build(run, Models(rule))


@pytest.mark.parametrize("relative", [None, 0.3])
def test_the_frozen_router_chooses_the_ratios_as_in_inference(relative):
    samples, model = mixed_samples(), tiny_model(1)
    with torch.no_grad():
        logits = [model.router(model.encode_tiles(sample.tiles)) for sample in samples]
    scores = torch.cat(logits).softmax(-1)[:, 0].sort().values
    threshold = scores[3:5].mean().item()  # between two: no rounding decides
    rule = RoutingRule(threshold=threshold, relative_threshold=relative)
    expected = torch.cat([choose_ratios(own, ratios=[4, 16], rule=rule) for own in logits])
    assert set(expected.tolist()) == {4, 16}
    stage, batch = routed_stage(rule).train(), batch_of(*samples)  # dropout of the router stays off
    stage.model.set_dropout(0.5)
    stage.model.connectors.eval()
    features = stage.model.encode_tiles(batch.tiles)
    for _ in range(3):
        assert torch.equal(stage.draw_ratios(batch, features), expected)
    assert stage.model.router.training
    result = stage.step(batch)
    loss = naive_loss(stage, samples, expected, temperature=1, reverse=False)
    assert result.loss_sum.item() == pytest.approx(loss, rel=1e-4)
    assert result.metrics["vision_tokens/fraction"].total.item() == (4 / expected).sum().item()
    result.loss_sum.backward()
    assert all(p.grad is None and not p.requires_grad for p in stage.model.router.parameters())
    found = stage.eval().validate(batch, place=(0,))
    assert found["kl_routed"].total.item() == pytest.approx(loss, rel=1e-4)
    one = stage.compressed_ratios(stage.model.encode_tiles(samples[0].tiles))["routed"]
    assert torch.equal(one, expected[: len(one)])


def test_without_a_calibrated_router_nothing_can_be_routed():
    with pytest.raises(ValueError, match=r"MODEL: consistency\.ratio_draw is 'routed'.*run 'vico calibrate'"):
        routed_stage(None)


def test_a_routed_sample_is_planned_at_full_tokens_and_its_model_calibrated_again():
    run = routed_stage(RoutingRule(threshold=0.5)).run
    assert ConsistencyStage.ratios_at(run, 7, [2, 1]) == [4, 4, 4]
    assert ConsistencyStage.what_next(run).startswith("vico calibrate {model} ")
    assert ConsistencyStage.what_next(stage_of().run) == ConsistencyStage.next_step


def test_kernel_liger_is_given_the_same_sides_and_settings(monkeypatch):
    calls = []

    def by_ours(*sides, **settings):
        calls.append(settings)
        return consistency_kl(*sides, **settings).sum()

    monkeypatch.setattr("vico_pl.stages.consistency.liger_kl_sum", by_ours)
    doubtful = RunConfig(
        stage="consistency", run_dir="x", consistency=ConsistencyConfig(kernel="liger", chunk_size=8)
    )
    assert "chunk_size has no effect" in "".join(ConsistencyStage.doubtful_settings(doubtful))
    settings = {"reverse_kl": True, "temperature": 2.0}
    losses = [
        stage_of(tiny_model(1), tiny_model(2), kernel=kernel, **settings).step(batch_of(*mixed_samples()))
        for kernel in ("native", "liger")
    ]
    assert len(calls) == 1
    assert losses[0].loss_sum.item() == losses[1].loss_sum.item()


def test_a_policy_at_full_tokens_that_is_the_reference_loses_nothing():
    result = stage_of(tiny_model(ratios=[4]), ratios=[4]).step(batch_of(*mixed_samples()))
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


def test_checkpoints_leave_out_frozen_weights_of_the_model_folder_and_get_them_back():
    model = tiny_model()
    for part in (model.vision, model.language, model.connectors.by_ratio["16"]):
        part.requires_grad_(requires_grad=False)
    stage = stage_of(model)
    checkpoint = {"state_dict": stage.state_dict()}
    assert checkpoint["state_dict"].keys() == {f"model.{name}" for name in model.state_dict()}
    stage.on_save_checkpoint(checkpoint)
    # An added connector is in no folder; frozen or not, it stays.
    assert {name.split(".")[1] for name in checkpoint["state_dict"]} == {"connectors", "router"}
    assert any("by_ratio.16" in name for name in checkpoint["state_dict"])
    stage.on_load_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == stage.state_dict().keys()
