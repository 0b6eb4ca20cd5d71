"""Compare the router with other ways to spend its vision tokens: the arms of `report.json`.

Most arms are scores: tiles with the highest scores are compressed first, as many as the router compresses.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vico_pl.data.collate import collate
from vico_pl.data.shards.inspect import read_samples
from vico_pl.data.tiling import Size, TilingConfig, count_tiles, tile_sample
from vico_pl.evaluation.metrics import accuracy_by_skill, accuracy_tables
from vico_pl.evaluation.questions import (
    EvalQuestion,
    Group,
    Ratios,
    answer_folder,
    answer_group,
    folder_groups,
    has_questions,
)
from vico_pl.inference.predictor import Predictor
from vico_pl.model.reference import FrozenReference
from vico_pl.model.router import (
    NEVER,
    RoutingRule,
    at_threshold,
    routing_scores,
    threshold_for,
    vision_tokens,
)
from vico_pl.stages.router import tile_loss_ratios

PARETO_FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 1.0)  # of tiles compressed
TIMED_SAMPLES = 12
EXAMPLES_PER_GROUP = 2
EXAMPLE_TILES = 4  # at least, thumbnail included: fewer show little of a choice

TileScores = list[Float[Tensor, " _"]]  # one entry per sample


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

    question: EvalQuestion
    ratios: list[int]
    token_fraction: float
    full_answer: str
    router_answer: str


def evaluate(
    predictor: Predictor, folder: Path, *, seed: int, num_examples: int = 8
) -> tuple[dict[str, Any], list[RoutedExample]]:
    """Evaluate all arms at the router's budget; return the content of report.json and examples to show.

    Raises:
        ValueError: no calibrated router, or nothing to evaluate on.
    """
    if predictor.rule is None:
        raise ValueError(f"{predictor.folder}: the model is not calibrated; run 'vico calibrate' on it first")
    if not has_questions(read_samples(folder)):
        raise ValueError(f"{folder}: no question with a skill; see data/README.md for evaluation sets")
    scores = _score_tiles(predictor, folder, seed=seed)
    if not sum(map(len, scores["router"])):
        raise ValueError(f"{folder}: no image to evaluate on")
    settings, pareto = _arm_settings(scores, predictor.rule.threshold), _pareto_settings(scores)
    full, routed, model = settings["full"], settings["router"], predictor.model
    choices = {
        setting: at_threshold(scores[setting.scores], setting.threshold, ratios=model.ratios)
        for setting in [*settings.values(), *pareto]
    }
    outcomes = {
        setting: Outcome(vision_tokens(ratios, num_patches=model.vision.num_patches))
        for setting, ratios in choices.items()
    }
    questions: list[EvalQuestion] = []
    examples: list[RoutedExample] = []
    for group, answered in answer_folder(predictor, folder, list(choices.values())):
        answers = dict(zip(choices, answered, strict=True))
        for setting, given in answers.items():
            outcomes[setting].correct += group.grade(given)
        if group.first == 0:
            for arm, setting in settings.items():
                ratios = choices[setting][group.positions]
                times = _time_first_tokens(predictor, group, ratios, routes=arm == "router")
                outcomes[setting].first_token_ms = times
        questions += group.questions
        examples += _examples(group, choices[full], choices[routed], answers[full], answers[routed])
    arms = {arm: outcomes[setting] for arm, setting in settings.items()}
    budget = sum(arms["router"].tokens) / sum(arms["full"].tokens)
    arms["downsample"] = _downsample(predictor, folder, budget=budget)
    report = {"model": str(predictor.folder), "dataset": str(folder), "num_samples": len(arms["full"].tokens)}
    figures = _figures(questions, arms, {setting: outcomes[setting] for setting in pareto}, seed=seed)
    return {**report, "seed": seed, **figures}, examples[:num_examples]


def _score_tiles(predictor: Predictor, folder: Path, *, seed: int) -> dict[str, TileScores]:
    """Score the tiles of the whole set; all but the router's scores become ranks."""
    scores: dict[str, TileScores] = {"router": [], "random": [], "pixel_detail": [], "oracle": []}
    for group in folder_groups(predictor, folder, title="scoring tiles"):
        scores["router"] += router_scores(predictor, group)
        scores["random"] += random_scores(group, seed=seed)
        scores["pixel_detail"] += pixel_detail_scores(group)
        scores["oracle"] += oracle_scores(predictor, group)
    if not scores["router"]:
        return scores
    return {arm: of_set if arm == "router" else ranked(of_set) for arm, of_set in scores.items()}


