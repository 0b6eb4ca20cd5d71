"""Hold the router against other ways to spend the same vision tokens: the arms of `report.json`."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vico_pl.data.tiling import tile_sample
from vico_pl.evaluation.baselines import (
    TileScores,
    oracle_scores,
    pixel_detail_scores,
    random_scores,
    router_scores,
    shrunken_tilings,
)
from vico_pl.evaluation.metrics import Scores, accuracy_tables, mean_accuracy
from vico_pl.inference.questions import Answerer, Group, at_threshold, read_groups, threshold_for, vision_tokens
from vico_pl.inference.routing import NEVER
from vico_pl.inference.session import Session

PARETO_FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 1.0)  # of tiles compressed
TIMED_SAMPLES = 12

Track = Callable[[Iterable[Group], str], Iterable[Group]]  # shows progress under a title


@dataclass
class ArmResult:
    """What one arm spent and got right."""

    tokens: list[int] = field(default_factory=list)  # vision tokens of each image
    correct: list[bool] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)


@dataclass
class Results:
    """Everything measured on an evaluation set."""

    arms: dict[str, ArmResult] = field(default_factory=dict)
    pareto: dict[tuple[str, float], ArmResult] = field(default_factory=dict)
    skills: list[str] = field(default_factory=list)
    sample_of_question: list[int] = field(default_factory=list)
    full_tokens: list[int] = field(default_factory=list)  # of each image


@dataclass(frozen=True, kw_only=True)
class RoutedExample:
    """One question for the gallery: how its image was routed and what was answered."""

    sample: int  # position of its sample in the set
    ratios: list[int]
    question: str
    expected: str
    full_answer: str
    router_answer: str


def evaluate(
    session: Session, folder: Path, *, seed: int, track: Track, num_examples: int = 8
) -> tuple[dict[str, Any], list[RoutedExample]]:
    """Evaluate all arms at the router's budget; returns the report (contract C7) and examples for its gallery.

    Raises:
        ValueError: no calibrated router, or nothing to evaluate on.
    """
    if session.threshold is None:
        raise ValueError("the model is not calibrated; run 'vico calibrate' on it first")
    scores = _score_tiles(session, track(read_groups(session, session.samples(folder)), "scoring tiles"), seed=seed)
    thresholds = _thresholds(scores, session.threshold)
    results, examples = Results(), []
    for group in track(read_groups(session, session.samples(folder)), "answering"):
        answerer = Answerer(session, group)
        choices = _choices(session, group, scores, thresholds)
        _record_group(results, session, group, answerer, choices)
        _record_pareto(results, session, group, answerer, scores)
        if len(examples) < num_examples:
            examples += _examples(group, answerer, choices, limit=2)
    if not results.skills:
        raise ValueError(f"{folder}: no question with a skill; see data/README.md for evaluation sets")
    budget = sum(results.arms["router"].tokens) / sum(results.full_tokens)
    _record_downsampled(results, session, folder, track, budget=budget)
    return _report(results, folder, seed=seed), examples[:num_examples]


def _score_tiles(session: Session, groups: Iterable[Group], *, seed: int) -> dict[str, TileScores]:
    scores: dict[str, TileScores] = {"router": [], "random": [], "pixel_detail": [], "oracle": []}
    for group in groups:
        scores["router"] += router_scores(session, group)
        scores["random"] += random_scores(group, seed=seed)
        scores["pixel_detail"] += pixel_detail_scores(group)
        scores["oracle"] += oracle_scores(session, group)
    return scores


def _thresholds(scores: Mapping[str, TileScores], threshold: float) -> dict[str, float]:
    """Give every arm the threshold at which it compresses as many tiles as the router does."""
    fraction = float((torch.cat(scores["router"]) >= threshold).float().mean())
    same_budget = {arm: threshold_for(scores[arm], compressed_fraction=fraction) for arm in scores}
    return {**same_budget, "router": threshold}


def _choices(
    session: Session, group: Group, scores: Mapping[str, TileScores], thresholds: Mapping[str, float]
) -> dict[str, list[Tensor]]:
    ratios = session.model.ratios
    own = {arm: _own(of_set, group) for arm, of_set in scores.items()}
    return {
        "full": at_threshold(own["random"], NEVER, ratios=ratios),
        "all_compressed": at_threshold(own["random"], 0.0, ratios=ratios),
        **{arm: at_threshold(own[arm], thresholds[arm], ratios=ratios) for arm in own},
    }


def _record_group(
    results: Results, session: Session, group: Group, answerer: Answerer, choices: Mapping[str, list[Tensor]]
) -> None:
    num_patches = session.model.vision.num_patches
    results.skills += [q.skill for q in group.questions]
    results.sample_of_question += [q.sample for q in group.questions]
    results.full_tokens += vision_tokens(choices["full"], num_patches=num_patches)
    for arm, ratios in choices.items():
        result = results.arms.setdefault(arm, ArmResult())
        result.tokens += vision_tokens(ratios, num_patches=num_patches)
        result.correct += answerer.correct(ratios)
        if group.first == 0:
            result.first_token_ms += _time_first_tokens(session, group, ratios, routes=arm == "router")


def _record_pareto(
    results: Results, session: Session, group: Group, answerer: Answerer, scores: Mapping[str, TileScores]
) -> None:
    for arm, of_set in scores.items():
        for fraction in PARETO_FRACTIONS:
            threshold = threshold_for(of_set, compressed_fraction=fraction)
            ratios = at_threshold(_own(of_set, group), threshold, ratios=session.model.ratios)
            result = results.pareto.setdefault((arm, threshold), ArmResult())
            result.tokens += vision_tokens(ratios, num_patches=session.model.vision.num_patches)
            result.correct += answerer.correct(ratios)


def _record_downsampled(results: Results, session: Session, folder: Path, track: Track, *, budget: float) -> None:
    """Shrink images instead of compressing tiles, to the same total of vision tokens."""
    sizes = [(s.images[0].shape[2], s.images[0].shape[1]) if s.images else (1, 1) for s in session.decoded(folder)]
    tilings = shrunken_tilings(sizes, session.tiling, budget=budget)
    shrunk = (tile_sample(s, t) for s, t in zip(session.decoded(folder), tilings, strict=True))
    result = results.arms["downsample"] = ArmResult()
    for group in track(read_groups(session, shrunk), "downsampled"):
        ratios = [torch.full((len(f),), session.model.ratios[0]) for f in group.features]
        result.tokens += vision_tokens(ratios, num_patches=session.model.vision.num_patches)
        result.correct += Answerer(session, group).correct(ratios)
        if group.first == 0:
            result.first_token_ms += _time_first_tokens(session, group, ratios, routes=False)


def _examples(
    group: Group, answerer: Answerer, choices: Mapping[str, list[Tensor]], *, limit: int
) -> Iterator[RoutedExample]:
    """Pick questions about images of several tiles, one per image."""
    full, routed = answerer(choices["full"]), answerer(choices["router"])
    seen: set[int] = set()
    for question, full_answer, router_answer in zip(group.questions, full, routed, strict=True):
        place = question.sample - group.first
        if len(seen) == limit or place in seen or len(group.samples[place].tiles) < 4:
            continue
        seen.add(place)
        yield RoutedExample(
            sample=question.sample,
            ratios=choices["router"][place].tolist(),
            question=question.text,
            expected=question.expected,
            full_answer=full_answer,
            router_answer=router_answer,
        )


@torch.no_grad()
def _time_first_tokens(session: Session, group: Group, ratios: Sequence[Tensor], *, routes: bool) -> list[float]:
    """Time tiles -> first answer token for single samples, in milliseconds; the first one warms up."""
    times = []
    for sample, choice in list(zip(group.samples, ratios, strict=True))[: TIMED_SAMPLES + 1]:
        start = time.perf_counter()
        session.first_token(sample, choice, routes=routes)
        times.append((time.perf_counter() - start) * 1000)
    return times[1:]


def _report(results: Results, folder: Path, *, seed: int) -> dict[str, Any]:
    scores = Scores(
        sample=np.array(results.sample_of_question),
        skill=np.array(results.skills),
        correct={arm: np.array(result.correct) for arm, result in results.arms.items()},
    )
    tables = accuracy_tables(scores, seed=seed)
    total = sum(results.full_tokens)
    arms = {
        arm: {
            "vision_tokens_per_image": round(float(np.mean(result.tokens)), 3),
            "token_fraction": round(sum(result.tokens) / total, 5),
            **tables[arm],
            "first_token_ms": round(float(np.median(result.first_token_ms)), 3),
        }
        for arm, result in results.arms.items()
    }
    pareto = [
        {
            "arm": arm,
            "threshold": threshold if np.isfinite(threshold) else None,
            "token_fraction": round(sum(result.tokens) / total, 5),
            "accuracy_mean": mean_accuracy(scores.skill, np.array(result.correct))["mean"],
        }
        for (arm, threshold), result in results.pareto.items()
    ]
    num_samples = len(results.full_tokens)
    return {"model": "", "dataset": str(folder), "num_samples": num_samples, "seed": seed, "arms": arms, "pareto": pareto}


def _own(of_set: TileScores, group: Group) -> TileScores:
    return of_set[group.first : group.first + len(group.samples)]
