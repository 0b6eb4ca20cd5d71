"""Choose the router's threshold: as few vision tokens as the required accuracy allows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vico_pl.data.shards.inspect import read_samples
from vico_pl.evaluation.metrics import accuracy_by_skill
from vico_pl.evaluation.questions import NOTHING_RIGHT, answer_folder, folder_groups, has_questions
from vico_pl.inference.predictor import Predictor
from vico_pl.model.families.base import name_dtypes
from vico_pl.model.router import NEVER, at_threshold, compress_probability, threshold_for, vision_tokens

COMPRESSED_FRACTIONS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 1.0)
SKILL_SLACK = 0.01  # a single skill may be this far below the required retention: few questions, noisy


@dataclass(frozen=True, kw_only=True)
class CalibrationPoint:
    """The cost and accuracy of one threshold."""

    threshold: float  # compress iff P(compress) is at least this
    token_fraction: float  # vision tokens over those of full tokens
    accuracy: dict[str, float | None]  # per skill and mean
    retention: dict[str, float | None]  # accuracy over that of full tokens


def calibrate(
    predictor: Predictor, folder: Path, *, retention: float, budget: float | None = None
) -> tuple[CalibrationPoint, dict[str, Any]]:
    """Measure thresholds on a folder; return the chosen point and the content of calibration.json.

    Raises:
        ValueError: the budget cannot be met, or without one there is no accuracy to keep; no image.
    """
    cheapest = predictor.model.ratios[0] / predictor.model.ratios[-1]
    if budget is not None and budget < cheapest:
        raise ValueError(f"budget {budget} cannot be met: all tiles compressed cost {cheapest}")
    if budget is None and not has_questions(read_samples(folder)):
        raise ValueError(
            f"{folder}: no question with a skill, so no accuracy to keep; see data/README.md for "
            "evaluation sets, or set a budget of vision tokens"
        )
    curve = measure_curve(predictor, folder)
    if budget is None and not curve[0].accuracy["mean"]:
        raise ValueError(f"{folder}: {NOTHING_RIGHT}; no threshold is written, set a budget to choose one")
    chosen = choose_point(curve, retention=retention, budget=budget)
    dtype = name_dtypes(predictor.model.parameters())
    made_with = {"dtype": dtype, "data": str(folder), "retention": retention, "budget": budget}
    points = {"chosen": asdict(chosen), "curve": [asdict(point) for point in curve]}
    return chosen, {"threshold": chosen.threshold, **made_with, **points}


@torch.no_grad()
def measure_curve(predictor: Predictor, folder: Path) -> list[CalibrationPoint]:
    """Answer the questions of a folder at thresholds that compress from no tile to all.

    Without questions that have a skill the curve has only token fractions, which suffice for a budget.

    Raises:
        ValueError: the folder has no image.
    """
    scores = [
        compress_probability(predictor.router_logits(features))
        for group in folder_groups(predictor, folder, title="scoring tiles")
        for features in group.features
    ]
    if not sum(map(len, scores)):
        raise ValueError(f"{folder}: no image to calibrate on")
    candidates = (threshold_for(scores, compressed_fraction=f, halfway=True) for f in COMPRESSED_FRACTIONS)
    thresholds = list(dict.fromkeys(min(NEVER, threshold) for threshold in candidates))
    model = predictor.model
    choices = [at_threshold(scores, threshold, ratios=model.ratios) for threshold in thresholds]
    skills: list[str] = []
    correct: list[list[bool]] = [[] for _ in choices]
    if has_questions(read_samples(folder)):
        for group, answers in answer_folder(predictor, folder, choices):
            skills += [q.skill for q in group.questions]
            for column, given in zip(correct, answers, strict=True):
                column += group.grade(given)
    full_tokens = sum(map(len, scores)) * model.tokens_per_full_tile
    full = accuracy_by_skill(skills, correct[0])
    return [
        CalibrationPoint(
            threshold=threshold,
            token_fraction=sum(vision_tokens(choice, num_patches=model.vision.num_patches)) / full_tokens,
            accuracy=accuracy,
            retention={skill: _retention(value, full[skill]) for skill, value in accuracy.items()},
        )
        for threshold, choice, accuracy in zip(
            thresholds, choices, (accuracy_by_skill(skills, column) for column in correct), strict=True
        )
    ]


def choose_point(
    curve: Sequence[CalibrationPoint], *, retention: float, budget: float | None = None
) -> CalibrationPoint:
    """Return the cheapest point that keeps `retention`, or the most accurate one within a token `budget`.

    For a curve without accuracies, or of a model that is never right, return the most expensive point within
    the budget.
    """
    if budget is None:
        return min((p for p in curve if _keeps(p, retention)), key=lambda point: point.token_fraction)
    within = [point for point in curve if point.token_fraction <= budget]
    if not curve[0].accuracy["mean"]:
        return max(within, key=lambda point: point.token_fraction)
    return max(within, key=lambda point: (point.accuracy["mean"] or 0.0, -point.token_fraction))


def _retention(value: float | None, full: float | None) -> float | None:
    return value / full if value is not None and full else None


def _keeps(point: CalibrationPoint, retention: float) -> bool:
    skills = [value for name, value in point.retention.items() if name != "mean" and value is not None]
    mean = point.retention["mean"]
    return point.threshold == NEVER or (
        mean is not None and mean >= retention and min(skills) >= retention - SKILL_SLACK
    )
