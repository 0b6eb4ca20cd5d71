"""Compare the router with other ways to spend its vision tokens: the arms of `report.json`."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from vico_pl.data.shards.inspect import read_samples
from vico_pl.data.tiling import tile_sample
from vico_pl.evaluation import baselines
from vico_pl.evaluation.baselines import TileScores
from vico_pl.evaluation.metrics import Scores, accuracy_by_skill, accuracy_tables
from vico_pl.evaluation.questions import (
    Answerer,
    EvalQuestion,
    Group,
    Track,
    count_groups,
    folder_groups,
    has_questions,
    read_groups,
    silent,
)
from vico_pl.inference.predictor import Predictor
from vico_pl.inference.routing import at_threshold, threshold_for, vision_tokens

PARETO_FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 1.0)  # of tiles compressed
TIMED_SAMPLES = 12
EXAMPLES_PER_GROUP = 2
EXAMPLE_TILES = 4  # at least, thumbnail included: fewer show little of a choice

Ratios = Sequence[Int64[Tensor, " _"]]  # one entry per sample


class Setting(NamedTuple):
    """A way to choose tiles: compress those whose score reaches a threshold."""

    scores: str  # router, random, pixel_detail or oracle
    threshold: float


@dataclass
class Outcome:
    """Cost and correctness of one setting."""

    tokens: list[int] = field(default_factory=list)  # vision tokens of each sample
    correct: list[bool] = field(default_factory=list)  # of each question
    first_token_ms: list[float] = field(default_factory=list)  # of some samples


@dataclass(frozen=True, kw_only=True)
class RoutedExample:
    """A question of the gallery: how its image was routed, and the answers."""

    sample: int  # position of its sample in the set
    ratios: list[int]
    token_fraction: float
    question: str
    expected: str
    full_answer: str
    router_answer: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """All measurements on an evaluation set, filled group by group."""

    arms: dict[str, Setting]
    pareto: list[Setting]
    outcomes: dict[Setting, Outcome]
    questions: list[EvalQuestion] = field(default_factory=list)
    examples: list[RoutedExample] = field(default_factory=list)


def evaluate(
    predictor: Predictor, folder: Path, *, seed: int, track: Track = silent, num_examples: int = 8
) -> tuple[dict[str, Any], list[RoutedExample]]:
    """Evaluate all arms at the router's budget; return the content of report.json and examples to show.

    Raises:
        ValueError: no calibrated router, or nothing to evaluate on.
    """
    if predictor.rule is None:
        raise ValueError(f"{predictor.folder}: the model is not calibrated; run 'vico calibrate' on it first")
    if not has_questions(read_samples(folder)):
        raise ValueError(f"{folder}: no question with a skill; see data/README.md for evaluation sets")
    groups = folder_groups(predictor, folder, title="scoring tiles", track=track)
    scores = _score_tiles(predictor, groups, seed=seed)
    if not sum(map(len, scores["router"])):
        raise ValueError(f"{folder}: no image to evaluate on")
    results = _empty_results(scores, predictor.rule.threshold)
    for group in folder_groups(predictor, folder, title="answering", track=track):
        _answer_group(results, predictor, group, scores)
    arms = {arm: results.outcomes[setting] for arm, setting in results.arms.items()}
    budget = sum(arms["router"].tokens) / sum(arms["full"].tokens)
    arms["downsample"] = _downsample(predictor, folder, budget=budget, track=track)
    return _report(predictor, folder, results, arms, seed=seed), results.examples[:num_examples]


def _score_tiles(predictor: Predictor, groups: Iterable[Group], *, seed: int) -> dict[str, TileScores]:
    """Score the tiles of the whole set; all but the router's scores become ranks."""
    scores: dict[str, TileScores] = {"router": [], "random": [], "pixel_detail": [], "oracle": []}
    for group in groups:
        scores["router"] += baselines.router_scores(predictor, group)
        scores["random"] += baselines.random_scores(group, seed=seed)
        scores["pixel_detail"] += baselines.pixel_detail_scores(group)
        scores["oracle"] += baselines.oracle_scores(predictor, group)
    return {
        arm: of_set if arm == "router" or not of_set else baselines.ranked(of_set)
        for arm, of_set in scores.items()
    }


def _empty_results(scores: Mapping[str, TileScores], threshold: float) -> Results:
    """Give every arm the threshold at which it compresses as many tiles as the router does."""
    fraction = float((torch.cat(scores["router"]) >= threshold).double().mean())
    arms = {
        "full": Setting("router", math.inf),
        "all_compressed": Setting("router", 0.0),
        **{arm: Setting(arm, threshold_for(scores[arm], compressed_fraction=fraction)) for arm in scores},
        "router": Setting("router", threshold),
    }
    swept = [
        Setting(arm, threshold_for(of_set, compressed_fraction=swept_fraction))
        for arm, of_set in scores.items()
        for swept_fraction in PARETO_FRACTIONS
    ]
    pareto = list(dict.fromkeys(swept))  # in a small set two fractions may be the same number of tiles
    return Results(arms=arms, pareto=pareto, outcomes={s: Outcome() for s in [*arms.values(), *pareto]})


