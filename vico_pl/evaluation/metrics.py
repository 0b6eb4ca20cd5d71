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
    once, column = np.ones((1, len(groups))), np.array(scores, dtype=float)[:, None]
    (table,) = _resampled_means(np.arange(len(groups)), groups, column, once)
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
    draws = np.random.default_rng(seed).multinomial(len(names), uniform, NUM_RESAMPLES).astype(float)
    columns = np.array([*scores.values()], dtype=float).T
    point, drawn = (
        dict(zip(scores, _resampled_means(image, groups, columns, times), strict=True))
        for times in (np.ones((1, len(names))), draws)
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


def retention_bounds(
    images: Sequence[int],
    groups: Sequence[str],
    scores: Mapping[str, Sequence[float]],
    *,
    baseline: str,
    seed: int,
) -> dict[str, float | None]:
    """Return what every arm keeps of the baseline's mean at least, with 97.5 % certainty.

    Gaffke's bound (as in arXiv 1905.06208, for means of values between 0 and 1): the images are weighted as
    by a Bayesian bootstrap, together with one more image, whose questions are all lost. So it is honest about
    few images and about arms that lose nothing. Where the answers of an image are right or wrong together,
    it is that of Clopper and Pearson.

    >>> found = retention_bounds(range(1000), ["ocr"] * 1000, {"full": [1.0] * 1000, "a": [1.0] * 1000},
    ...                          baseline="full", seed=0)
    >>> round(found["a"], 3) == round(1 - 3.69 / 1000, 3)
    True
    """
    names, image = np.unique(images, return_inverse=True)
    columns, labels = np.array([*scores.values()], dtype=float).T, np.array(groups, dtype=str)
    is_baseline = np.array([arm == baseline for arm in scores])
    for group in sorted(set(groups)):
        mine = labels == group
        usual = round(mine.sum() / len(np.unique(image[mine])))
        lost = np.where(is_baseline, columns[mine].mean(0), 0.0)
        columns = np.concatenate([columns, np.tile(lost, (usual, 1))])
        image, labels = np.append(image, [len(names)] * usual), np.append(labels, [group] * usual)
    weights = np.random.default_rng(seed).standard_exponential((NUM_RESAMPLES, len(names) + 1))
    drawn = dict(zip(scores, _resampled_means(image, labels.tolist(), columns, weights), strict=True))
    kept = {arm: _interval(_ratio(table[MEAN], drawn[baseline][MEAN])) for arm, table in drawn.items()}
    return {arm: None if interval is None else interval[0] for arm, interval in kept.items()}


def _resampled_means(
    image: np.ndarray, groups: Sequence[str], scores: np.ndarray, draws: np.ndarray
) -> list[dict[str, np.ndarray]]:
    """Return mean scores for every arm and resample.

    `scores` has a row per question and a column per arm; `draws` counts or weighs images, (resamples, I), in
    floats, whose products with matrices are fast.
    """
    of_group, counts, totals = np.array(groups, dtype=str), dict[str, np.ndarray](), dict[str, np.ndarray]()
    for name in sorted(set(groups)):
        mine, sums = of_group == name, np.zeros((draws.shape[1], scores.shape[1]))
        np.add.at(sums, image[mine], scores[mine])
        counts[name] = draws @ np.bincount(image[mine], minlength=len(sums))[:, None]
        totals[name] = draws @ sums  # (resamples, arms)
    means = {name: _ratio(total, counts[name]) for name, total in totals.items()}
    overall = _ratio(*(np.sum([*table.values()], 0) for table in (totals, counts)))
    means |= {MEAN: np.nanmean([*means.values()], 0), OVERALL: overall}
    return [{name: of_arms[:, arm] for name, of_arms in means.items()} for arm in range(scores.shape[1])]


def _ratio(values: np.ndarray, full: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return values / full


def _number(value: float) -> float | None:
    return None if not np.isfinite(value) else round(float(value), 6)


def _interval(values: np.ndarray) -> list[float] | None:
    finite = values[np.isfinite(values)]
    return [round(float(v), 6) for v in np.quantile(finite, [0.025, 0.975])] if len(finite) else None
