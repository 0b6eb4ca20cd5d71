import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from tests.support.tiny import batch_of, encoded_sample, mixed_samples, tiny_model
from vico_pl.config import RunConfig
from vico_pl.data.collate import collate
from vico_pl.model.reference import FrozenReference
from vico_pl.stages import router as router_module
from vico_pl.stages.figures import Ranks, combine
from vico_pl.stages.labels import (
    RouterConfig,
    mean_per_sample,
    router_targets,
    soft_targets,
    tile_loss_ratios,
)
from vico_pl.stages.router import RouterStage

EPSILON = 1e-3
THREE = [4, 16, 64]
LABEL_MODES = pytest.mark.parametrize("mode", ["tile", "image"])


def config(**changes):
    return RouterConfig(**{"window": 100, "min_history": 1, "epsilon": EPSILON, **changes})


def stage_of(policy=None, **changes):
    run = RunConfig(stage="router", run_dir="x", router=config(**changes))
    stage = RouterStage(run, policy or tiny_model(1), FrozenReference(tiny_model(2)))
    stage.ranks = Ranks(1)
    return stage.eval()


def ratios_of(policy, reference, *samples, mode="tile"):
    batch = batch_of(*samples)
    features = policy.encode_tiles(batch.tiles)
    return tile_loss_ratios(policy, reference, batch, features, mode=mode, epsilon=EPSILON)


def test_the_loss_is_cross_entropy_against_labels_below_the_percentile():
    stage, batch = stage_of(percentile=40.0), batch_of(*mixed_samples())
    policy, result = stage.trained_model(), stage.step(batch)
    ratios = ratios_of(policy, stage.reference, *mixed_samples())[:, 0]
    threshold = ratios.double().quantile(0.4).item()
    targets = torch.tensor([0 if ratio < threshold else 1 for ratio in ratios.tolist()])  # 0: compress
    assert 0 < targets.sum() < 7
    logits = stage.router(policy.encode_tiles(batch.tiles))
    assert stage.num_items(batch) == 7
    loss = cross_entropy(logits, targets, reduction="sum").item()
    assert result.loss_sum.item() == pytest.approx(loss, rel=1e-5)
    assert result.metrics["router/threshold"] == (pytest.approx(threshold, rel=1e-5), 1)
    chosen = logits.argmax(1)
    assert result.metrics["router/accuracy"] == ((chosen == targets).sum(), 7)
    assert result.metrics["router/compressed_fraction"] == ((chosen == 0).sum(), 7)


@pytest.mark.parametrize(
    ("scores", "auroc"),
    [([0.0, 1.0, 2.0, 3.0], 1.0), ([3.0, 2.0, 1.0, 0.0], 0.0), ([0.0, 2.0, 1.0, 3.0], 0.75)],
)
def test_auroc_is_whether_tiles_to_keep_rank_above_tiles_to_compress(monkeypatch, scores, auroc):
    stage, keep, labels = stage_of(), torch.tensor(scores).float(), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    monkeypatch.setattr(router_module, "tile_loss_ratios", lambda *_, **__: labels)
    stage.router.forward = lambda _: torch.stack([-keep, keep], dim=1).requires_grad_()
    found = stage.step(batch_of(encoded_sample(1, images=(4,)))).metrics
    assert stage.logged(found)["router/auroc"] == pytest.approx(auroc)


def test_the_auroc_of_an_interval_is_over_all_its_tiles():
    values = [([0.1, 0.4], [0, 1]), ([0.5, 0.8], [0, 1])]  # in each of these it is 1
    halves = [{"keep": torch.tensor(keep), "targets": torch.tensor(label)} for keep, label in values]
    assert stage_of().logged(combine(halves)) == {"router/auroc": 0.75}


def test_there_are_no_labels_before_min_history():
    stage, batch = stage_of(min_history=10), batch_of(*mixed_samples())  # seven tiles
    result = stage.step(batch)
    assert (result.loss_sum.item(), result.num_items, result.metrics) == (0, 0, {})
    result.loss_sum.backward()  # zero, but a gradient: every rank takes the same steps
    assert stage.step(batch).loss_sum > 0


def test_loss_ratios_that_are_not_finite_are_left_out_and_counted(monkeypatch):
    stage, ratios = stage_of(), torch.tensor([[1.0], [float("nan")], [3.0], [float("inf")]])
    monkeypatch.setattr(router_module, "tile_loss_ratios", lambda *_, **__: ratios)
    result = stage.step(batch_of(encoded_sample(1, images=(4,))))
    assert (stage.num_left_out, result.num_items, int(stage.window.seen)) == (2, 2, 2)
    assert (result.metrics["router/threshold"].total, result.loss_sum.isfinite().item()) == (2.0, True)


