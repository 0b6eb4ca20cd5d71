"""Accuracy, retention and their intervals by paired bootstrap over images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_RESAMPLES = 2000
SKILL_NAMES = ("perception", "reasoning", "ocr")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What each arm got right; arms share questions, so that differences are paired."""

    sample: np.ndarray  # int (Q,): the image of each question
    skill: np.ndarray  # str (Q,)
    correct: Mapping[str, np.ndarray]  # arm -> bool (Q,)


def accuracy_tables(scores: Scores, *, seed: int) -> dict[str, dict[str, Any]]:
    """Return for every arm accuracy and retention per skill and on average, each with its 95 % interval.

    Images are resampled with replacement, the same ones for all arms; the mean is over skills, so that a skill with
    more questions weighs no more. A skill without questions is None.
    """
    weights = _resampled_weights(scores.sample, seed=seed)
    plain = np.ones((1, len(scores.sample)))
    point = {arm: _by_skill(scores.skill, correct, plain) for arm, correct in scores.correct.items()}
    drawn = {arm: _by_skill(scores.skill, correct, weights) for arm, correct in scores.correct.items()}
    return {
        arm: {
            "accuracy": {k: _number(v[0]) for k, v in point[arm].items()},
            "accuracy_ci": {k: _interval(v) for k, v in drawn[arm].items()},
            "retention": {k: _number(_ratio(v, point["full"][k])[0]) for k, v in point[arm].items()},
            "retention_ci": {k: _interval(_ratio(v, drawn["full"][k])) for k, v in drawn[arm].items()},
        }
        for arm in scores.correct
    }


def mean_accuracy(skill: np.ndarray, correct: np.ndarray) -> dict[str, float | None]:
    """Return accuracy per skill and their mean."""
    return {k: _number(v[0]) for k, v in _by_skill(skill, correct, np.ones((1, len(skill)))).items()}


def _resampled_weights(sample: np.ndarray, *, seed: int) -> np.ndarray:
    """Return how often each question is drawn in each resample, (resamples, Q)."""
    images, owner = np.unique(sample, return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(
        len(images), np.full(len(images), 1 / len(images)), NUM_RESAMPLES
    )
    return draws[:, owner].astype(float)


def _by_skill(skill: np.ndarray, correct: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    table = {}
    for name in SKILL_NAMES:
        mine = skill == name
        total = weights[:, mine].sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            table[name] = (weights[:, mine] * correct[mine]).sum(1) / total
    present = [v for name, v in table.items() if (skill == name).any()]
    return {**table, "mean": np.nanmean(present, axis=0)}


def _ratio(values: np.ndarray, full: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return values / full


def _number(value: float) -> float | None:
    return None if not np.isfinite(value) else round(float(value), 6)


def _interval(values: np.ndarray) -> list[float] | None:
    finite = values[np.isfinite(values)]
    return [round(float(v), 6) for v in np.quantile(finite, [0.025, 0.975])] if len(finite) else None