def _answer_group(
    results: Results, predictor: Predictor, group: Group, scores: Mapping[str, TileScores]
) -> None:
    ratios, positions = predictor.model.ratios, group.positions
    choices = {
        setting: at_threshold(scores[setting.scores][positions], setting.threshold, ratios=ratios)
        for setting in results.outcomes
    }
    answerer = Answerer(predictor, group)
    answerer.prepare(choices.values())
    for setting, choice in choices.items():
        _record(results.outcomes[setting], predictor, answerer, choice)
    if group.first == 0:
        for arm, setting in results.arms.items():
            times = _time_first_tokens(predictor, group, choices[setting], routes=arm == "router")
            results.outcomes[setting].first_token_ms[:] = times
    results.questions.extend(group.questions)
    full, routed = choices[results.arms["full"]], choices[results.arms["router"]]
    results.examples.extend(_examples(group, answerer, full=full, routed=routed))


def _record(outcome: Outcome, predictor: Predictor, answerer: Answerer, ratios: Ratios) -> None:
    outcome.tokens += vision_tokens(ratios, num_patches=predictor.model.vision.num_patches)
    outcome.correct += answerer.correct(ratios)


def _downsample(predictor: Predictor, folder: Path, *, budget: float, track: Track) -> Outcome:
    """Answer at full tokens with images of fewer tiles."""
    sizes = [[(image.shape[2], image.shape[1]) for image in s.images] for s in read_samples(folder)]
    tilings = baselines.shrunken_tilings(sizes, predictor.tiling, budget=budget)
    shrunk = (tile_sample(s, t) for s, t in zip(read_samples(folder), tilings, strict=True))
    outcome = Outcome()
    for group in track(read_groups(predictor, shrunk), "downsampled", count_groups(folder)):
        ratios = [torch.full((len(f),), predictor.model.ratios[0]) for f in group.features]
        _record(outcome, predictor, Answerer(predictor, group), ratios)
        if group.first == 0:
            outcome.first_token_ms += _time_first_tokens(predictor, group, ratios, routes=False)
    return outcome


def _examples(group: Group, answerer: Answerer, *, full: Ratios, routed: Ratios) -> Iterator[RoutedExample]:
    """Pick questions about single images of several tiles, one per image."""
    seen: set[int] = set()
    for question, full_answer, router_answer in zip(
        group.questions, answerer(full), answerer(routed), strict=True
    ):
        index = question.sample - group.first
        sample = group.samples[index]
        is_shown = len(sample.tiles) >= EXAMPLE_TILES and len(sample.tiles_per_image) == 1
        if len(seen) == EXAMPLES_PER_GROUP or index in seen or not is_shown:
            continue
        seen.add(index)
        spent = [
            kept / ratio for kept, ratio in zip(full[index].tolist(), routed[index].tolist(), strict=True)
        ]
        yield RoutedExample(
            sample=question.sample,
            ratios=routed[index].tolist(),
            token_fraction=sum(spent) / len(spent),
            question=question.text,
            expected=question.expected,
            full_answer=full_answer,
            router_answer=router_answer,
        )


def _time_first_tokens(predictor: Predictor, group: Group, ratios: Ratios, *, routes: bool) -> list[float]:
    """Time tiles -> first answer token for single samples, in milliseconds, after one warm-up run."""
    times = []
    samples = list(zip(group.samples, ratios, strict=True))[:TIMED_SAMPLES]
    for sample, choice in [samples[0], *samples]:
        start = time.perf_counter()
        predictor.first_token(sample, choice, routes=routes)
        times.append((time.perf_counter() - start) * 1000)
    return times[1:]


def _report(
    predictor: Predictor, folder: Path, results: Results, arms: Mapping[str, Outcome], *, seed: int
) -> dict[str, Any]:
    skills = [q.skill for q in results.questions]
    scores = Scores(
        sample=np.array([q.sample for q in results.questions]),
        skill=np.array(skills),
        correct={arm: np.array(outcome.correct) for arm, outcome in arms.items()},
    )
    tables = accuracy_tables(scores, seed=seed)
    full_tokens = sum(arms["full"].tokens)
    return {
        "model": str(predictor.folder),
        "dataset": str(folder),
        "num_samples": len(arms["full"].tokens),
        "seed": seed,
        "arms": {
            arm: {
                "vision_tokens_per_image": round(float(np.mean(outcome.tokens)), 3),
                "token_fraction": round(sum(outcome.tokens) / full_tokens, 5),
                **tables[arm],
                "first_token_ms": round(float(np.median(outcome.first_token_ms)), 3),
            }
            for arm, outcome in arms.items()
        },
        "pareto": [
            {
                "arm": setting.scores,
                "threshold": setting.threshold if math.isfinite(setting.threshold) else None,
                "token_fraction": round(sum(results.outcomes[setting].tokens) / full_tokens, 5),
                "accuracy_mean": accuracy_by_skill(skills, results.outcomes[setting].correct)["mean"],
            }
            for setting in results.pareto
        ],
    }
