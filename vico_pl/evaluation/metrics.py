"""Correctness of an answer; accuracy and retention with paired bootstrap intervals over images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SKILLS = ("perception", "reasoning", "ocr")
NUM_RESAMPLES = 2000


def is_correct(given: str, expected: str) -> bool:
    """Compare by exact match, ignoring case and surrounding spaces.

    >>> is_correct("Red ", "red"), is_correct("F3 K7 K", "F3 K7 F")
    (True, False)
    """
    return given.strip().lower() == expected.strip().lower()


def accuracy_by_skill(skills: Sequence[str], correct: Sequence[bool]) -> dict[str, float | None]:
    """Return the accuracy per skill (None without questions) and the mean over skills.

    >>> accuracy_by_skill(["ocr", "ocr", "perception"], [True, False, True])
    {'perception': 1.0, 'reasoning': None, 'ocr': 0.5, 'mean': 0.75}
    """
    once = np.ones((1, len(skills)), dtype=int)
    table = _resampled_accuracy(np.arange(len(skills)), skills, correct, once)
    return {name: None if np.isnan(values[0]) else float(values[0]) for name, values in table.items()}


def accuracy_tables(
    images: Sequence[int], skills: Sequence[str], correct: Mapping[str, Sequence[bool]], *, seed: int
) -> dict[str, dict[str, Any]]:
    """Return for every arm accuracy and retention per skill and on average, each with its 95 % interval.

    `images` and `skills` have an entry per question, and so has `correct` for each arm; one is `full`. The
    bootstrap draws images with replacement, the same ones for all arms. The mean is over skills, so a skill
    with more questions has no more weight. A skill without questions is None.
    """
    names, image = np.unique(images, return_inverse=True)
    uniform = np.full(len(names), 1 / len(names))
    draws = np.random.default_rng(seed).multinomial(len(names), uniform, NUM_RESAMPLES)
    once = np.ones((1, len(names)), dtype=int)
    point, drawn = (
        {arm: _resampled_accuracy(image, skills, right, times) for arm, right in correct.items()}
        for times in (once, draws)
    )
    return {
        arm: {
            "accuracy": {k: _number(v[0]) for k, v in point[arm].items()},
            "accuracy_ci": {k: _interval(v) for k, v in drawn[arm].items()},
            "retention": {k: _number(_ratio(v, point["full"][k])[0]) for k, v in point[arm].items()},
            "retention_ci": {k: _interval(_ratio(v, drawn["full"][k])) for k, v in drawn[arm].items()},
        }
        for arm in correct
    }


def _resampled_accuracy(
    image: np.ndarray, skills: Sequence[str], correct: Sequence[bool], draws: np.ndarray
) -> dict[str, np.ndarray]:
    """Return accuracy per skill and their mean for every resample; `draws` counts images, (resamples, I)."""
    table = {}
    is_right = np.array(correct, dtype=bool)
    for name in SKILLS:
        mine = np.array(skills, dtype=str) == name
        asked = draws @ np.bincount(image[mine], minlength=draws.shape[1])
        right = draws @ np.bincount(image[mine & is_right], minlength=draws.shape[1])
        table[name] = _ratio(right, asked)
    present = [table[name] for name in SKILLS if name in skills]
    return {**table, "mean": np.nanmean(present, axis=0) if present else np.full(len(draws), np.nan)}


def _ratio(values: np.ndarray, full: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return values / full


def _number(value: float) -> float | None:
    return None if not np.isfinite(value) else round(float(value), 6)


def _interval(values: np.ndarray) -> list[float] | None:
    finite = values[np.isfinite(values)]
    return [round(float(v), 6) for v in np.quantile(finite, [0.025, 0.975])] if len(finite) else None
