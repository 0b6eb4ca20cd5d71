import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.helpers import batch_of, encoded_sample, mixed_samples, tiny_model
from vico_pl.data.collate import collate
from vico_pl.model.reference import FrozenReference
from vico_pl.optim import OptimConfig
from vico_pl.stages import router as router_module
from vico_pl.stages.base import Ranks
from vico_pl.stages.labels import tile_loss_ratios
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
    stage.ranks = Ranks(1)
    return stage.eval()


def ratios_of(stage, batch):
    features = stage.policy.model.encode_tiles(batch.tiles)
    mode = stage.config.label_mode
    return tile_loss_ratios(
        stage.policy.model, stage.reference, batch, features, mode=mode, epsilon=stage.config.epsilon
    )


def test_the_loss_is_cross_entropy_against_labels_below_the_percentile():
    stage, batch = stage_of(percentile=40.0), batch_of(*mixed_samples())
    result = stage.step(batch)
    ratios = ratios_of(stage, batch)
    threshold = ratios.double().quantile(0.4).item()
    targets = torch.tensor([0 if ratio < threshold else 1 for ratio in ratios.tolist()])  # 0: compress
    assert 0 < targets.sum() < 7
    logits = stage.router(stage.policy.model.encode_tiles(batch.tiles))
    assert stage.num_items(batch) == 7
    assert result.loss_sum.item() == pytest.approx(
        cross_entropy(logits, targets, reduction="sum").item(), rel=1e-5
    )
    assert result.metrics["router/threshold"] == (pytest.approx(threshold, rel=1e-5), 1)
    chosen = logits.argmax(1)
    assert result.metrics["router/accuracy"] == ((chosen == targets).sum(), 7)
    assert result.metrics["router/compressed_fraction"] == ((chosen == 0).sum(), 7)


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
        total, count = stage.step(batch).metrics["router/auroc"]
        assert (total.item() / count, count) == (pytest.approx(expected), 4)


def test_there_are_no_labels_before_min_history():
    stage, batch = stage_of(min_history=10), batch_of(*mixed_samples())  # seven tiles
    result = stage.step(batch)
    assert (result.loss_sum.item(), result.metrics) == (0, {})
    result.loss_sum.backward()  # zero, but a gradient: every rank takes the same steps
    assert stage.step(batch).loss_sum > 0


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
    text = batch_of(encoded_sample(1, images=()))
    assert (stage.step(text).loss_sum.item(), stage.num_items(text)) == (0, 0)
    assert int(stage.window.seen) == 7


def test_tiles_of_the_filler_are_neither_labelled_nor_remembered():
    samples, dummy = mixed_samples(), encoded_sample(9, images=(1,), answers=())
    plain, filled = stage_of(), stage_of()
    alone = plain.step(batch_of(*samples))
    with_filler = filled.step(collate([*samples, dummy], positions=[0, 1, 2, 3, -1]))
    assert with_filler.loss_sum.item() == pytest.approx(alone.loss_sum.item(), rel=1e-5)
    assert torch.equal(filled.window.values, plain.window.values)
    assert int(filled.window.seen) == 7


def test_packs_are_labelled_together_in_the_order_of_the_run_however_they_are_cut():
    samples = mixed_samples()
    whole, cut = stage_of(percentile=40.0), stage_of(percentile=40.0)
    one = whole.step(batch_of(*samples))
    micro_batches = [collate(samples[2:], positions=[2, 3]), collate(samples[:2], positions=[0, 1])]
    several = list(cut.results(micro_batches))
    assert sum(result.loss_sum.item() for result in several) == pytest.approx(one.loss_sum.item(), rel=1e-5)
    assert torch.allclose(cut.window.values, whole.window.values, rtol=1e-5)


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
