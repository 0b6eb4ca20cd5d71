"""Choose the router's threshold: as few vision tokens as the required accuracy allows."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from vico_pl.evaluation.answering import Ratios
from vico_pl.evaluation.metrics import MEAN, OVERALL, retention_bounds, score_tables
from vico_pl.evaluation.questions import QuestionSet
from vico_pl.model.families.base import name_dtypes
from vico_pl.model.router import NEVER, at_thresholds, routing_scores, threshold_for, vision_tokens

# Of tiles; with several coarser ratios, of the steps from each to the next. A question is asked once at the
# same ratios, so with two an image of n tiles takes n + 1 passes at most, however fine the steps.
COMPRESSED_FRACTIONS = tuple(step / 40 for step in range(41))
MOST_IMAGES = 20  # times those of the set: of points that would need more, nothing is said
GROUP_SLACK = 0.01  # a single group may be this far below the required retention: few questions, noisy


@dataclass(frozen=True, kw_only=True)
class CalibrationPoint:
    """The cost and accuracy of one threshold; tables have a value per group, `mean` and `overall`."""

    threshold: float  # a tile gets the coarsest ratio of which P(it or a coarser one) is at least this
    token_fraction: float  # vision tokens over those of full tokens
    accuracy: dict[str, float | None]
    retention: dict[str, float | None]  # accuracy over that of full tokens
    retention_ci: dict[str, list[float] | None]  # 95 % interval over images
    retention_bound: float | None  # what is kept of the mean at least, with 97.5 % certainty
    num_images: int  # with questions
    num_questions: int


def calibrate(
    questions: QuestionSet, *, retention: float, budget: float | None = None
) -> tuple[CalibrationPoint, dict[str, Any]]:
    """Measure thresholds on a set; return the chosen point and the content of calibration.json.

    Raises:
        ValueError: the budget cannot be met, or there is no image, or nothing right at full tokens.
    """
    ratios = questions.predictor.model.ratios
    cheapest = ratios[0] / ratios[-1]
    if budget is not None and budget < cheapest:
        raise ValueError(f"budget {budget} cannot be met: all tiles compressed cost {cheapest}")
    curve = measure(questions).curve()
    chosen = choose_point(curve, retention=retention, budget=budget)
    made_with = {
        "dtype": name_dtypes(questions.predictor.model.parameters()),
        "data": questions.name,
        "measure": questions.measure.value,
        "retention": retention,
        "budget": budget,
    }
    points = {"chosen": asdict(chosen), "curve": [asdict(point) for point in curve]}
    promising = None if budget is not None else find_promising(curve, chosen, retention=retention)
    return chosen, {"threshold": chosen.threshold, **made_with, **points, "promising": promising}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Tokens per sample and scores per question at every threshold, from full tokens down."""

    thresholds: list[float]
    tokens: np.ndarray  # vision tokens, (thresholds, samples)
    images: np.ndarray  # the sample of each question, (questions,)
    groups: np.ndarray
    scores: np.ndarray  # (thresholds, questions)

    def curve(self, chosen: np.ndarray | slice = slice(None)) -> list[CalibrationPoint]:
        """Return the point of every threshold, from all samples or from the chosen ones."""
        kept = np.isin(self.images, np.arange(self.tokens.shape[1])[chosen])
        columns = {str(number): row[kept].tolist() for number, row in enumerate(self.scores)}
        images, groups = self.images[kept], self.groups[kept].tolist()
        given: Any = {"baseline": "0", "seed": 0}
        tables = score_tables(images.tolist(), groups, columns, **given)
        bounds = retention_bounds(images.tolist(), groups, columns, **given)
        spent = self.tokens[:, chosen].sum(1).tolist()
        return [
            CalibrationPoint(
                threshold=threshold,
                token_fraction=tokens / spent[0],
                num_images=len(set(images.tolist())),
                num_questions=len(images),
                retention_bound=bounds[column],
                **{name: tables[column][name] for name in ("accuracy", "retention", "retention_ci")},
            )
            for threshold, tokens, column in zip(self.thresholds, spent, columns, strict=True)
        ]


