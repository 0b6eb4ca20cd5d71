import math
from typing import NamedTuple

import numpy as np
import pytest

from vico_pl.evaluation.metrics import NUM_RESAMPLES, mean_scores, retention_bounds, score_tables

SKILLS = ("perception", "reasoning", "ocr")


class Scores(NamedTuple):
    images: np.ndarray
    skills: list[str]
    correct: dict[str, np.ndarray]

    def tables(self, *, seed):
        scores = {arm: of_arm.astype(float).tolist() for arm, of_arm in self.correct.items()}
        return score_tables(self.images.tolist(), self.skills, scores, baseline="full", seed=seed)


def random_scores(*, num_images=40, seed=0, skills=SKILLS):
    """Images with 0 to 4 questions; `router` is right on most of the questions that `full` is right on."""
    rng = np.random.default_rng(seed)
    images = np.repeat(np.arange(num_images), rng.integers(0, 5, num_images))
    full = rng.random(len(images)) < 0.8
    correct = {"full": full, "router": full & (rng.random(len(images)) < 0.9), "random": ~full}
    return Scores(images, rng.choice(skills, len(images)).tolist(), correct)


def accuracy(scores, arm, chosen):
    """Accuracy per skill and their mean over the questions at `chosen`, with repetition."""
    skill, correct = np.array(scores.skills)[chosen], scores.correct[arm][chosen]
    table = {name: correct[skill == name].mean() for name in SKILLS if (skill == name).any()}
    return {**table, "mean": np.mean(list(table.values())), "overall": correct.mean()}


def resampled(scores, seed):
    """Questions of each resample: whole images, drawn with replacement, one list for all arms."""
    images = np.unique(scores.images)
    rng = np.random.default_rng(seed)
    for counts in rng.multinomial(len(images), np.full(len(images), 1 / len(images)), NUM_RESAMPLES):
        drawn = np.repeat(images, counts)
        yield np.concatenate([np.flatnonzero(scores.images == image) for image in drawn])


# Five images, so that some resamples lack a skill and in some nothing is right at full tokens.
FEW = Scores(
    np.array([0, 0, 1, 2, 2, 3, 4]),
    ["ocr", "perception", "ocr", "reasoning", "ocr", "perception", "reasoning"],
    {
        "full": np.array([True, True, False, True, True, True, False]),
        "router": np.array([True, False, False, True, False, True, True]),
    },
)


@pytest.mark.parametrize("scores", [random_scores(seed=3), FEW], ids=["many", "few"])
def test_intervals_equal_those_of_a_bootstrap_written_out(scores):
    draws = list(resampled(scores, seed=7))
    tables = scores.tables(seed=7)
    for arm in scores.correct:
        own = [accuracy(scores, arm, chosen) for chosen in draws]
        full = [accuracy(scores, "full", chosen) for chosen in draws]
        for name in (*SKILLS, "mean", "overall"):
            kept = [a[name] for a in own if name in a]
            with np.errstate(invalid="ignore", divide="ignore"):
                ratios = np.array([a[name] / b[name] for a, b in zip(own, full, strict=True) if name in a])
            for values, found in ((kept, "accuracy_ci"), (ratios[np.isfinite(ratios)], "retention_ci")):
                expected = np.quantile(values, [0.025, 0.975])
                assert tables[arm][found][name] == pytest.approx(expected, abs=1e-6)


def test_points_are_those_of_the_whole_set_and_arms_that_answer_alike_keep_exactly_everything():
    scores = random_scores(seed=1)
    scores.correct["twin"] = scores.correct["full"].copy()
    everything = np.arange(len(scores.images))
    tables = scores.tables(seed=0)
    full = accuracy(scores, "full", everything)
    for arm in scores.correct:
        own = accuracy(scores, arm, everything)
        assert tables[arm]["accuracy"] == pytest.approx(own, abs=1e-6)
        assert tables[arm]["retention"] == pytest.approx({k: v / full[k] for k, v in own.items()}, abs=1e-6)
    twin = tables["twin"]
    for name in (*SKILLS, "mean", "overall"):
        assert (twin["retention"][name], twin["retention_ci"][name]) == (1, [1, 1])
        assert twin["accuracy_ci"][name][0] < twin["accuracy_ci"][name][1]


def test_scores_between_0_and_1_are_averaged_within_groups_before_groups():
    scores = Scores(
        np.array([0, 0, 1, 1]),
        ["b", "a", "b", "b"],
        {"full": np.array([1, 0.5, 1, 0]), "router": np.array([0.5, 0.25, 0.7, 0])},
    )
    tables = scores.tables(seed=0)
    accuracy = {"a": 0.25, "b": 0.4, "mean": 0.325, "overall": 0.3625}
    assert tables["router"]["accuracy"] == pytest.approx(accuracy)
    retention = {"a": 0.5, "b": 0.6, "mean": 0.325 / 0.5833333, "overall": 0.3625 / 0.625}
    assert tables["router"]["retention"] == pytest.approx(retention, abs=1e-6)
    assert mean_scores(scores.skills, scores.correct["router"].tolist()) == pytest.approx(accuracy)


def test_retention_is_relative_to_the_baseline_and_none_where_that_is_never_right():
    scores = {"full": [1.0, 0.0], "reference": [1.0, 1.0], "wrong": [0.0, 0.0]}
    tables = score_tables([0, 1], ["a", "a"], scores, baseline="reference", seed=0)
    assert (tables["full"]["retention"]["a"], tables["reference"]["retention"]["a"]) == (0.5, 1)
    table = score_tables([0, 1], ["a", "a"], scores, baseline="wrong", seed=0)["full"]
    assert (table["retention"]["a"], table["retention_ci"]["mean"]) == (None, None)
    assert table["accuracy"]["mean"] == 0.5


def test_which_numbers_name_the_images_makes_no_difference():
    scores = random_scores()
    assert scores.tables(seed=1) != scores.tables(seed=2)
    renamed = scores._replace(images=1000 + 7 * scores.images)
    assert renamed.tables(seed=0) == scores.tables(seed=0)


@pytest.mark.parametrize("num_lost", [0, 3, 20])
@pytest.mark.parametrize("per_image", [1, 4])
def test_the_bound_of_images_lost_as_a_whole_is_that_of_clopper_and_pearson(num_lost, per_image):
    """With as much lost on average as the bound says, so few are lost in 2.5 % of all draws."""
    images = [image for image in range(200) for _ in range(per_image)]
    scores = {"full": [1.0] * len(images), "arm": [float(image >= num_lost) for image in images]}
    bound = retention_bounds(images, ["a"] * len(images), scores, baseline="full", seed=0)["arm"]
    chances = (math.comb(200, k) * (1 - bound) ** k * bound ** (200 - k) for k in range(num_lost + 1))
    assert sum(chances) == pytest.approx(0.025, abs=0.01)  # of 2,000 draws


def test_the_bound_is_wider_where_a_group_has_few_images_and_one_at_the_baseline():
    images, groups = range(500), ["many"] * 450 + ["few"] * 50
    scores = {"full": [1.0] * 500, "arm": [1.0] * 500}
    found = retention_bounds(images, groups, scores, baseline="full", seed=0)
    assert found["full"] == 1
    of_one_group = retention_bounds(images, ["all"] * 500, scores, baseline="full", seed=0)
    assert 0.95 < found["arm"] < of_one_group["arm"] < 0.995
    nothing = {"full": [0.0] * 500, "arm": [0.0] * 500}
    assert retention_bounds(images, groups, nothing, baseline="full", seed=0)["arm"] is None
