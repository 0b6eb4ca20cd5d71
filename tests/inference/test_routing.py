import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.folders import tiled
from vico_pl.model.router import (
    NEVER,
    RoutingRule,
    at_thresholds,
    choose_ratios,
    compress_probability,
    routing_scores,
    threshold_for,
)

LOGIT = st.floats(-30, 30, width=32)


def logits_of(num_ratios):
    return st.lists(st.lists(LOGIT, min_size=num_ratios, max_size=num_ratios), min_size=1, max_size=6)


def from_probabilities(*rows):
    return torch.tensor(rows).log()


def test_a_probability_that_equals_the_threshold_compresses():
    logits = torch.zeros(1, 2)  # P(compress) is exactly one half
    assert choose_ratios(logits, ratios=[4, 16], rule=RoutingRule(threshold=0.5)).tolist() == [16]
    assert choose_ratios(logits, ratios=[4, 16], rule=RoutingRule(threshold=0.5000001)).tolist() == [4]
    assert choose_ratios(logits[:0], ratios=[4, 16], rule=RoutingRule(threshold=0.5)).tolist() == []


def test_of_three_ratios_the_coarsest_wins_whose_probability_with_coarser_ones_reaches_the_threshold():
    rows = from_probabilities([0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.2, 0.1, 0.7], [0.0, 0.6, 0.4])
    assert compress_probability(rows).tolist() == pytest.approx([0.9, 0.7, 0.3, 0.6])
    for threshold, expected in ((0.5, [64, 16, 4, 16]), (0.25, [64, 64, 16, 16])):
        chosen = choose_ratios(rows, ratios=[4, 16, 64], rule=RoutingRule(threshold=threshold))
        assert chosen.tolist() == expected


@pytest.mark.parametrize("num_ratios", [2, 3])
@given(data=st.data(), threshold=st.floats(0, 1))
def test_a_tile_is_compressed_if_its_own_probability_reaches_the_threshold_whatever_its_neighbours(
    num_ratios, data, threshold
):
    logits = torch.tensor(data.draw(logits_of(num_ratios)))
    settings = {"ratios": [4, 16, 64][:num_ratios], "rule": RoutingRule(threshold=threshold)}
    chosen = choose_ratios(logits, **settings)
    assert (chosen > 4).tolist() == (compress_probability(logits) >= threshold).tolist()
    assert chosen.tolist() == [choose_ratios(row[None], **settings).item() for row in logits]


@given(logits=logits_of(2))
def test_never_keeps_every_tile_and_zero_compresses_every_tile(logits):
    logits = torch.tensor([*logits, [40.0, -40.0]])  # the last is certain to compress
    assert set(choose_ratios(logits, ratios=[4, 16], rule=RoutingRule(threshold=NEVER)).tolist()) == {4}
    assert set(choose_ratios(logits, ratios=[4, 16], rule=RoutingRule(threshold=0.0)).tolist()) == {16}


def test_a_tiny_probability_is_no_zero():
    logits = torch.tensor([[-20.0, 0.0]])  # P(compress) is 2e-9: 1 - P(keep) would round it away
    assert compress_probability(logits).item() == pytest.approx(2.06e-9, rel=1e-2)
    assert choose_ratios(logits, ratios=[4, 16], rule=RoutingRule(threshold=1e-9)).tolist() == [16]


def released_decisions(logits, *, relative, absolute):
    """What released code decides, written from its description: g > quantile(g) and g >= absolute."""
    gates = logits.softmax(-1)[:, 0].tolist()
    ranked = sorted(gates)
    position = relative * (len(gates) - 1)
    low, part = int(position), position - int(position)
    quantile = ranked[low] + part * (ranked[min(low + 1, len(gates) - 1)] - ranked[low])
    return [16 if gate > quantile and gate >= absolute else 4 for gate in gates]


@given(
    logits=st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=13),
    relative=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    absolute=st.sampled_from([0.0, 0.3, 0.6]),
)
def test_the_released_rule_is_reproduced(logits, relative, absolute):
    logits = torch.tensor([[value, 0.0] for value in logits], dtype=torch.float64).float()
    rule = RoutingRule(threshold=absolute, relative_threshold=relative)
    chosen = choose_ratios(logits, ratios=[4, 16], rule=rule).tolist()
    assert chosen == released_decisions(logits.double(), relative=relative, absolute=absolute)
    scores = routing_scores(logits, rule)[:, 0]
    assert chosen == torch.where(scores >= absolute, 16, 4).tolist()


@torch.no_grad()
def test_a_session_routes_tiles_of_a_batch_as_it_routes_them_alone(predictor):
    samples = [tiled(predictor, size, seed=i) for i, size in enumerate([(32, 32), (64, 64), (64, 32)])]
    features = predictor.model.encode_tiles(torch.cat([s.tiles for s in samples]))
    probabilities = compress_probability(predictor.router_logits(features)).sort().values
    gap = probabilities.diff().argmax()
    threshold = probabilities[gap : gap + 2].mean().item()  # in the widest gap: no rounding decides
    object.__setattr__(predictor, "rule", RoutingRule(threshold=threshold))
    together = predictor.choose_ratios(features).tolist()
    alone = map(predictor.choose_ratios, features.split([len(s.tiles) for s in samples]))
    assert together == torch.cat(list(alone)).tolist()
    assert set(together) == {4, 16}


def scores(*of_samples):
    return [torch.tensor(values) for values in of_samples]


@pytest.mark.parametrize(("fraction", "compressed"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_a_threshold_compresses_the_given_fraction_of_all_tiles(fraction, compressed):
    given = scores([0.1, 0.9], [0.4], [0.6])
    threshold = threshold_for(given, compressed_fraction=fraction)
    chosen = torch.cat(at_thresholds(given, [threshold], ratios=[4, 16]))
    assert int((chosen == 16).sum()) == compressed
    ranked = sorted(torch.cat(given).tolist(), reverse=True)
    assert {float(s) for s in torch.cat(given)[chosen == 16]} == set(ranked[:compressed])


def test_each_coarser_ratio_may_have_a_threshold_and_a_tile_a_score_for_each():
    settings = {"ratios": [4, 16, 64]}
    ranks = scores([0.2, 0.6, 0.9], [])
    chosen = [r.tolist() for r in at_thresholds(ranks, [0.8, 0.5], **settings)]
    assert chosen == [[4, 16, 64], []]
    straight = [r.tolist() for r in at_thresholds(ranks, [0.5], **settings)]
    assert straight == [[4, 64, 64], []]  # one threshold for both
    cumulative = scores([[0.1, 0.2], [0.1, 0.6], [0.5, 0.7]])  # of 64, and of 16 or 64
    assert [r.tolist() for r in at_thresholds(cumulative, [0.5], **settings)] == [[4, 16, 64]]
    assert threshold_for(cumulative, compressed_fraction=0.5) == pytest.approx(0.5)  # of six scores three


def test_tiles_of_equal_score_are_treated_alike():
    given = scores([0.5, 0.5], [0.5, 0.1])
    threshold = threshold_for(given, compressed_fraction=0.25)
    assert [r.tolist() for r in at_thresholds(given, [threshold], ratios=[4, 16])] == [[16, 16], [16, 4]]
