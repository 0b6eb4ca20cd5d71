"""Both sides of a comparison compute the same, and what is counted is what runs."""

import json
import sys

import pytest
import torch

from tests.scripts import BENCHMARKS, load_benchmark
from vico_pl.model.branches import branch_states
from vico_pl.model.flops import flops_of
from vico_pl.model.language import run_packed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")

models, labels, step, inference = (load_benchmark(n) for n in ("models", "labels", "step", "inference"))
TINY = {
    "tile_size": 56,  # 4 vision tokens or 1
    "vision": {"width": 64, "layers": 1},
    "language": {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "heads": (2, 1)},
    "vocab_size": 512,
}
TEXT = models.Text(system=3, question=4, response=5)


def recorded(name):
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())


# --- Operations ---------------------------------------------------------------------------------------------


def test_operations_of_packed_samples_are_those_of_their_tokens_and_pairs():
    counter, spec = models.Counter(), models.spec_of(**TINY)
    model = counter.model(spec)
    costs = flops_of(model)
    x, positions = torch.zeros(7, 48), torch.arange(7)
    counted = counter.count(lambda: run_packed(model.language, x, positions, [3, 4]))
    assert counted == costs.language(3) + costs.language(4)


def test_operations_of_tiles_and_heads_are_counted():
    counter, spec = models.Counter(), models.spec_of(**TINY)
    model, batch = counter.model(spec), models.draw_batch(spec, [2])
    costs = flops_of(model)
    assert counter.count(lambda: model.encode_tiles(batch.tiles)) == 2 * costs.vision_per_tile
    router = counter.count(lambda: model.router(torch.zeros(3, 16, 64)))
    assert router == pytest.approx(3 * costs.router_per_tile, rel=0.01)
    states = torch.zeros(5, 48)
    counted = counter.count(lambda: counter.divergence(states, model.head, states, model.head))
    assert counted == 2 * 5 * costs.head_per_token


def test_operations_of_branches_are_those_of_what_stands_behind_the_tile():
    counter, spec = models.Counter(), models.spec_of(**TINY)
    model, batch = counter.model(spec), models.draw_batch(spec, [2], TEXT)
    features, costs = torch.zeros(2, 16, 64), flops_of(model)
    counted = counter.count(lambda: branch_states(model, batch, features, ratio=16))
    whole = 3 + 2 * 4 + 9
    branches = [(3, 1 + 4 + 9), (7, 1 + 9)]  # tokens before the tile, and of the branch
    pairs = sum(before * own + own * (own + 1) / 2 for before, own in branches)
    language = costs.language(whole) + pairs * costs.language_per_pair
    language += sum(own for _, own in branches) * costs.language_per_token
    connectors = 2 * costs.connector_per_tile[4] + 2 * costs.connector_per_tile[16]
    assert counted == language + connectors


def test_attention_with_a_mask_of_its_own_is_refused():
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="a mask of its own"):
        models.Counter()._attend(q, q, q, torch.zeros(2, 2))


# --- Both sides ---------------------------------------------------------------------------------------------


def test_labels_equal_those_of_one_pass_per_tile():
    found = labels.measure_time(tiles=3, rounds=1, **TINY)
    assert found["difference"] < 1e-5
    assert len(found["cpu_s"]) == 1


def test_a_step_and_a_plain_one_have_the_same_loss_and_gradients():
    spec = models.spec_of(**TINY)
    steps = step.Steps(models.draw_batch(spec, [3, 1, 0], TEXT), **TINY)

    def gradients(run):
        loss = run()
        return loss, {name: p.grad for name, p in steps.policy.named_parameters() if p.grad is not None}

    ours, plain = gradients(steps.ours), gradients(steps.plain)
    assert ours[0] > 0.01
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_growth_is_held_against_the_line_through_its_ends():
    assert step.over_line([1, 2, 3], [10.0, 18.0, 30.0]) == 1.0
    assert step.over_line([1, 2, 3], [10.0, 30.0, 30.0]) == 1.5


def test_steps_grow_by_what_is_asked_for(monkeypatch):
    monkeypatch.setattr(step, "SHAPE", TINY)
    monkeypatch.setattr(step, "USUAL", {"tiles": 2, "response": 5, "vocabulary": 512})
    grown = [step.swept_steps(*sweep) for sweep in (("tiles", 4), ("response", 9), ("vocabulary", 600))]
    sizes = [(s.batch.num_tiles, int(s.batch.response_mask.sum()), len(s.policy.head)) for s in grown]
    assert sizes == [(4, 5, 512), (2, 9, 512), (2, 5, 600)]


def test_routed_inference_is_timed_and_predicted(monkeypatch):
    monkeypatch.setattr(inference, "SHAPE", TINY)
    monkeypatch.setattr(inference, "NEW_TOKENS", 3)
    session = inference.open_session()
    assert inference.predicted_speedup(session.model.spec) > 0
    assert 0 < inference.router_share(session.model.spec) < 1
    times = inference.measure(session, dict.fromkeys(inference.ROUNDS, 1))
    assert set(times) == set(inference.ROUNDS)
    assert set(inference.figures(times, predicted=1.5, share=0.1)) == set(inference.GOALS)


def test_half_of_the_vision_tokens_are_half_of_them():
    assert sum(1 / ratio for ratio in inference.HALF) == pytest.approx(len(inference.HALF) / 4 / 2)


# --- What is recorded ---------------------------------------------------------------------------------------


def test_recorded_figures_follow_from_the_recorded_measurements():
    found = recorded("labels")
    assert labels.figures(found["operations"], found["timing"]) == found["figures"]
    found = recorded("step")
    assert step.figures(found) == found["figures"]
    found = recorded("inference")
    predicted, share = found["predicted_speedup"], found["router_share"]
    assert inference.figures(found["cpu_s"], predicted=predicted, share=share) == found["figures"]