@torch.no_grad()
def measure(questions: QuestionSet) -> Measured:
    """Ask the questions of a set at thresholds that compress from no tile to all, to the coarsest ratio.

    `COMPRESSED_FRACTIONS` of the scores reach them, of which a tile has one per coarser ratio.

    Raises:
        ValueError: the set has no image, or nothing is right at full tokens.
    """
    predictor, scores = questions.predictor, []
    for group in questions.checked_groups():
        scores += [routing_scores(predictor.router_logits(features)) for features in group.features]
    candidates = (threshold_for(scores, compressed_fraction=f, halfway=True) for f in COMPRESSED_FRACTIONS)
    by_cost: dict[int, tuple[float, Ratios, list[int]]] = {}  # in a small set several cost the same
    for threshold in (min(NEVER, candidate) for candidate in candidates):
        ratios = at_thresholds(scores, [threshold], ratios=predictor.model.ratios)
        tokens = vision_tokens(ratios, num_patches=predictor.model.vision.num_patches)
        by_cost[sum(tokens)] = threshold, ratios, tokens
    thresholds, choices, spent = zip(*by_cost.values(), strict=True)
    images: list[int] = []
    groups: list[str] = []
    columns: list[list[float]] = [[] for _ in choices]
    for group in questions.groups(title="answering"):
        images += [question.sample for question in group.questions]
        groups += [question.group for question in group.questions]
        graded = questions.grade(group, [ratios[group.positions] for ratios in choices])
        for column, results in zip(columns, graded, strict=True):
            column += [result.score for result in results]
    return Measured(
        thresholds=list(thresholds),
        tokens=np.array(spent),
        images=np.array(images),
        groups=np.array(groups),
        scores=np.array(columns),
    )


def choose_point(
    curve: Sequence[CalibrationPoint], *, retention: float, budget: float | None = None
) -> CalibrationPoint:
    """Return the cheapest point that keeps `retention`, or the most accurate one within a token `budget`.

    Its bound must keep it: of points that keep it by their mean alone, the cheapest is often one that these
    images favour. For the same reason the search goes down from full tokens and ends at the first point that
    fails (fixed-sequence testing, as in Learn then Test, arXiv 2110.01052).
    """
    if budget is None:
        return [*takewhile(lambda point: _keeps(point, retention), _from_full_tokens(curve))][-1]
    within = [point for point in curve if point.token_fraction <= budget]
    return max(within, key=lambda point: (point.accuracy[MEAN] or 0.0, -point.token_fraction))


def find_promising(
    curve: Sequence[CalibrationPoint], chosen: CalibrationPoint, *, retention: float
) -> dict[str, float] | None:
    """Return the point that would be chosen if means alone counted, and how many images would show that.

    None: no such point is cheaper than the chosen one, or it takes more than `MOST_IMAGES` times the images.
    """
    below = [p for p in _from_full_tokens(curve) if p.token_fraction < chosen.token_fraction]
    found, needed = None, 0
    for point in takewhile(lambda point: _keeps_by_mean(point, retention), below):
        needed = max(needed, _images_needed(point, retention))
        if needed > MOST_IMAGES * point.num_images:
            break
        found = {
            "threshold": point.threshold,
            "token_fraction": point.token_fraction,
            "images_needed": needed,
        }
    return found


def _from_full_tokens(curve: Iterable[CalibrationPoint]) -> list[CalibrationPoint]:
    return sorted(curve, key=lambda point: -point.token_fraction)


def _images_needed(point: CalibrationPoint, retention: float) -> int:
    """Solve `_keeps` for the number of images.

    With k times the images the interval is narrower by the root of k, and how far the bound lies below it, as
    one more image were lost, by k.
    """
    mean, interval, bound = point.retention[MEAN], point.retention_ci[MEAN], point.retention_bound
    if mean is None or interval is None or bound is None:
        return point.num_images
    spare, width, below = mean - retention, mean - interval[0], max(0.0, interval[0] - bound)
    root = (width + math.sqrt(width**2 + 4 * spare * below)) / (2 * spare)
    return math.ceil(point.num_images * max(1.0, root) ** 2)


def _keeps(point: CalibrationPoint, retention: float) -> bool:
    is_kept = (point.retention_bound or 0.0) >= retention and _keeps_groups(point, retention)
    return point.threshold == NEVER or is_kept


def _keeps_by_mean(point: CalibrationPoint, retention: float) -> bool:
    return (point.retention[MEAN] or 0.0) > retention and _keeps_groups(point, retention)


def _keeps_groups(point: CalibrationPoint, retention: float) -> bool:
    groups = (v for name, v in point.retention.items() if name not in (MEAN, OVERALL) and v is not None)
    return min(groups) >= retention - GROUP_SLACK
