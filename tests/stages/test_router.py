import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from tests.helpers import batch_of, encoded_sample, mixed_samples, tiny_model
from vico_pl.model.reference import FrozenReference
from vico_pl.optim import OptimConfig
from vico_pl.stages import router as router_module
from vico_pl.stages.labels import mean_per_sample, tile_loss_ratios
from vico_pl.stages.router import RouterConfig, RouterStage

EPSILON = 1e-3


def config(**changes):
    return RouterConfig(**{"window": 100, "min_history": 1, "epsilon": EPSILON, **changes})


def stage_of(**changes):
    stage = RouterStage(
        FrozenReference(tiny_model(1)),
        FrozenReference(tiny_model(2)),
        config(**changes),
        OptimConfig(),
        num_steps=10,
    )
    stage.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=1)
    return stage.eval()


@torch.no_grad()
def naive_sample_loss(policy, reference, sample, ratios):
    """Mean divergence of one sample that runs alone, by torch's own KL in float64."""
    batch = batch_of(sample)
    if not sample.response_mask.any():
        return 0.0
    ours = policy.response_states(batch, policy.encode_tiles(batch.tiles), ratios) @ policy.head.T
    full = torch.full_like(ratios, 4)
    wanted = reference.response_states(batch, reference.encode_tiles(batch.tiles), full) @ reference.head.T
    log_q, log_p = (log_softmax(x.double(), -1) for x in (ours, wanted))
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean().item()


def naive_ratios(policy, reference, samples, mode):
    """Loss ratios from one forward pass per tile, each sample and each tile by itself."""
    found = []
    for sample in samples:
        num_tiles = len(sample.tiles)
        full = torch.full((num_tiles,), 4)
        without = naive_sample_loss(policy, reference, sample, full)
        for tile in range(num_tiles):
            ratios = torch.full((num_tiles,), 16) if mode == "image" else full.clone()
            ratios[tile] = 16
            loss = naive_sample_loss(policy, reference, sample, ratios)
            found.append((loss + EPSILON) / (without + EPSILON))
    return torch.tensor(found)


def ratios_of(stage, batch):
    features = stage.policy.model.encode_tiles(batch.tiles)
    mode = stage.config.label_mode
    return tile_loss_ratios(
        stage.policy.model, stage.reference, batch, features, mode=mode, epsilon=stage.config.epsilon
    )


@pytest.mark.parametrize("mode", ["tile", "image"])
def test_loss_ratios_equal_those_of_every_tile_run_alone(mode):
    samples = mixed_samples()
    stage = stage_of(label_mode=mode)
    expected = naive_ratios(stage.policy.model, stage.reference.model, samples, mode)
    assert expected.std() > 0.01, "the example tells tiles apart"
    torch.testing.assert_close(ratios_of(stage, batch_of(*samples)), expected, rtol=1e-5, atol=1e-5)


def test_image_labels_are_alike_for_the_tiles_of_a_sample_and_tile_labels_are_not():
    batch = batch_of(encoded_sample(1, images=(3,)))
    assert len(set(ratios_of(stage_of(label_mode="image"), batch).tolist())) == 1
    assert len(set(ratios_of(stage_of(label_mode="tile"), batch).tolist())) == 3


def test_a_sample_without_response_has_ratio_one():
    batch = batch_of(encoded_sample(1, images=(2,), answers=()), encoded_sample(2, images=(1,)))
    assert ratios_of(stage_of(), batch)[:2].tolist() == [1.0, 1.0]


def test_vision_encoder_and_reference_run_once_per_sample(monkeypatch):
    stage, batch, encoded = stage_of(), batch_of(*mixed_samples()), []
    for model in (stage.policy.model, stage.reference.model):
        model.vision.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    stage.step(batch)
    assert encoded == [7, 7]


def test_values_are_averaged_over_each_sample():
    samples = mixed_samples()  # 4, 5, 6 and 2 response tokens
    samples.insert(2, encoded_sample(9, answers=()))
    values = torch.arange(17.0)
    expected = [part.mean().item() if len(part) else 0.0 for part in values.split([4, 5, 0, 6, 2])]
    assert mean_per_sample(values, batch_of(*samples)).tolist() == pytest.approx(expected)


