"""How often a calibrated threshold keeps less than it promises: chosen on some images, checked on all others.

    python benchmarks/calibration.py MODEL SHARDS OUTPUT.json

A table of the study, with its default model.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import numpy as np

from vico_pl.evaluation.calibrate import CalibrationPoint, Measured, choose_point, measure
from vico_pl.evaluation.metrics import MEAN, mean_scores
from vico_pl.evaluation.questions import open_questions
from vico_pl.files import write_json
from vico_pl.inference.predictor import Predictor

RETENTION = 0.99
NUM_IMAGES, DRAWS = (60, 300, 1000), 100
Curve = Sequence[CalibrationPoint]


def by_mean(curve: Curve) -> CalibrationPoint:
    """Choose the cheapest point whose mean keeps the accuracy."""
    return _cheapest(curve, [(point.retention[MEAN] or 0.0) for point in curve])


def by_interval(curve: Curve) -> CalibrationPoint:
    """Choose the cheapest point whose interval keeps it, wherever on the curve."""
    return _cheapest(curve, [(point.retention_ci[MEAN] or [0.0])[0] for point in curve])


def _cheapest(curve: Curve, kept: Sequence[float]) -> CalibrationPoint:
    enough = [point for point, value in zip(curve, kept, strict=True) if value >= RETENTION]
    return min(enough, key=lambda point: point.token_fraction, default=curve[0])


RULES: dict[str, Callable[[Curve], CalibrationPoint]] = {
    "cheapest by the mean": by_mean,
    "cheapest by the interval": by_interval,
    "vico calibrate": lambda curve: choose_point(curve, retention=RETENTION),
}


def retention_of(measured: Measured, number: int, images: np.ndarray) -> float:
    """Return what a threshold keeps on some images."""
    kept = np.isin(measured.images, images)
    groups = measured.groups[kept].tolist()
    full, routed = (mean_scores(groups, measured.scores[n, kept].tolist())[MEAN] for n in (0, number))
    return (routed or 0.0) / (full or 1.0)


def compare(measured: Measured) -> dict[str, dict[str, float]]:
    """Return for every rule and number of images how many draws keep too little, and what they cost."""
    rng, size = np.random.default_rng(0), measured.tokens.shape[1]
    costs = measured.tokens.sum(1) / measured.tokens[0].sum()
    found: dict[str, dict[str, float]] = {}
    for num_images in NUM_IMAGES:
        chosen: dict[str, list[tuple[float, float]]] = {rule: [] for rule in RULES}
        for _ in range(DRAWS):
            order = rng.permutation(size)
            curve = measured.curve(np.sort(order[:num_images]))
            for rule, choose in RULES.items():
                number = measured.thresholds.index(choose(curve).threshold)
                kept = retention_of(measured, number, order[num_images:])
                chosen[rule].append((kept, float(costs[number])))
        for rule, draws in chosen.items():
            found[f"{num_images} images, {rule}"] = {
                "too_little": mean(kept < RETENTION for kept, _ in draws),
                "kept": mean(kept for kept, _ in draws),
                "kept_worst": min(kept for kept, _ in draws),
                "token_fraction": mean(cost for _, cost in draws),
            }
    return found


if __name__ == "__main__":
    model, shards, output = map(Path, sys.argv[1:])
    write_json(compare(measure(open_questions(Predictor.load(model), shards))), output)
