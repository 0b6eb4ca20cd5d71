"""Accuracy, retention and their intervals by paired bootstrap over images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vico_pl.evaluation.questions import SKILLS

NUM_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What each arm got right; arms share questions, so that differences are paired."""

    sample: np.ndarray  # int (Q,): the image of each question
    skill: np.ndarray  # str (Q,)
    correct: Mapping[str, np.ndarray]  # arm -> bool (Q,); one arm is `full`


def accuracy_tables(scores: Scores, *, seed: int) -> dict[str, dict[str, Any]]:
    """Return for every arm accuracy and retention per skill and on average, each with its 95 % interval.

    Images are resampled with replacement, the same ones for all arms; the mean is over skills, so that a
    skill with more questions weighs no more. A skill without questions is None.
    """
    images, owner = np.unique(scores.sample, return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(
        len(images), np.full(len(images), 1 / len(images)), NUM_RESAMPLES
    )
    once = np.ones((1, len(images)), dtype=int)
    point = {arm: _by_skill(owner, scores.skill, correct, once) for arm, correct in scores.correct.items()}
    drawn = {arm: _by_skill(owner, scores.skill, correct, draws) for arm, correct in scores.correct.items()}
    return {
        arm: {
            "accuracy": {k: _number(v[0]) for k, v in point[arm].items()},
            "accuracy_ci": {k: _interval(v) for k, v in drawn[arm].items()},
            "retention": {k: _number(_ratio(v, point["full"][k])[0]) for k, v in point[arm].items()},
            "retention_ci": {k: _interval(_ratio(v, drawn["full"][k])) for k, v in drawn[arm].items()},
        }
        for arm in scores.correct
    }


def _by_skill(
    owner: np.ndarray, skill: np.ndarray, correct: np.ndarray, draws: np.ndarray
) -> dict[str, np.ndarray]:
    """Return accuracy per skill and their mean for every resample.

    Args:
        owner: place of each question's image, (Q,).
        skill: name of each question's skill, (Q,).
        correct: what was answered as expected, (Q,).
        draws: how often each image is in each resample, (resamples, images).
    """
    num_images = draws.shape[1]
    table = {}
    for name in SKILLS:
        mine = skill == name
        asked = draws @ np.bincount(owner[mine], minlength=num_images)
        right = draws @ np.bincount(owner[mine & correct], minlength=num_images)
        table[name] = _ratio(right, asked)
    present = [table[name] for name in SKILLS if (skill == name).any()]
    return {**table, "mean": np.nanmean(present, axis=0)}


def _ratio(values: np.ndarray, full: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return values / full


def _number(value: float) -> float | None:
    return None if not np.isfinite(value) else round(float(value), 6)


def _interval(values: np.ndarray) -> list[float] | None:
    finite = values[np.isfinite(values)]
    return [round(float(v), 6) for v in np.quantile(finite, [0.025, 0.975])] if len(finite) else None
