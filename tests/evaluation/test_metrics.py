import numpy as np
import pytest

from vico_pl.evaluation.metrics import NUM_RESAMPLES, Scores, accuracy_tables

SKILLS = ("perception", "reasoning", "ocr")


def random_scores(*, num_images=40, seed=0, skills=SKILLS):
    """Images with 0 to 4 questions; `router` is right on most of the questions that `full` is right on."""
    rng = np.random.default_rng(seed)
    sample = np.repeat(np.arange(num_images), rng.integers(0, 5, num_images))
    full = rng.random(len(sample)) < 0.8
    return Scores(
        sample=sample,
        skill=rng.choice(skills, len(sample)),
        correct={"full": full, "router": full & (rng.random(len(sample)) < 0.9), "random": ~full},
    )


def accuracy(scores, arm, chosen):
    """Accuracy per skill and their mean over the questions at `chosen`, with repetition."""
    skill, correct = scores.skill[chosen], scores.correct[arm][chosen]
    table = {name: correct[skill == name].mean() for name in SKILLS if (skill == name).any()}
    return {**table, "mean": np.mean(list(table.values()))}


def resampled(scores, seed):
    """Questions of each resample: whole images, drawn with replacement, one list for all arms."""
    images = np.unique(scores.sample)
    rng = np.random.default_rng(seed)
    for counts in rng.multinomial(len(images), np.full(len(images), 1 / len(images)), NUM_RESAMPLES):
        drawn = np.repeat(images, counts)
        yield np.concatenate([np.flatnonzero(scores.sample == image) for image in drawn])


def few_images():
    """Five images, so that some resamples lack a skill and in some nothing is right at full tokens."""
    return Scores(
        sample=np.array([0, 0, 1, 2, 2, 3, 4]),
        skill=np.array(["ocr", "perception", "ocr", "reasoning", "ocr", "perception", "reasoning"]),
        correct={
            "full": np.array([True, True, False, True, True, True, False]),
            "router": np.array([True, False, False, True, False, True, True]),
        },
    )


@pytest.mark.parametrize("scores", [random_scores(seed=3), few_images()], ids=["many", "few"])
def test_intervals_equal_those_of_a_bootstrap_written_out(scores):
    draws = list(resampled(scores, seed=7))
    tables = accuracy_tables(scores, seed=7)
    for arm in scores.correct:
        own = [accuracy(scores, arm, chosen) for chosen in draws]
        full = [accuracy(scores, "full", chosen) for chosen in draws]
        for name in (*SKILLS, "mean"):
            kept = [a[name] for a in own if name in a]
            with np.errstate(invalid="ignore", divide="ignore"):
                ratios = np.array([a[name] / b[name] for a, b in zip(own, full, strict=True) if name in a])
            ratios = ratios[np.isfinite(ratios)]
            expected = np.quantile(kept, [0.025, 0.975])
            assert tables[arm]["accuracy_ci"][name] == pytest.approx(expected, abs=1e-6)
            assert tables[arm]["retention_ci"][name] == pytest.approx(
                np.quantile(ratios, [0.025, 0.975]), abs=1e-6
            )


def test_points_are_those_of_the_whole_set():
    scores = random_scores(seed=1)
    everything = np.arange(len(scores.sample))
    tables = accuracy_tables(scores, seed=0)
    full = accuracy(scores, "full", everything)
    for arm in scores.correct:
        own = accuracy(scores, arm, everything)
        assert tables[arm]["accuracy"] == pytest.approx(own, abs=1e-6)
        assert tables[arm]["retention"] == pytest.approx({k: v / full[k] for k, v in own.items()}, abs=1e-6)


def test_arms_that_answer_alike_have_a_retention_of_exactly_one():
    scores = random_scores()
    same = Scores(
        sample=scores.sample,
        skill=scores.skill,
        correct={"full": scores.correct["full"]} | {"router": scores.correct["full"].copy()},
    )
    table = accuracy_tables(same, seed=0)["router"]
    for name in (*SKILLS, "mean"):
        assert table["retention"][name] == 1
        assert table["retention_ci"][name] == [1, 1]
        assert table["accuracy_ci"][name][0] < table["accuracy_ci"][name][1]


def test_differences_are_paired():
    """Full tokens are right on 30 of 60 images, in resamples on 23 to 37; the router on 29 of the same 30."""
    full = np.arange(60) < 30
    scores = Scores(
        sample=np.arange(60),
        skill=np.full(60, "ocr"),
        correct={"full": full, "router": full & (np.arange(60) > 0)},
    )
    low, high = accuracy_tables(scores, seed=0)["router"]["retention_ci"]["ocr"]
    assert 0.85 < low < 29 / 30 < high == 1, "unpaired, it would reach from 0.6 to 1.6"


def test_the_mean_is_over_skills_not_over_questions():
    scores = Scores(
        sample=np.arange(10),
        skill=np.array(["ocr"] * 9 + ["perception"]),
        correct={"full": np.ones(10, bool), "router": np.array([True] * 9 + [False])},
    )
    assert accuracy_tables(scores, seed=0)["router"]["accuracy"]["mean"] == 0.5


def test_a_skill_without_questions_is_none_and_the_others_make_the_mean():
    scores = random_scores(skills=("ocr", "perception"))
    for table in accuracy_tables(scores, seed=0).values():
        for figures in table.values():
            assert figures["reasoning"] is None
        assert table["accuracy"]["mean"] == pytest.approx(
            (table["accuracy"]["ocr"] + table["accuracy"]["perception"]) / 2, abs=1e-6
        )


def test_nothing_right_at_full_tokens_gives_no_retention_and_no_warning():
    scores = Scores(
        sample=np.arange(4),
        skill=np.array(["ocr"] * 4),
        correct={"full": np.zeros(4, bool), "router": np.ones(4, bool)},
    )
    table = accuracy_tables(scores, seed=0)["router"]
    assert (table["retention"]["ocr"], table["retention_ci"]["mean"]) == (None, None)
    assert table["accuracy"]["mean"] == 1


def test_questions_of_an_image_are_drawn_together():
    """Ten images of one hundred equal questions each vary like ten questions, not like a thousand."""
    right = np.arange(10) < 5

    def width(questions_per_image):
        scores = Scores(
            sample=np.repeat(np.arange(10), questions_per_image),
            skill=np.full(10 * questions_per_image, "ocr"),
            correct={"full": np.repeat(right, questions_per_image)},
        )
        low, high = accuracy_tables(scores, seed=0)["full"]["accuracy_ci"]["ocr"]
        return high - low

    assert width(100) == width(1) > 0.5


def test_which_numbers_name_the_images_makes_no_difference():
    scores = random_scores()
    assert accuracy_tables(scores, seed=1) != accuracy_tables(scores, seed=2)
    renamed = Scores(sample=1000 + 7 * scores.sample, skill=scores.skill, correct=scores.correct)
    assert accuracy_tables(renamed, seed=0) == accuracy_tables(scores, seed=0)