def test_the_loss_is_cross_entropy_against_labels_below_the_percentile():
    stage, batch = stage_of(percentile=40.0), batch_of(*mixed_samples())
    result = stage.step(batch)
    ratios = ratios_of(stage, batch)
    threshold = ratios.double().quantile(0.4).item()
    targets = torch.tensor([0 if ratio < threshold else 1 for ratio in ratios.tolist()])  # 0: compress
    assert 0 < targets.sum() < 7
    logits = stage.router(stage.policy.model.encode_tiles(batch.tiles))
    assert result.count == 7
    assert result.loss_sum.item() == pytest.approx(
        cross_entropy(logits, targets, reduction="sum").item(), rel=1e-5
    )
    assert result.metrics["router/threshold"] == pytest.approx(threshold, rel=1e-5)
    chosen = logits.argmax(1)
    assert result.metrics["router/accuracy"].item() == pytest.approx(
        (chosen == targets).float().mean().item()
    )
    assert result.metrics["router/compressed_fraction"].item() == pytest.approx(
        (chosen == 0).float().mean().item()
    )


def test_auroc_asks_whether_tiles_to_keep_rank_above_tiles_to_compress(monkeypatch):
    stage, batch = stage_of(), batch_of(encoded_sample(1, images=(4,)))
    monkeypatch.setattr(
        router_module, "tile_loss_ratios", lambda *_, **__: torch.tensor([1.0, 2.0, 3.0, 4.0])
    )
    for scores, expected in (
        ([0.0, 1.0, 2.0, 3.0], 1.0),
        ([3.0, 2.0, 1.0, 0.0], 0.0),
        ([0.0, 2.0, 1.0, 3.0], 0.75),
    ):
        keep = torch.tensor(scores)
        stage.router.forward = lambda _, keep=keep: torch.stack([-keep, keep], dim=1).requires_grad_()
        stage.window.values.zero_()
        stage.window.seen.zero_()
        assert stage.step(batch).metrics["router/auroc"].item() == pytest.approx(expected)


def test_there_are_no_labels_before_min_history():
    stage, batch = stage_of(min_history=10), batch_of(*mixed_samples())  # seven tiles
    result = stage.step(batch)
    assert (result.loss_sum.item(), result.count, result.metrics) == (0, 0, {})
    result.loss_sum.backward()  # zero, but a gradient: every rank takes the same steps
    assert stage.step(batch).count == 7


def test_only_the_router_learns_and_every_trained_parameter_has_a_gradient():
    stage = stage_of()
    before = copy.deepcopy(stage.policy.model.state_dict())
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    stage.step(batch_of(*mixed_samples())).loss_sum.backward()
    trained = {name: p for name, p in stage.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert all(name.startswith("router.") for name in trained)
    optimizer.step()
    changed = {n for n, t in stage.trained_model().state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert all(name.startswith("router.") for name in changed)


def test_a_batch_of_text_alone_teaches_nothing_and_breaks_nothing():
    stage = stage_of()
    stage.step(batch_of(*mixed_samples()))
    result = stage.step(batch_of(encoded_sample(1, images=())))
    assert (result.loss_sum.item(), result.count) == (0, 0)
    assert result.metrics.keys() == {"router/threshold"}
    assert int(stage.window.seen) == 7


def test_checkpoints_hold_the_router_and_the_window_alone():
    assert {name.split(".")[0] for name in stage_of().state_dict()} == {"router", "window"}


def test_models_it_cannot_train_are_refused():
    def build(**changes):
        policy = FrozenReference(tiny_model(**changes))
        RouterStage(policy, policy, config(), OptimConfig(), num_steps=1)

    with pytest.raises(ValueError, match=r"the model has no router; set model\.router_heads"):
        build(router_heads=None)
    with pytest.raises(
        ValueError, match=r"model\.ratios is \[4\]; stage router labels the choice between two"
    ):
        build(ratios=[4])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_mode": "patch"}, "router.label_mode is 'patch'; expected image or tile"),
        ({"percentile": 0.0}, "router.percentile is 0.0; expected between 0 and 100"),
        ({"percentile": 100.0}, "router.percentile is 100.0; expected between 0 and 100"),
        ({"epsilon": 0.0}, "router.epsilon is 0.0; expected more than 0"),
        ({"min_history": 0}, r"router.min_history is 0; expected 1 to router.window \(100\)"),
        ({"min_history": 101}, r"router.min_history is 101; expected 1 to router.window \(100\)"),
    ],
)
def test_settings_that_the_stage_cannot_follow_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)