@torch.no_grad()
def router_scores(predictor: Predictor, group: Group) -> TileScores:
    """Return the scores that the calibrated rule compares with its threshold."""
    rule = predictor.rule or RoutingRule(threshold=NEVER)
    return [routing_scores(predictor.router_logits(features), rule) for features in group.features]


def random_scores(group: Group, *, seed: int) -> TileScores:
    """Draw uniform noise: a router without knowledge."""
    generator = torch.Generator().manual_seed(seed + group.first)
    return [torch.rand(len(sample.tiles), generator=generator) for sample in group.samples]


def pixel_detail_scores(group: Group) -> TileScores:
    """Return minus the mean absolute difference of neighbouring pixels: tiles with few edges come first."""
    return [
        -(tiles.diff(dim=3).abs().mean((1, 2, 3)) + tiles.diff(dim=2).abs().mean((1, 2, 3)))
        for tiles in (sample.tiles.float() for sample in group.samples)
    ]


@torch.no_grad()
def oracle_scores(predictor: Predictor, group: Group) -> TileScores:
    """Return minus the loss ratio of each tile, which uses the expected answers.

    The model at full tokens is its own reference.
    """
    chat = replace(predictor.chat, config=replace(predictor.chat.config, max_tokens=sys.maxsize))
    batch = collate([chat.encode(sample) for sample in group.samples]).to(predictor.device)
    reference = FrozenReference(predictor.model)
    harm = tile_loss_ratios(
        predictor.model, reference, batch, torch.cat(group.features), mode="tile", epsilon=1e-6
    )
    return list((-harm).cpu().split([len(sample.tiles) for sample in group.samples]))


def ranked(scores: TileScores) -> TileScores:
    """Replace scores by their ranks over all tiles, 1 / n to 1: without ties any number can be chosen.

    Of equal scores the one of the earlier tile ranks higher.
    """
    flat = torch.cat(scores)
    ranks = torch.empty(len(flat), dtype=torch.float64)
    ranks[flat.argsort(descending=True, stable=True)] = torch.arange(len(flat), 0, -1).double() / len(flat)
    return list(ranks.split([len(of_sample) for of_sample in scores]))


def _arm_settings(scores: Mapping[str, TileScores], threshold: float) -> dict[str, Setting]:
    """Give every arm the threshold at which it compresses as many tiles as the router does."""
    fraction = float((torch.cat(scores["router"]) >= threshold).double().mean())
    return {
        "full": Setting("router", math.inf),
        "all_compressed": Setting("router", 0.0),
        **{arm: Setting(arm, threshold_for(scores[arm], compressed_fraction=fraction)) for arm in scores},
        "router": Setting("router", threshold),
    }


def _pareto_settings(scores: Mapping[str, TileScores]) -> list[Setting]:
    swept = [
        Setting(arm, threshold_for(of_set, compressed_fraction=fraction))
        for arm, of_set in scores.items()
        for fraction in PARETO_FRACTIONS
    ]
    return list(dict.fromkeys(swept))  # in a small set two fractions may be the same number of tiles


def _time_first_tokens(predictor: Predictor, group: Group, ratios: Ratios, *, routes: bool) -> list[float]:
    """Time tiles -> first answer token for single samples, in milliseconds, after one warm-up run."""
    times = []
    samples = list(zip(group.samples, ratios, strict=True))[:TIMED_SAMPLES]
    for sample, choice in [samples[0], *samples]:
        start = time.perf_counter()
        predictor.first_token(sample, choice, routes=routes)
        times.append((time.perf_counter() - start) * 1000)
    return times[1:]


