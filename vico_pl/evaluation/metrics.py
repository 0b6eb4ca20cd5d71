"""Mean scores and retention per group of questions, with paired bootstrap intervals over images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NUM_RESAMPLES = 2000
MEAN, OVERALL = "mean", "overall"  # over groups, over questions


def mean_scores(groups: Sequence[str], scores: Sequence[float]) -> dict[str, float | None]:
    """Return the mean score per group, over groups and over questions.

    >>> mean_scores(["ocr", "ocr", "colour"], [1.0, 0.0, 1.0])["mean"]
    0.75
    >>> mean_scores(["ocr", "ocr", "colour"], [1.0, 0.0, 0.25])
    {'colour': 0.25, 'ocr': 0.5, 'mean': 0.375, 'overall': 0.416667}
    """
    once = np.ones((1, len(groups)), dtype=int)
    table = _resampled_means(np.arange(len(groups)), groups, scores, once)
    return {name: _number(values[0]) for name, values in table.items()}


def score_tables(
    images: Sequence[int],
    groups: Sequence[str],
    scores: Mapping[str, Sequence[float]],
    *,
    baseline: str,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Return for every arm accuracy and retention per group and on average, each with its 95 % interval.

    `images` and `groups` have an entry per question, and so has `scores` for each arm. Accuracy is the mean
    score, retention that over the baseline's. The bootstrap draws images with replacement, the same ones for
    all arms. The mean is over groups, so that one with more questions has no more weight.
    """
    names, image = np.unique(images, return_inverse=True)
    uniform = np.full(len(names), 1 / len(names))
    draws = np.random.default_rng(seed).multinomial(len(names), uniform, NUM_RESAMPLES)
    once = np.ones((1, len(names)), dtype=int)
    point, drawn = (
        {arm: _resampled_means(image, groups, of_arm, times) for arm, of_arm in scores.items()}
        for times in (once, draws)
    )
    return {
        arm: {
            "accuracy": {k: _number(v[0]) for k, v in point[arm].items()},
            "accuracy_ci": {k: _interval(v) for k, v in drawn[arm].items()},
            "retention": {k: _number(_ratio(v, point[baseline][k])[0]) for k, v in point[arm].items()},
            "retention_ci": {k: _interval(_ratio(v, drawn[baseline][k])) for k, v in drawn[arm].items()},
        }
        for arm in scores
    }


def _resampled_means(
    image: np.ndarray, groups: Sequence[str], scores: Sequence[float], draws: np.ndarray
) -> dict[str, np.ndarray]:
    """Return mean scores for every resample; `draws` counts images, (resamples, I)."""
    of_group, score, size = np.array(groups, dtype=str), np.array(scores, dtype=float), draws.shape[1]
    sums = {}
    for name in sorted(set(groups)):
        mine = of_group == name
        total = draws @ np.bincount(image[mine], weights=score[mine], minlength=size)
        sums[name] = total, draws @ np.bincount(image[mine], minlength=size)
    table = {name: _ratio(total, count) for name, (total, count) in sums.items()}
    overall = _ratio(*(sum(column) for column in zip(*sums.values(), strict=True)))
    return {**table, MEAN: np.nanmean([*table.values()], axis=0), OVERALL: overall}


def _ratio(values: np.ndarray, full: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return values / full


def _number(value: float) -> float | None:
    return None if not np.isfinite(value) else round(float(value), 6)


def _interval(values: np.ndarray) -> list[float] | None:
    finite = values[np.isfinite(values)]
    return [round(float(v), 6) for v in np.quantile(finite, [0.025, 0.975])] if len(finite) else None
