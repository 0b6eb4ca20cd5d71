"""Find the router's threshold: as few vision tokens as the wanted accuracy allows."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vico_pl.data.shards.inspect import read_samples
from vico_pl.evaluation.questions import (
    Answerer,
    Group,
    Track,
    accuracy_by_skill,
    at_threshold,
    count_groups,
    has_questions,
    read_groups,
    silent,
    vision_tokens,
)
from vico_pl.inference.predictor import Predictor
from vico_pl.inference.routing import NEVER, compress_probability

COMPRESSED_FRACTIONS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 1.0)
SKILL_SLACK = (
    0.01  # a single skill may fall this far below the wanted retention, as few questions make it noisy
)


@dataclass(frozen=True, kw_only=True)
class CalibrationPoint:
    """What one threshold gives."""

    threshold: float  # compress iff P(compress) is at least this
    token_fraction: float  # vision tokens over those of full tokens
    accuracy: dict[str, float | None]  # per skill and mean
    retention: dict[str, float | None]  # accuracy over that of full tokens


def measure_curve(predictor: Predictor, folder: Path, *, track: Track = silent) -> list[CalibrationPoint]:
    """Answer the questions of a folder at thresholds that compress from no tile to all.

    Without questions that have a skill the curve has token fractions alone, which do for a budget.

    Raises:
        ValueError: the folder has no image.
    """

    def groups(title: str) -> Iterable[Group]:
        return track(read_groups(predictor, predictor.samples(folder)), title, count_groups(folder))

    scores = [p for group in groups("scoring tiles") for p in _probabilities(predictor, group)]
    if not sum(map(len, scores)):
        raise ValueError(f"{folder}: no image to calibrate on")
    thresholds = list(dict.fromkeys(_between(scores, fraction) for fraction in COMPRESSED_FRACTIONS))
    skills: list[str] = []
    correct: list[list[bool]] = [[] for _ in thresholds]
    for group in groups("answering") if has_questions(read_samples(folder)) else ():
        own = scores[group.first : group.first + len(group.samples)]
        choices = [at_threshold(own, threshold, ratios=predictor.model.ratios) for threshold in thresholds]
        answerer = Answerer(predictor, group)
        answerer.prepare(choices)
        skills += [q.skill for q in group.questions]
        for column, ratios in zip(correct, choices, strict=True):
            column += answerer.correct(ratios)
    return list(_points(predictor, scores, thresholds, skills, correct))


def check_goal(predictor: Predictor, folder: Path, budget: float | None) -> None:
    """Refuse, before any measuring, a budget below that of all tiles compressed, or data without questions.

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

    Of a curve without accuracies, a budget takes the point that uses it best.

    Raises:
        ValueError: no point is that cheap.
    """
    if budget is not None:
        within = [point for point in curve if point.token_fraction <= budget]
        if not within:
            cheapest = min(point.token_fraction for point in curve)
            raise ValueError(f"budget {budget} cannot be met: all tiles compressed cost {cheapest:.3f}")
        if within[0].accuracy["mean"] is None:
            return max(within, key=lambda point: point.token_fraction)
        return max(within, key=lambda point: (point.accuracy["mean"] or 0.0, -point.token_fraction))
    keeping = [point for point in curve if _keeps(point, retention)]
    return min(keeping, key=lambda point: point.token_fraction)


def calibration_record(
    curve: Sequence[CalibrationPoint], chosen: CalibrationPoint, **made_with: Any
) -> dict[str, Any]:
    """Return what is written beside the weights."""
    return {
        "threshold": chosen.threshold,
        **made_with,
        "chosen": asdict(chosen),
        "curve": [asdict(p) for p in curve],
    }


@torch.no_grad()
def _probabilities(predictor: Predictor, group: Group) -> list[torch.Tensor]:
    return [compress_probability(predictor.router_logits(features)) for features in group.features]


def _between(scores: Sequence[torch.Tensor], compressed_fraction: float) -> float:
    """Place a threshold halfway between the last tile to compress and the first to keep."""
    ranked = torch.cat(list(scores)).sort(descending=True).values
    count = round(compressed_fraction * len(ranked))
    if count == 0:
        return NEVER
    if count == len(ranked):
        return 0.0
    return float(ranked[count - 1] + ranked[count]) / 2


def _points(
    predictor: Predictor,
    scores: Sequence[torch.Tensor],
    thresholds: Sequence[float],
    skills: Sequence[str],
    correct: Sequence[Sequence[bool]],
) -> Iterator[CalibrationPoint]:
    full = accuracy_by_skill(skills, correct[0])
    model = predictor.model
    for threshold, right in zip(thresholds, correct, strict=True):
        chosen = at_threshold(scores, threshold, ratios=model.ratios)
        spent = sum(vision_tokens(chosen, num_patches=model.vision.num_patches))
        accuracy = accuracy_by_skill(skills, right)
        yield CalibrationPoint(
            threshold=threshold,
            token_fraction=spent / (sum(map(len, scores)) * model.tokens_per_full_tile),
            accuracy=accuracy,
            retention={skill: _share(value, full[skill]) for skill, value in accuracy.items()},
        )


def _share(value: float | None, full: float | None) -> float | None:
    return value / full if value is not None and full else None


def _keeps(point: CalibrationPoint, retention: float) -> bool:
    skills = [value for name, value in point.retention.items() if name != "mean" and value is not None]
    mean = point.retention["mean"]
    return point.threshold == NEVER or (
        mean is not None and mean >= retention and min(skills) >= retention - SKILL_SLACK
    )