def _examples(
    group: Group, full: Ratios, routed: Ratios, full_answers: Sequence[str], router_answers: Sequence[str]
) -> list[RoutedExample]:
    """Pick questions about single images of several tiles, one per image."""
    found: dict[int, RoutedExample] = {}
    for question, *answers in zip(group.questions, full_answers, router_answers, strict=True):
        place = question.sample
        sample = group.samples[place - group.first]
        is_shown = len(sample.tiles) >= EXAMPLE_TILES and len(sample.tiles_per_image) == 1
        if is_shown and place not in found:
            found[place] = RoutedExample(
                question=question,
                ratios=routed[place].tolist(),
                token_fraction=float((full[place].double() / routed[place]).mean()),
                full_answer=answers[0],
                router_answer=answers[1],
            )
    return list(found.values())[:EXAMPLES_PER_GROUP]


def _downsample(predictor: Predictor, folder: Path, *, budget: float) -> Outcome:
    """Answer at full tokens with images of fewer tiles."""
    sizes = [[(image.shape[2], image.shape[1]) for image in s.images] for s in read_samples(folder)]
    tilings = shrunken_tilings(sizes, predictor.tiling, budget=budget)
    shrunk = map(tile_sample, read_samples(folder), tilings)
    outcome = Outcome()
    for group in folder_groups(predictor, folder, title="downsampled", samples=shrunk):
        ratios = [torch.full((len(f),), predictor.model.ratios[0]) for f in group.features]
        (answers,) = answer_group(predictor, group, [ratios])
        outcome.tokens += vision_tokens(ratios, num_patches=predictor.model.vision.num_patches)
        outcome.correct += group.grade(answers)
        if group.first == 0:
            outcome.first_token_ms = _time_first_tokens(predictor, group, ratios, routes=False)
    return outcome


def shrunken_tilings(
    samples: Sequence[Sequence[Size]], tiling: TilingConfig, *, budget: float
) -> list[TilingConfig]:
    """Give samples fewer tiles, so that full tokens for all cost at most `budget` of the original.

    Every sample gets the same fraction of its tiles, rounded down to possible grids, but at least one tile
    per image. The first samples that can use the rest of the budget get it.
    """
    full = [count_tiles(sizes, tiling) for sizes in samples]
    chosen = looser = [(count, tiling) for count in full]
    for percent in range(100, -1, -2):
        looser, fraction = chosen, percent / 100
        chosen = [
            _shrink(sizes, tiling, fraction * count) for sizes, count in zip(samples, full, strict=True)
        ]
        spare = budget * sum(full) - sum(count for count, _ in chosen)
        if spare >= 0:
            break
    for place, (fewer, more) in enumerate(zip(chosen, looser, strict=True)):
        if 0 < more[0] - fewer[0] <= spare:
            chosen[place] = more
            spare -= more[0] - fewer[0]
    return [smaller for _, smaller in chosen]


def _shrink(sizes: Sequence[Size], tiling: TilingConfig, limit: float) -> tuple[int, TilingConfig]:
    """Return the largest number of tiles within the limit, but at least one per image, and its tiling."""
    for max_tiles in range(tiling.max_tiles, 0, -1):
        smaller = replace(tiling, min_tiles=min(tiling.min_tiles, max_tiles), max_tiles=max_tiles)
        count = count_tiles(sizes, smaller)
        if count <= limit or max_tiles == 1:
            break
    return count, smaller


def _figures(
    questions: Sequence[EvalQuestion],
    arms: Mapping[str, Outcome],
    pareto: Mapping[Setting, Outcome],
    *,
    seed: int,
) -> dict[str, Any]:
    """Return what report.json says of the arms and of the swept thresholds."""
    images, skills = [q.sample for q in questions], [q.skill for q in questions]
    correct = {arm: outcome.correct for arm, outcome in arms.items()}
    tables = accuracy_tables(images, skills, correct, seed=seed)
    full_tokens = sum(arms["full"].tokens)
    return {
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
                "token_fraction": round(sum(outcome.tokens) / full_tokens, 5),
                "accuracy_mean": accuracy_by_skill(skills, outcome.correct)["mean"],
            }
            for setting, outcome in pareto.items()
        ],
    }
