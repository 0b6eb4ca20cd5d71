"""Compare the router with other ways to spend its vision tokens: the arms of `report.json`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from vico_pl.callbacks.records import software
from vico_pl.evaluation.answering import (
    EvalQuestion,
    Group,
    Ratios,
    Result,
    full_tokens,
)
from vico_pl.evaluation.baselines import (
    AT_BUDGET,
    FASTV_LAYERS,
    GREEDY,
    Outcome,
    TileScores,
    at_budget,
    check_arms,
    ranked,
    score_tiles,
    time_first_tokens,
)
from vico_pl.evaluation.metrics import MEAN, mean_scores, score_tables
from vico_pl.evaluation.questions import Measure, QuestionSet
from vico_pl.evaluation.statistics import statistics_scores
from vico_pl.inference.predictor import Predictor
from vico_pl.model.connector import FULL_RATIO
from vico_pl.model.flops import head_width, language_costs
from vico_pl.model.router import at_thresholds, threshold_for, vision_tokens
from vico_pl.model.vlm import VisionLanguageModel

# Arms that choose tiles by a score, besides the router.
SCORED = ("random", "pixel_detail", "statistics", "oracle")
PARETO_FRACTIONS = tuple(step / 10 for step in range(11))  # of tiles compressed
SPOILT_PER_GROUP, EXAMPLES_PER_GROUP = 4, 2
EXAMPLE_TILES = 4  # at least, where routing spoils nothing: fewer show little of a choice


class Setting(NamedTuple):
    """A way to choose ratios: a tile gets the coarsest one whose threshold its score reaches."""

    scores: str  # router or one of SCORED
    thresholds: tuple[float, ...]  # of the coarser ratios, coarsest first; or one for all


@dataclass(frozen=True, kw_only=True)
class RoutedExample:
    """A question of the gallery: how its image was routed, and the results."""

    question: EvalQuestion
    ratios: list[int]
    token_fraction: float
    full: Result
    router: Result

    @property
    def loss(self) -> float:
        """What routing costs."""
        return self.full.score - self.router.score


class Answered(NamedTuple):
    """What a pass over a set found."""

    asked: list[EvalQuestion]
    text_tokens: list[int]  # of each question's prompt
    outcomes: dict[Setting, Outcome]
    reference: Outcome
    examples: list[RoutedExample]


def evaluate(
    questions: QuestionSet,
    *,
    seed: int,
    arms: Sequence[str] | None = None,
    reference: Predictor | None = None,
    num_examples: int = 8,
    command: str = "",
) -> tuple[dict[str, Any], list[RoutedExample]]:
    """Evaluate arms at the router's budget; return the content of report.json and examples to show.

    Without a calibrated router the arms are full tokens and all tiles compressed. `arms` names those to
    evaluate next to full tokens, without curves; `greedy_oracle`, `average_pooling` and `fastv` are evaluated
    only if named. `reference` is a further model, at full tokens, which retention is then relative to.
    `command` is kept in the report.

    Raises:
        ValueError: there is no such arm, the model or the set does not allow it, there is nothing to evaluate
            on, or nothing right at full tokens.
    """
    if reference is not None and reference.tiling.tile_size != questions.predictor.tiling.tile_size:
        sizes = f"{reference.tiling.tile_size} px, of the model {questions.predictor.tiling.tile_size}"
        raise ValueError(f"{reference.folder}: its tiles are of {sizes}; expected the same")
    check_arms(questions, arms or (), known=_known_arms(questions.predictor))
    scores = _score_tiles(questions, seed=seed, arms=arms)
    settings = _arm_settings(scores, questions.predictor, arms=arms)
    pareto = (
        _pareto_settings(scores, num_ratios=len(questions.predictor.model.ratios)) if arms is None else []
    )
    found = _answer(questions, scores, settings, pareto, reference=reference)
    outcomes = {arm: found.outcomes[setting] for arm, setting in settings.items()}
    if "router" in settings:
        thresholds, ratios = settings["router"].thresholds, questions.predictor.model.ratios
        routed = at_thresholds(scores["router"], thresholds, ratios=ratios)
        for arm in ("downsample",) if arms is None else [arm for arm in AT_BUDGET if arm in arms]:
            outcomes[arm] = at_budget(questions, arm, routed, outcomes, reference=reference)
    if reference is not None:
        outcomes["reference"] = found.reference
    num_records, measure = questions.num_records, questions.measure.value
    if reference is not None:
        measure = measure.replace("with full tokens", "with the reference at full tokens")
    report = {
        "model": str(questions.predictor.folder),
        "dataset": questions.name,
        "measure": measure,
        "num_samples": len(scores["random"]),
        "num_left_out": None if num_records is None else num_records - len(scores["random"]),
        "seed": seed,
        "reference": None if reference is None else str(reference.folder),
        "made_with": {"date": date.today().isoformat(), "command": command, **software()},
    }
    costs = {}
    for arm, outcome in outcomes.items():
        model = reference.model if reference is not None and arm == "reference" else questions.predictor.model
        seen = outcomes["full" if arm == "fastv" else arm]
        tokens = [[one.tokens[question.sample] for question in found.asked] for one in (seen, outcome)]
        costs[arm] = serving_cost(model, found.text_tokens, *tokens)
    curves = {setting: found.outcomes[setting] for setting in pareto}
    examples = sorted(found.examples, key=lambda example: -example.loss)[:num_examples]
    return {**report, **_figures(found.asked, outcomes, costs, curves, seed=seed)}, examples


def _known_arms(predictor: Predictor) -> list[str]:
    arms = ["full"] if len(predictor.model.ratios) == 1 else ["full", "all_compressed"]
    is_routed = predictor.rule is not None and predictor.model.router is not None
    return [*arms, *(["router", *SCORED, GREEDY, *AT_BUDGET] if is_routed else [])]


@torch.no_grad()
def _score_tiles(questions: QuestionSet, *, seed: int, arms: Sequence[str] | None) -> dict[str, TileScores]:
    """Score the tiles of the whole set as the arms do; all but the router's scores become ranks."""
    predictor = questions.predictor
    possible = ["router", *SCORED] if "router" in _known_arms(predictor) else [*SCORED]
    if len(predictor.model.ratios) == 1:
        possible = ["random"]
    needed = possible if arms is None else ["router", "random", *arms]
    fitted = ["oracle"] if "statistics" in needed else []  # to whose ranks statistics are fitted
    scores: dict[str, TileScores] = {arm: [] for arm in (*possible, GREEDY) if arm in {*needed, *fitted}}
    for group in questions.checked_groups():
        for arm, of_set in scores.items():
            if arm != "statistics":
                of_set += score_tiles(arm, predictor, group, seed=seed)
    if "statistics" in scores:
        scores["statistics"] = statistics_scores(questions, ranked(scores["oracle"]), seed=seed)
    return {arm: of_set if arm == "router" else ranked(of_set) for arm, of_set in scores.items()}


