from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import kl_div

from tests.support.folders import log_probabilities, tiled
from vico_pl.evaluation import greedy
from vico_pl.evaluation.baselines import score_tiles
from vico_pl.evaluation.evaluate import evaluate
from vico_pl.evaluation.greedy import greedy_scores, rising_steps
from vico_pl.evaluation.questions import Measure, open_questions, read_groups, scored_questions


@pytest.fixture
def group(predictor):
    samples = [tiled(predictor, *size, seed=i) for i, size in enumerate([[(64, 64)], [], [(64, 32)]], 1)]
    return next(read_groups(predictor, samples, partial(scored_questions, metric=None)))


@torch.no_grad()
def by_hand(predictor, sample):
    """The order of tiles and the harm after each, from one forward pass for each choice."""
    ratios = torch.full((len(sample.tiles),), 4)
    wanted = log_probabilities(predictor, sample, ratios)
    order, harm = [], [0.0]
    while len(order) < len(ratios):
        found = {}
        for tile in set(range(len(ratios))) - set(order):
            more = ratios.clone()
            more[tile] = 16
            got = log_probabilities(predictor, sample, more)
            found[tile] = kl_div(got, wanted, reduction="none", log_target=True).sum(-1).mean().item()
        order.append(min(found, key=found.get))
        harm.append(found[order[-1]])
        ratios[order[-1]] = 16
    return order, harm


def test_tiles_are_scored_in_the_order_of_least_added_harm(predictor, group):
    scores = score_tiles("greedy_oracle", predictor, group, seed=0)
    assert [len(of_sample) for of_sample in scores] == [5, 0, 3]
    for place in (0, 2):
        order, harm = by_hand(predictor, group.samples[place])
        assert scores[place].argsort(descending=True).tolist() == order
        assert float(-scores[place].sum()) == pytest.approx(harm[-1], rel=1e-2)


def test_of_two_tiles_that_say_the_same_one_is_compressed_early_and_one_late(predictor, group, monkeypatch):
    """Alone, tiles 1 and 3 are the cheapest; the second of them loses what both say."""

    def harm(_, __, ___, choices, **____):
        costs = [2.0, 0.1, 3.0, 0.2, 4.0]
        both = [choice[1] == choice[3] == 16 for choice in choices]
        alone = [sum(c for c, ratio in zip(costs, choice, strict=True) if ratio == 16) for choice in choices]
        return torch.tensor(alone) + 9 * torch.tensor(both)

    monkeypatch.setattr(greedy, "kl_at", harm)
    (scores,) = greedy_scores(predictor, group_of_first(group))
    assert scores.argsort(descending=True).tolist() == [1, 0, 2, 4, 3]
    assert (-scores).tolist() == pytest.approx([2, 0.1, 3, 9.2, 4])


def group_of_first(group):
    return type(group)(samples=group.samples[:1], features=group.features[:1], questions=[], first=0)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=9))
def test_steps_rise_strictly_share_out_all_harm_and_never_exceed_it(later):
    harm = torch.tensor([0.0, *later], dtype=torch.float64)
    steps = rising_steps(harm)
    assert (steps.diff() > 0).all()
    torch.testing.assert_close(steps.sum(), harm[-1], atol=1e-6, rtol=0)
    assert (steps.cumsum(0) <= harm[1:] + 1e-6).all(), "the hull lies below"


def test_the_greedy_oracle_is_evaluated_when_named_and_agrees_more_than_the_oracle(
    predictor, answered, monkeypatch
):
    monkeypatch.setattr("vico_pl.evaluation.questions.decide_measure", lambda *_, **__: Measure.ANSWERS)
    found, _ = evaluate(open_questions(predictor, answered), seed=0, arms=["greedy_oracle", "oracle"])
    arms = found["arms"]
    assert arms.keys() == {"full", "greedy_oracle", "oracle"}
    assert arms["greedy_oracle"]["token_fraction"] == arms["oracle"]["token_fraction"]
    assert arms["greedy_oracle"]["accuracy"]["overall"] > arms["oracle"]["accuracy"]["overall"]
