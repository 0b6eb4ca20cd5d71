"""Hold the router against other ways to spend the same vision tokens: the arms of `report.json`."""

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
from vico_pl.evaluation.baselines import (
    TileScores,
    oracle_scores,
    pixel_detail_scores,
    random_scores,
    ranked,
    router_scores,
    shrunken_tilings,
)
from vico_pl.evaluation.metrics import Scores, accuracy_tables
from vico_pl.evaluation.questions import (
    Answerer,
    EvalQuestion,
    Group,
    Track,
    accuracy_by_skill,
    at_threshold,
    count_groups,
    has_questions,
    read_groups,
    silent,
    threshold_for,
    vision_tokens,
)
from vico_pl.inference.predictor import Predictor

PARETO_FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 1.0)  # of tiles compressed
TIMED_SAMPLES = 12
EXAMPLES_PER_GROUP = 2
EXAMPLE_TILES = 4  # at least, thumbnail counted: fewer show little of a choice


class Setting(NamedTuple):
    """A way to choose tiles: compress those whose score reaches a threshold."""

    scores: str  # router, random, pixel_detail or oracle
    threshold: float


@dataclass
class Outcome:
    """What one setting spent and got right."""

    tokens: list[int] = field(default_factory=list)  # vision tokens of each sample
    correct: list[bool] = field(default_factory=list)  # of each question
    first_token_ms: list[float] = field(default_factory=list)  # of some samples


@dataclass(frozen=True, kw_only=True)
class RoutedExample:
    """One question for the gallery: how its image was routed and what was answered."""

    sample: int  # position of its sample in the set
    ratios: list[int]
    question: str
    expected: str
    full_answer: str
    router_answer: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything measured on an evaluation set, filled group by group."""

    arms: dict[str, Setting]
    pareto: list[Setting]
    outcomes: dict[Setting, Outcome]
    questions: list[EvalQuestion] = field(default_factory=list)
    examples: list[RoutedExample] = field(default_factory=list)

    def of_arms(self) -> dict[str, Outcome]:
        """Return the outcome of each arm."""
        return {arm: self.outcomes[setting] for arm, setting in self.arms.items()}


def evaluate(
    predictor: Predictor, folder: Path, *, seed: int, track: Track = silent, num_examples: int = 8
) -> tuple[dict[str, Any], list[RoutedExample]]:
    """Evaluate all arms at the router's budget; returns the report (contract C7) and examples to show.

    Raises:
        ValueError: no calibrated router, or nothing to evaluate on.
    """
    if predictor.rule is None:
        raise ValueError(f"{predictor.folder}: the model is not calibrated; run 'vico calibrate' on it first")
    if not has_questions(read_samples(folder)):
        raise ValueError(f"{folder}: no question with a skill; see data/README.md for evaluation sets")
    num_groups = count_groups(folder)
    groups = track(read_groups(predictor, predictor.samples(folder)), "scoring tiles", num_groups)
    scores = _score_tiles(predictor, groups, seed=seed)
    if not sum(map(len, scores["router"])):
        raise ValueError(f"{folder}: no image to evaluate on")
    results = _no_results(scores, predictor.rule.threshold)
    for group in track(read_groups(predictor, predictor.samples(folder)), "answering", num_groups):
        _answer_group(results, predictor, group, scores)
    arms = results.of_arms()
    budget = sum(arms["router"].tokens) / sum(arms["full"].tokens)
    tilings = shrunken_tilings(_image_sizes(folder), predictor.tiling, budget=budget)
    shrunk = (tile_sample(s, t) for s, t in zip(read_samples(folder), tilings, strict=True))
    arms["downsample"] = _answer_at_full_tokens(
        predictor, track(read_groups(predictor, shrunk), "downsampled", num_groups)
    )
    return _report(predictor, folder, results, arms, seed=seed), results.examples[:num_examples]


def _score_tiles(predictor: Predictor, groups: Iterable[Group], *, seed: int) -> dict[str, TileScores]:
    """Score the tiles of the whole set; all but the router's scores become ranks."""
    scores: dict[str, TileScores] = {"router": [], "random": [], "pixel_detail": [], "oracle": []}
    for group in groups:
        scores["router"] += router_scores(predictor, group)
        scores["random"] += random_scores(group, seed=seed)
        scores["pixel_detail"] += pixel_detail_scores(group)
        scores["oracle"] += oracle_scores(predictor, group)
    return {
        arm: of_set if arm == "router" or not of_set else ranked(of_set) for arm, of_set in scores.items()
    }