def _arm_settings(
    scores: Mapping[str, TileScores], predictor: Predictor, *, arms: Sequence[str] | None
) -> dict[str, Setting]:
    """Give every arm the thresholds at which it gives as many tiles as the router does to each ratio."""
    any_scores = next(iter(scores))
    settings = {"full": Setting(any_scores, (math.inf,))}
    if len(predictor.model.ratios) > 1:
        settings["all_compressed"] = Setting(any_scores, (0.0,))
    if "router" in scores and predictor.rule is not None:
        threshold = predictor.rule.threshold
        fractions = (torch.cat(scores["router"]) >= threshold).double().mean(0).tolist()
        for arm, of_set in scores.items():
            settings[arm] = Setting(arm, _thresholds_for(of_set, fractions))
        settings["router"] = Setting("router", (threshold,))
    needed = ["full", *(arms or ()), *(["router"] if {*AT_BUDGET} & {*(arms or ())} else ())]
    return {arm: s for arm, s in settings.items() if arms is None or arm in needed}


def _pareto_settings(scores: Mapping[str, TileScores], *, num_ratios: int) -> list[Setting]:
    """Sweep `PARETO_FRACTIONS` of the router's scores: a tile has one per coarser ratio.

    Other arms have a score per tile. A fraction f of the tiles is compressed, f of these go on to the second
    coarser ratio, and so on.
    """
    swept = [
        Setting(
            arm,
            _thresholds_for(of_set, [f] if arm == "router" else [f**n for n in range(num_ratios - 1, 0, -1)]),
        )
        for arm, of_set in scores.items()
        for f in PARETO_FRACTIONS
        if num_ratios > 1
    ]
    return list(dict.fromkeys(swept))  # in a small set two fractions may be the same number of tiles


def _thresholds_for(scores: TileScores, fractions: Sequence[float]) -> tuple[float, ...]:
    return tuple(threshold_for(scores, compressed_fraction=fraction) for fraction in fractions)


def _answer(
    questions: QuestionSet,
    scores: Mapping[str, TileScores],
    settings: Mapping[str, Setting],
    pareto: Iterable[Setting],
    *,
    reference: Predictor | None,
) -> Answered:
    """Ask every question in every setting, group by group."""
    model = questions.predictor.model
    choices = {
        setting: at_thresholds(scores[setting.scores], setting.thresholds, ratios=model.ratios)
        for setting in [*settings.values(), *pareto]
    }
    tokens = {s: vision_tokens(chosen, num_patches=model.vision.num_patches) for s, chosen in choices.items()}
    outcomes = {setting: Outcome(of_setting) for setting, of_setting in tokens.items()}
    found = Answered([], [], outcomes, Outcome(tokens[settings["full"]]), [])
    for group in questions.groups(title="answering"):
        chosen = {setting: ratios[group.positions] for setting, ratios in choices.items()}
        graded = questions.grade(group, [*chosen.values()], reference=reference)
        results = dict(zip(chosen, graded, strict=True))
        for setting, of_setting in results.items():
            outcomes[setting].scores += [result.score for result in of_setting]
        if group.first == 0:
            for arm, setting in settings.items():
                first_token = partial(questions.predictor.first_token, routes=arm == "router")
                outcomes[setting].first_token_ms = time_first_tokens(first_token, group, chosen[setting])
        if reference is not None:
            _ask_reference(replace(questions, predictor=reference), group, found.reference)
        if "router" in settings:
            pair = results[settings["full"]], results[settings["router"]]
            found.examples.extend(_examples(group, chosen[settings["router"]], *pair))
        found.asked.extend(group.questions)
        found.text_tokens.extend(_text_tokens(questions.predictor, group))
    return found