def test_only_the_router_learns_and_every_trained_parameter_has_a_gradient():
    stage = stage_of()
    before = copy.deepcopy(stage.trained_model().state_dict())
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    stage.step(batch_of(*mixed_samples())).loss_sum.backward()
    trained = {name: p for name, p in stage.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    optimizer.step()
    changed = {n for n, t in stage.trained_model().state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert all(name.startswith("router.") for name in (*changed, *trained))
    assert {name.split(".")[0] for name in stage.state_dict()} == {"router", "window"}


@LABEL_MODES
def test_a_batch_of_text_alone_teaches_nothing_and_breaks_nothing(mode):
    stage = stage_of(label_mode=mode)
    stage.step(batch_of(*mixed_samples()))
    text = batch_of(encoded_sample(1, images=()))
    assert (stage.step(text).loss_sum.item(), stage.num_items(text)) == (0, 0)
    assert int(stage.window.seen) == 7


def test_tiles_of_the_dummy_are_neither_labelled_nor_remembered():
    samples, dummy = mixed_samples(), encoded_sample(9, images=(1,), answers=())
    plain, filled = stage_of(), stage_of()
    alone = plain.step(batch_of(*samples))
    with_dummy = filled.step(collate([*samples, dummy], positions=[0, 1, 2, 3, -1]))
    assert with_dummy.loss_sum.item() == pytest.approx(alone.loss_sum.item(), rel=1e-5)
    assert torch.equal(filled.window.values, plain.window.values)
    assert int(filled.window.seen) == 7


def test_micro_batches_are_labelled_together_in_the_order_of_the_run_however_they_are_split():
    samples = mixed_samples()
    whole, split = stage_of(percentile=40.0), stage_of(percentile=40.0)
    one = whole.step(batch_of(*samples))
    micro_batches = [collate(samples[2:], positions=[2, 3]), collate(samples[:2], positions=[0, 1])]
    several = list(split.results(micro_batches))
    assert sum(result.loss_sum.item() for result in several) == pytest.approx(one.loss_sum.item(), rel=1e-5)
    assert torch.allclose(split.window.values, whole.window.values, rtol=1e-5)


@pytest.mark.parametrize("num_kept", [0, 1, 2])
def test_features_that_are_not_kept_are_computed_again_with_the_same_result(monkeypatch, num_kept):
    samples = mixed_samples()
    micro_batches = [collate([samples[n]], positions=[n]) for n in (3, 0, 2)]

    def train(stage):
        encoded, encode = [], stage.policy.model.encode_tiles
        monkeypatch.setattr(
            stage.policy.model, "encode_tiles", lambda tiles: encoded.append(1) or encode(tiles)
        )
        losses = []
        for result in stage.results(micro_batches):
            result.loss_sum.backward()
            losses.append(result.loss_sum.detach())
        return [*losses, *(p.grad for p in stage.router.parameters() if p.requires_grad)], len(encoded)

    expected, times = train(stage_of())
    assert times == 3, "once each"
    bytes_each = 4 * 48 * 16 * 32  # float32, default max_tiles, patches, width
    monkeypatch.setattr(router_module, "KEPT_BYTES", num_kept * bytes_each)
    found, times = train(stage_of())
    assert times == 3 + 3 - num_kept
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


def test_a_model_without_router_is_refused():
    with pytest.raises(ValueError, match=r"the model has no router; set model\.router_heads"):
        stage_of(tiny_model(router_heads=None))


@pytest.mark.parametrize("softness", [0.0, 0.5])
def test_of_three_ratios_the_coarsest_harmless_one_is_learned(softness):
    policy = three_ratios()
    stage, batch = stage_of(policy, label_softness=softness), batch_of(*mixed_samples())
    result, ratios = stage.step(batch), ratios_of(policy, stage.reference, *mixed_samples())
    thresholds = ratios.quantile(0.5, dim=0).tolist()
    targets = router_targets(ratios, thresholds)
    assert set(targets.tolist()) == {0, 1, 2}
    soft = soft_targets(ratios, thresholds, softness=softness) if softness else targets
    logits, found = stage.router(policy.encode_tiles(batch.tiles)), result.metrics
    loss = cross_entropy(logits, soft, reduction="sum").item()
    assert result.loss_sum.item() == pytest.approx(loss, rel=1e-5)
    assert [found[f"router/threshold_{r}"].total for r in (64, 16)] == pytest.approx(thresholds, rel=1e-5)
    chosen = logits.argmax(1)
    assert found["router/accuracy"] == ((chosen == targets).sum(), 7)  # always of hard targets
    assert torch.equal(found["targets"], (targets == 2).long())
    assert found["router/compressed_fraction"] == ((chosen < 2).sum(), 7)
    fractions = torch.tensor([1 / 16, 1 / 4, 1])[chosen]
    assert found["router/token_fraction"].total.item() == pytest.approx(fractions.sum().item())


def test_of_three_ratios_validation_compares_the_choice_with_the_labels():
    stage, batch = stage_of(three_ratios()), batch_of(*mixed_samples())
    with torch.no_grad():
        figures = stage.validate(batch, place=(0,))
    ratios = ratios_of(stage.trained_model(), stage.reference, *mixed_samples())
    targets = router_targets(ratios, ratios.quantile(0.5, dim=0).tolist())
    chosen = stage.router(stage.trained_model().encode_tiles(batch.tiles)).argmax(1)
    found = stage.summary(figures)
    assert found["accuracy"] == pytest.approx((chosen == targets).float().mean().item())
    assert {"auroc", "kl_at_0.5", "token_fraction_at_0.3"} <= found.keys()


def test_the_rule_tolerance_labels_from_the_first_step():
    policy = tiny_model(1)
    stage = stage_of(policy, label_rule="tolerance", tolerance=0.02, min_history=100)
    ratios, found = (
        ratios_of(policy, stage.reference, *mixed_samples()),
        stage.step(batch_of(*mixed_samples())),
    )
    assert found.metrics["targets"].tolist() == (ratios[:, 0] >= 1.02).long().tolist()
    assert 0 < found.metrics["targets"].sum() < 7
    assert (found.num_items, int(stage.window.seen)) == (7, 0)  # nothing to remember


@pytest.mark.parametrize(
    ("changes", "without_effect"),
    [
        ({}, []),
        ({"tolerance": 0.5}, ["tolerance"]),
        ({"label_rule": "tolerance", "window": 9, "min_history": 2}, ["window", "min_history"]),
    ],
)
def test_settings_of_the_other_rule_cause_a_warning(changes, without_effect):
    run = RunConfig(stage="router", run_dir="x", router=RouterConfig(**changes))
    label_rule = RouterConfig(**changes).label_rule
    expected = [f"router.{n} has no effect: router.label_rule is {label_rule}" for n in without_effect]
    assert [text for text in RouterStage.doubtful_settings(run) if "router." in text] == expected


def three_ratios(seed=1):
    """Tiles of 64 patches, which become 16, 4 or 1 vision tokens."""
    vision = {"image_size": 32, "patch_size": 4, "width": 32, "layers": 1, "head_width": 16}
    return tiny_model(seed, ratios=THREE, vision=vision)


# --- Loss ratios --------------------------------------------------------------------------------------------


@pytest.fixture
def policy():
    return tiny_model(1)


@pytest.fixture
def reference():
    return FrozenReference(tiny_model(2))


@torch.no_grad()
def naive_sample_loss(policy, reference, sample, ratios):
    """Mean divergence of one sample that runs alone, by torch's own KL in float64."""
    batch = batch_of(sample)
    if not sample.response_mask.any():
        return 0.0
    log_q, log_p = (
        log_softmax((m.response_states(batch, m.encode_tiles(batch.tiles), at) @ m.head.T).double(), -1)
        for m, at in ((policy, ratios), (reference.model, torch.full_like(ratios, 4)))
    )
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean().item()


def naive_ratios(policy, reference, samples, mode):
    """Loss ratios from one forward pass per tile and ratio, each sample and each tile by itself."""
    found = []
    for sample in samples:
        full = torch.full((len(sample.tiles),), 4)
        without = naive_sample_loss(policy, reference, sample, full)
        for tile in range(len(full)):
            found.append([])
            for ratio in reversed(policy.ratios[1:]):
                ratios = torch.full_like(full, ratio) if mode == "image" else full.clone()
                ratios[tile] = ratio
                loss = naive_sample_loss(policy, reference, sample, ratios)
                found[-1].append((loss + EPSILON) / (without + EPSILON))
    return torch.tensor(found, dtype=policy.head.dtype)


@LABEL_MODES
@pytest.mark.parametrize("num_ratios", [2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_loss_ratios_equal_those_of_every_tile_run_alone(mode, num_ratios, dtype, tolerance):
    make = tiny_model if num_ratios == 2 else three_ratios
    policy, reference = make(1).to(dtype), FrozenReference(make(2).to(dtype))
    silent = encoded_sample(5, images=(2,), answers=())
    samples = [*mixed_samples(), silent, encoded_sample(6, images=())]
    expected = naive_ratios(policy, reference, samples, mode)
    assert expected.std(0).min() > 0.01, "the example tells tiles apart"
    found = ratios_of(policy, reference, *samples, mode=mode)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert (found[-2:] == 1).all()  # without response, compressing changes nothing
    assert len(found[:3].unique(dim=0)) == (1 if mode == "image" else 3)


@LABEL_MODES
def test_vision_encoder_and_reference_run_once(policy, reference, mode):
    encoded, passes = [], []
    for name, model in (("policy", policy), ("reference", reference.model)):
        model.vision.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
        model.language.base_model.register_forward_hook(lambda *_, name=name: passes.append(name))
    ratios_of(policy, reference, *mixed_samples(), mode=mode)
    assert encoded == [7, 7]
    assert sorted(passes) == ["policy", "policy", "reference"]  # at full tokens, and what is compressed


def test_values_are_averaged_over_each_sample():
    samples = mixed_samples()  # 4, 5, 6 and 2 response tokens
    samples.insert(2, encoded_sample(9, answers=()))
    values = torch.arange(17.0)
    expected = [part.mean().item() if len(part) else 0.0 for part in values.split([4, 5, 0, 6, 2])]
    assert mean_per_sample(values, batch_of(*samples)).tolist() == pytest.approx(expected)