def _no_results(scores: Mapping[str, TileScores], threshold: float) -> Results:
    """Give every arm the threshold at which it compresses as many tiles as the router does."""
    fraction = float((torch.cat(scores["router"]) >= threshold).double().mean())
    arms = {
        "full": Setting("router", math.inf),
        "all_compressed": Setting("router", 0.0),
        **{arm: Setting(arm, threshold_for(scores[arm], compressed_fraction=fraction)) for arm in scores},
        "router": Setting("router", threshold),
    }
    swept = [
        Setting(arm, threshold_for(of_set, compressed_fraction=share))
        for arm, of_set in scores.items()
        for share in PARETO_FRACTIONS
    ]
    pareto = list(dict.fromkeys(swept))  # in a small set two shares may be the same number of tiles
    return Results(arms=arms, pareto=pareto, outcomes={s: Outcome() for s in [*arms.values(), *pareto]})


def _answer_group(
    results: Results, predictor: Predictor, group: Group, scores: Mapping[str, TileScores]
) -> None:
    members = slice(group.first, group.first + len(group.samples))
    choices = {
        setting: at_threshold(
            scores[setting.scores][members], setting.threshold, ratios=predictor.model.ratios
        )
        for setting in results.outcomes
    }
    answerer = Answerer(predictor, group)
    answerer.prepare(choices.values())
    for setting, ratios in choices.items():
        _record(results.outcomes[setting], predictor, answerer, ratios)
    if group.first == 0:
        for arm, setting in results.arms.items():
            times = _time_first_tokens(predictor, group, choices[setting], routes=arm == "router")
            results.outcomes[setting].first_token_ms[:] = times
    results.questions.extend(group.questions)
    results.examples.extend(_examples(results, group, answerer, choices))


def _record(
    outcome: Outcome, predictor: Predictor, answerer: Answerer, ratios: Sequence[Int64[Tensor, " _"]]
) -> None:
    outcome.tokens += vision_tokens(ratios, num_patches=predictor.model.vision.num_patches)
    outcome.correct += answerer.correct(ratios)


def _answer_at_full_tokens(predictor: Predictor, groups: Iterable[Group]) -> Outcome:
    outcome = Outcome()
    for group in groups:
        ratios = [torch.full((len(f),), predictor.model.ratios[0]) for f in group.features]
        _record(outcome, predictor, Answerer(predictor, group), ratios)
        if group.first == 0:
            outcome.first_token_ms += _time_first_tokens(predictor, group, ratios, routes=False)
    return outcome


def _image_sizes(folder: Path) -> list[list[tuple[int, int]]]:
    return [[(image.shape[2], image.shape[1]) for image in s.images] for s in read_samples(folder)]


def _examples(
    results: Results, group: Group, answerer: Answerer, choices: Mapping[Setting, Sequence[Tensor]]
) -> Iterator[RoutedExample]:
    """Pick questions about single images of several tiles, one per image."""
    routed = choices[results.arms["router"]]
    full_answers, router_answers = answerer(choices[results.arms["full"]]), answerer(routed)
    seen: set[int] = set()
    for question, full_answer, router_answer in zip(
        group.questions, full_answers, router_answers, strict=True
    ):
        place = question.sample - group.first
        sample = group.samples[place]
        is_shown = len(sample.tiles) >= EXAMPLE_TILES and len(sample.tiles_per_image) == 1
        if len(seen) == EXAMPLES_PER_GROUP or place in seen or not is_shown:
            continue
        seen.add(place)
        yield RoutedExample(
            sample=question.sample,
            ratios=routed[place].tolist(),
            question=question.text,
            expected=question.expected,
            full_answer=full_answer,
            router_answer=router_answer,
        )


@torch.no_grad()
def _time_first_tokens(
    predictor: Predictor, group: Group, ratios: Sequence[Int64[Tensor, " _"]], *, routes: bool
) -> list[float]:
    """Time tiles -> first answer token for single samples, in milliseconds; one more run warms up."""
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
