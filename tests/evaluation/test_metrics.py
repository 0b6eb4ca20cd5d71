from typing import NamedTuple

import numpy as np
import pytest

from vico_pl.evaluation.metrics import NUM_RESAMPLES, accuracy_by_skill, accuracy_tables

SKILLS = ("perception", "reasoning", "ocr")


class Scores(NamedTuple):
    images: np.ndarray
    skills: list[str]
    correct: dict[str, np.ndarray]

    def tables(self, *, seed):
        correct = {arm: of_arm.tolist() for arm, of_arm in self.correct.items()}
        return accuracy_tables(self.images.tolist(), self.skills, correct, seed=seed)


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
    return {**table, "mean": np.mean(list(table.values()))}


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
        for name in (*SKILLS, "mean"):
            kept = [a[name] for a in own if name in a]
            with np.errstate(invalid="ignore", divide="ignore"):
                ratios = np.array([a[name] / b[name] for a, b in zip(own, full, strict=True) if name in a])
            for values, found in ((kept, "accuracy_ci"), (ratios[np.isfinite(ratios)], "retention_ci")):
                expected = np.quantile(values, [0.025, 0.975])
                assert tables[arm][found][name] == pytest.approx(expected, abs=1e-6)


def test_points_are_those_of_the_whole_set():
    scores = random_scores(seed=1)
    everything = np.arange(len(scores.images))
    tables = scores.tables(seed=0)
    full = accuracy(scores, "full", everything)
    for arm in scores.correct:
        own = accuracy(scores, arm, everything)
        assert tables[arm]["accuracy"] == pytest.approx(own, abs=1e-6)
        assert tables[arm]["retention"] == pytest.approx({k: v / full[k] for k, v in own.items()}, abs=1e-6)


def test_arms_that_answer_alike_have_a_retention_of_exactly_one():
    scores = random_scores()
    correct = {"full": scores.correct["full"], "router": scores.correct["full"].copy()}
    table = scores._replace(correct=correct).tables(seed=0)["router"]
    for name in (*SKILLS, "mean"):
        assert table["retention"][name] == 1
        assert table["retention_ci"][name] == [1, 1]
        assert table["accuracy_ci"][name][0] < table["accuracy_ci"][name][1]


def test_a_skill_without_questions_is_none_and_the_others_make_the_mean():
    scores = random_scores(skills=("ocr", "perception"))
    for table in scores.tables(seed=0).values():
        assert [figures["reasoning"] for figures in table.values()] == [None] * 4
        mean = (table["accuracy"]["ocr"] + table["accuracy"]["perception"]) / 2
        assert table["accuracy"]["mean"] == pytest.approx(mean, abs=1e-6)
    assert set(accuracy_by_skill([], []).values()) == {None}


def test_nothing_right_at_full_tokens_gives_no_retention_and_no_warning():
    correct = {"full": np.zeros(4, bool), "router": np.ones(4, bool)}
    table = Scores(np.arange(4), ["ocr"] * 4, correct).tables(seed=0)["router"]
    assert (table["retention"]["ocr"], table["retention_ci"]["mean"]) == (None, None)
    assert table["accuracy"]["mean"] == 1


def test_which_numbers_name_the_images_makes_no_difference():
    scores = random_scores()
    assert scores.tables(seed=1) != scores.tables(seed=2)
    renamed = scores._replace(images=1000 + 7 * scores.images)
    assert renamed.tables(seed=0) == scores.tables(seed=0)