def _ask_reference(questions: QuestionSet, group: Group, outcome: Outcome) -> None:
    """Score another model at full tokens; it agrees with itself."""
    reference, full = questions.predictor, full_tokens(group)
    if questions.measure == Measure.SCORES:
        own = replace(group, features=[reference.encode(sample.tiles) for sample in group.samples])
        (results,) = questions.grade(own, [full])
        outcome.scores += [result.score for result in results]
    else:
        outcome.scores += [1.0] * len(group.questions)
    if group.first == 0:
        first_token = partial(reference.first_token, routes=False)
        outcome.first_token_ms = time_first_tokens(first_token, group, full)


def _examples(
    group: Group, routed: Ratios, full: Sequence[Result], router: Sequence[Result]
) -> list[RoutedExample]:
    """Pick questions about single images, one per image: what routing spoils, and some of several tiles."""
    found: dict[int, RoutedExample] = {}
    for question, *results in zip(group.questions, full, router, strict=True):
        sample = group.samples[question.sample - group.first]
        ratios = routed[question.sample - group.first]
        if len(sample.tiles_per_image) != 1:
            continue
        example = RoutedExample(
            question=question,
            ratios=ratios.tolist(),
            token_fraction=float((FULL_RATIO / ratios.double()).mean()),
            full=results[0],
            router=results[1],
        )
        if question.sample not in found or example.loss > found[question.sample].loss:
            found[question.sample] = example
    spoilt = [example for example in found.values() if example.loss > 0]
    good = [e for e in found.values() if e.loss <= 0 and len(e.ratios) >= EXAMPLE_TILES]
    return sorted(spoilt, key=lambda example: -example.loss)[:SPOILT_PER_GROUP] + good[:EXAMPLES_PER_GROUP]


def _text_tokens(predictor: Predictor, group: Group) -> list[int]:
    """Return how many tokens of each question's prompt are text; the others are one placeholder per tile."""
    samples = [group.samples[question.sample - group.first] for question in group.questions]
    return [
        len(predictor.encode_prompt(sample, question.prompt).input_ids) - len(sample.tiles)
        for sample, question in zip(samples, group.questions, strict=True)
    ]


def serving_cost(
    model: VisionLanguageModel, text_tokens: Sequence[int], seen: Sequence[int], kept: Sequence[int]
) -> dict[str, float]:
    """Return what the prompt of a question costs on average, without the vision encoder.

    `seen` and `kept` are the vision tokens of each prompt in the layers before and after FastV drops some.
    """
    per_token, per_pair, flops = language_costs(model)  # the last: of the logits
    config, cached = model.language.config, 0.0
    early = min(1, FASTV_LAYERS / config.num_hidden_layers)
    for share, vision in ((early, seen), (1 - early, kept)):
        lengths = np.add(text_tokens, vision)
        flops += share * float((per_token * lengths + per_pair * lengths * (lengths + 1) / 2).mean())
        cached += share * float(lengths.mean())
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    num_bytes = cached * 2 * config.num_hidden_layers * heads * head_width(config) * model.head.element_size()
    return {"prefill_gflops": round(flops / 1e9, 6), "kv_cache_mib": round(num_bytes / 2**20, 6)}


def _figures(
    questions: Sequence[EvalQuestion],
    arms: Mapping[str, Outcome],
    costs: Mapping[str, dict[str, float]],
    pareto: Mapping[Setting, Outcome],
    *,
    seed: int,
) -> dict[str, Any]:
    """Return what report.json says of the arms and of the swept thresholds."""
    images, groups = [q.sample for q in questions], [q.group for q in questions]
    scores = {arm: outcome.scores for arm, outcome in arms.items()}
    baseline = "reference" if "reference" in arms else "full"
    tables = score_tables(images, groups, scores, baseline=baseline, seed=seed)
    full_tokens = sum(arms["full"].tokens)
    return {
        "arms": {
            arm: {
                "vision_tokens_per_image": round(float(np.mean(outcome.tokens)), 3),
                "token_fraction": round(sum(outcome.tokens) / full_tokens, 5),
                **tables[arm],
                "first_token_ms": round(float(np.median(outcome.first_token_ms)), 3),
                **costs[arm],
            }
            for arm, outcome in arms.items()
        },
        "pareto": [
            {
                "arm": setting.scores,
                "threshold": setting.thresholds[-1] if math.isfinite(setting.thresholds[-1]) else None,
                "token_fraction": round(sum(outcome.tokens) / full_tokens, 5),
                "accuracy_mean": mean_scores(groups, outcome.scores)[MEAN],
            }
            for setting, outcome in pareto.items()
        ],
    }
