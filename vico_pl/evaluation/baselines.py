"""Other ways to spend the router's vision tokens: scores of tiles, smaller images, arms without training.

Tiles with the highest scores are compressed first.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vico_pl.data.collate import collate
from vico_pl.data.tiling import Size, TilingConfig, count_tiles
from vico_pl.evaluation.answering import (
    Group,
    Ratios,
    encode_conversation,
    full_tokens,
    max_new_tokens,
    score_answers,
)
from vico_pl.evaluation.questions import Measure, QuestionSet
from vico_pl.evaluation.untrained import check_fastv, fastv_answers, with_pooling
from vico_pl.inference.predictor import Predictor
from vico_pl.model.reference import FrozenReference
from vico_pl.model.router import NEVER, RoutingRule, routing_scores, vision_tokens
from vico_pl.stages.router import tile_loss_ratios
from vico_pl.types import TiledSample

UNTRAINED = ("average_pooling", "fastv")  # arms that are evaluated only when named
AT_BUDGET = ("downsample", *UNTRAINED)  # arms that spend what the router does, but not by choosing tiles
TIMED_SAMPLES = 12

TileScores = list[Float[Tensor, " _"]]  # one entry per sample


@dataclass
class Outcome:
    """Cost and scores of one setting."""

    tokens: list[int] = field(default_factory=list)  # vision tokens of each sample
    scores: list[float] = field(default_factory=list)  # of each question
    first_token_ms: list[float] = field(default_factory=list)  # of some samples


def score_tiles(arm: str, predictor: Predictor, group: Group, *, seed: int) -> TileScores:
    """Score the tiles of a group as an arm does."""
    if arm == "random":
        return random_scores(group, seed=seed)
    if arm == "pixel_detail":
        return pixel_detail_scores(group)
    return oracle_scores(predictor, group) if arm == "oracle" else router_scores(predictor, group)


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
    """Return minus the loss ratio of each tile, which uses the responses of the conversation.

    The model at full tokens is its own reference.
    """
    batch = collate([encode_conversation(predictor, sample) for sample in group.samples])
    batch = batch.to(predictor.device)
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


def check_untrained(questions: QuestionSet, arms: Sequence[str]) -> None:
    """Check that a model and a set allow the arms that need no training.

    Raises:
        ValueError: the set has no answers to score, or FastV does not know the language model.
    """
    for arm in (arm for arm in UNTRAINED if arm in arms):
        if questions.measure != Measure.SCORES:
            needed = f"arm '{arm}' needs answers to score"
            raise ValueError(f"{questions.name}: {needed}; here one measures {questions.measure} (--metric)")
        if arm == "fastv":
            check_fastv(questions.predictor.model)


def at_budget(
    questions: QuestionSet,
    arm: str,
    routed: Ratios,
    outcomes: Mapping[str, Outcome],
    *,
    reference: Predictor | None,
) -> Outcome:
    """Answer with an arm that spends what the router does, but not by choosing tiles."""
    predictor, full = questions.predictor, outcomes["full"].tokens
    budget = sum(outcomes["router"].tokens) / sum(full)
    if arm == "fastv":
        return _fastv(questions, full, keep_fraction=budget)
    if arm == "average_pooling":
        pooled = replace(predictor, model=with_pooling(predictor.model))
        return _ask(
            replace(questions, predictor=pooled), routed, title="average pooling", reference=reference
        )
    sizes = [[(i.shape[2], i.shape[1]) for i in sample.images] for sample, _ in questions.samples()]
    tilings = shrunken_tilings(sizes, predictor.tiling, budget=budget)
    return _ask(questions, None, title="downsampled", tilings=tilings, reference=reference)


def _ask(
    questions: QuestionSet, chosen: Ratios | None, *, reference: Predictor | None, **reading: Any
) -> Outcome:
    """Answer at chosen ratios, or at full tokens."""
    predictor, outcome = questions.predictor, Outcome()
    for group in questions.groups(**reading):
        ratios = full_tokens(group) if chosen is None else chosen[group.positions]
        (results,) = questions.grade(group, [ratios], reference=reference)
        outcome.tokens += vision_tokens(ratios, num_patches=predictor.model.vision.num_patches)
        outcome.scores += [result.score for result in results]
        if group.first == 0:
            first_token = partial(predictor.first_token, routes=chosen is not None)
            outcome.first_token_ms = time_first_tokens(first_token, group, ratios)
    return outcome


def _fastv(questions: QuestionSet, full: Sequence[int], *, keep_fraction: float) -> Outcome:
    """Answer by FastV, which keeps the same fraction of every sample's full tokens."""
    predictor, outcome = questions.predictor, Outcome([round(keep_fraction * count) for count in full])
    ask = partial(fastv_answers, predictor, keep_fraction=keep_fraction)

    def first_token(sample: TiledSample, _: Any) -> str:
        return ask(sample, sample.turns[0].text, max_new_tokens=1)

    for group in questions.groups(title="FastV"):
        answers = []
        for question in group.questions:
            place, limit = question.sample - group.first, max_new_tokens(predictor, question)
            known = group.features[place]
            answers.append(ask(group.samples[place], question.prompt, max_new_tokens=limit, features=known))
        (results,) = score_answers(group, [answers])
        outcome.scores += [result.score for result in results]
        if group.first == 0:
            outcome.first_token_ms = time_first_tokens(first_token, group, full_tokens(group))
    return outcome


def time_first_tokens(
    first_token: Callable[[TiledSample, Any], object], group: Group, ratios: Ratios
) -> list[float]:
    """Time tiles -> first answer token for single samples, in milliseconds, after one warm-up run."""
    times = []
    samples = list(zip(group.samples, ratios, strict=True))[:TIMED_SAMPLES]
    for sample, choice in [samples[0], *samples]:
        start = time.perf_counter()
        first_token(sample, choice)
        times.append((time.perf_counter() - start) * 1000)
    return times[1:]
