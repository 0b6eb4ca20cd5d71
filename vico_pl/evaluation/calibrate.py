"""Choose the router's threshold: as few vision tokens as the required accuracy allows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vico_pl.data.shards.inspect import read_samples
from vico_pl.evaluation.metrics import accuracy_by_skill
from vico_pl.evaluation.questions import Answerer, Track, folder_groups, has_questions, silent
from vico_pl.inference.predictor import Predictor
from vico_pl.inference.routing import NEVER, at_threshold, compress_probability, threshold_for, vision_tokens

COMPRESSED_FRACTIONS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 1.0)
SKILL_SLACK = 0.01  # a single skill may be this far below the required retention: few questions, noisy


@dataclass(frozen=True, kw_only=True)
class CalibrationPoint:
    """The cost and accuracy of one threshold."""

    threshold: float  # compress iff P(compress) is at least this
    token_fraction: float  # vision tokens over those of full tokens
    accuracy: dict[str, float | None]  # per skill and mean
    retention: dict[str, float | None]  # accuracy over that of full tokens


@torch.no_grad()
def measure_curve(predictor: Predictor, folder: Path, *, track: Track = silent) -> list[CalibrationPoint]:
    """Answer the questions of a folder at thresholds that compress from no tile to all.

    Without questions that have a skill the curve has only token fractions, which suffice for a budget.

    Raises:
        ValueError: the folder has no image.
    """
    scores = [
        compress_probability(predictor.router_logits(features))
        for group in folder_groups(predictor, folder, title="scoring tiles", track=track)
        for features in group.features
    ]
    if not sum(map(len, scores)):
        raise ValueError(f"{folder}: no image to calibrate on")
    candidates = (threshold_for(scores, compressed_fraction=f, halfway=True) for f in COMPRESSED_FRACTIONS)
    thresholds = list(dict.fromkeys(min(NEVER, threshold) for threshold in candidates))
    skills: list[str] = []
    correct: list[list[bool]] = [[] for _ in thresholds]
    if has_questions(read_samples(folder)):
        for group in folder_groups(predictor, folder, title="answering", track=track):
            own, ratios = scores[group.positions], predictor.model.ratios
            choices = [at_threshold(own, threshold, ratios=ratios) for threshold in thresholds]
            answerer = Answerer(predictor, group)
            answerer.prepare(choices)
            skills += [q.skill for q in group.questions]
            for column, choice in zip(correct, choices, strict=True):
                column += answerer.correct(choice)
    accuracies = [accuracy_by_skill(skills, column) for column in correct]
    return [
        _point(predictor, scores, threshold, accuracy, full=accuracies[0])
        for threshold, accuracy in zip(thresholds, accuracies, strict=True)
    ]


def check_goal(predictor: Predictor, folder: Path, budget: float | None) -> None:
    """Check before measuring that the budget can be met, or without a budget that there are questions.

    Raises:
        ValueError: the goal cannot be met.
    """
    if budget is None:
        if not has_questions(read_samples(folder)):
            raise ValueError(
                f"{folder}: no question with a skill, so no accuracy to keep; see data/README.md for "
                "evaluation sets, or set a budget of vision tokens"
            )
        return
    cheapest = predictor.model.ratios[0] / predictor.model.ratios[-1]
    if budget < cheapest:
        raise ValueError(f"budget {budget} cannot be met: all tiles compressed cost {cheapest}")


def choose_point(
    curve: Sequence[CalibrationPoint], *, retention: float, budget: float | None = None
) -> CalibrationPoint:
    """Return the cheapest point that keeps `retention`, or the most accurate one within a token `budget`.

    For a curve without accuracies, return the most expensive point within the budget.

    Raises:
        ValueError: no point is that cheap.
    """
    if budget is None:
        return min((p for p in curve if _keeps(p, retention)), key=lambda point: point.token_fraction)
    within = [point for point in curve if point.token_fraction <= budget]
    if not within:
        cheapest = min(point.token_fraction for point in curve)
        raise ValueError(f"budget {budget} cannot be met: all tiles compressed cost {cheapest:.3f}")
    if within[0].accuracy["mean"] is None:
        return max(within, key=lambda point: point.token_fraction)
    return max(within, key=lambda point: (point.accuracy["mean"] or 0.0, -point.token_fraction))


def calibration_record(
    curve: Sequence[CalibrationPoint], chosen: CalibrationPoint, **made_with: Any
) -> dict[str, Any]:
    """Return the content of calibration.json."""
    return {
        "threshold": chosen.threshold,
        **made_with,
        "chosen": asdict(chosen),
        "curve": [asdict(p) for p in curve],
    }


def _point(
    predictor: Predictor,
    scores: Sequence[torch.Tensor],
    threshold: float,
    accuracy: dict[str, float | None],
    *,
    full: dict[str, float | None],
) -> CalibrationPoint:
    model = predictor.model
    chosen = at_threshold(scores, threshold, ratios=model.ratios)
    spent = sum(vision_tokens(chosen, num_patches=model.vision.num_patches))
    return CalibrationPoint(
        threshold=threshold,
        token_fraction=spent / (sum(map(len, scores)) * model.tokens_per_full_tile),
        accuracy=accuracy,
        retention={skill: _retention(value, full[skill]) for skill, value in accuracy.items()},
    )


def _retention(value: float | None, full: float | None) -> float | None:
    return value / full if value is not None and full else None


def _keeps(point: CalibrationPoint, retention: float) -> bool:
    skills = [value for name, value in point.retention.items() if name != "mean" and value is not None]
    mean = point.retention["mean"]
    return point.threshold == NEVER or (
        mean is not None and mean >= retention and min(skills) >= retention - SKILL_SLACK
    )
