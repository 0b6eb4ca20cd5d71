"""Other ways to spend the router's vision tokens: scores of tiles, smaller images, arms without training.

Tiles with the highest scores are compressed first.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache

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
from vico_pl.evaluation.greedy import greedy_scores
from vico_pl.evaluation.questions import Measure, QuestionSet
from vico_pl.inference.generate import Prompt
from vico_pl.inference.predictor import Predictor
from vico_pl.model.connector import FULL_RATIO
from vico_pl.model.flops import build_without_weights
from vico_pl.model.reference import FrozenReference
from vico_pl.model.router import NEVER, RoutingRule, routing_scores, vision_tokens
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.stages.labels import tile_loss_ratios
from vico_pl.tokens import TURN_END, token_id
from vico_pl.types import TiledSample

UNTRAINED = ("average_pooling", "fastv")  # arms that are evaluated only when named
GREEDY = "greedy_oracle"  # chooses tiles by a score and is also evaluated only when named
AT_BUDGET = ("downsample", *UNTRAINED)  # arms that spend what the router does, but not by choosing tiles
TIMED_SAMPLES = 12
FASTV_LAYERS = 2  # that see all vision tokens
FASTV_FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")  # whose layers run one after the other as below
_ATTENTION = "vico_fastv"  # the name by which transformers knows the function below

TileScores = list[Float[Tensor, "_ ..."]]  # one entry per sample


@dataclass
class Outcome:
    """Cost and scores of one setting."""

    tokens: list[int] = field(default_factory=list)  # vision tokens of each sample
    scores: list[float] = field(default_factory=list)  # of each question
    first_token_ms: list[float] = field(default_factory=list)  # of some samples


@torch.no_grad()
def score_tiles(arm: str, predictor: Predictor, group: Group, *, seed: int) -> TileScores:
    """Score the tiles of a group as an arm does.

    `random` draws uniform noise, a router without knowledge. `pixel_detail` is minus the mean absolute
    difference of neighbouring pixels. `oracle` is minus the loss ratio of each tile, the mean over coarser
    ratios, which uses the responses of the conversation; the model at full tokens is its own reference.
    `router` is what the calibrated rule compares with its threshold: a column per coarser ratio.
    `greedy_oracle`: see `greedy`.
    """
    if arm == "random":
        generator = torch.Generator().manual_seed(seed + group.first)
        return [torch.rand(len(sample.tiles), generator=generator) for sample in group.samples]
    if arm == "pixel_detail":
        return [
            -(tiles.diff(dim=3).abs().mean((1, 2, 3)) + tiles.diff(dim=2).abs().mean((1, 2, 3)))
            for tiles in (sample.tiles.float() for sample in group.samples)
        ]
    if arm == GREEDY:
        return greedy_scores(predictor, group)
    if arm == "oracle":
        model, encoded = predictor.model, [encode_conversation(predictor, one) for one in group.samples]
        batch, features = collate(encoded).to(predictor.device), torch.cat(group.features)
        reference = FrozenReference(model)
        harm = tile_loss_ratios(model, reference, batch, features, mode="tile", epsilon=1e-6)
        return list((-harm.mean(1)).cpu().split([len(sample.tiles) for sample in group.samples]))
    rule = predictor.rule or RoutingRule(threshold=NEVER)
    return [routing_scores(predictor.router_logits(features), rule) for features in group.features]


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


def check_arms(questions: QuestionSet, arms: Sequence[str], *, known: Sequence[str]) -> None:
    """Check that a model and a set allow the arms.

    Raises:
        ValueError: there is no such arm, or it needs no training and the set has no answers to score, or
            FastV does not know the language model's family.
    """
    if unknown := [arm for arm in arms if arm not in known]:
        folder = questions.predictor.folder
        raise ValueError(f"{folder}: no arm '{unknown[0]}'; this model has {', '.join(known)}")
    for arm in (arm for arm in UNTRAINED if arm in arms):
        if questions.measure != Measure.SCORES:
            needed = f"arm '{arm}' needs answers to score"
            raise ValueError(f"{questions.name}: {needed}; here one measures {questions.measure} (--metric)")
    base: Any = questions.predictor.model.language.base_model
    family = base.config.model_type
    if "fastv" in arms and (
        family not in FASTV_FAMILIES or any(getattr(x.self_attn, "sliding_window", None) for x in base.layers)
    ):
        expected = f"one of {', '.join(FASTV_FAMILIES)}, without sliding windows"
        raise ValueError(f"the language model is {family}; FastV needs {expected}")


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
        pooled = replace(questions, predictor=replace(predictor, model=with_pooling(predictor.model)))
        return _ask(pooled, routed, title="average pooling", reference=reference)
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


class PooledConnector(nn.Module):
    """Averages the tokens of a full connector over squares of their grid, to one per `ratio` patches."""

    def __init__(self, full: nn.Module, ratio: int) -> None:
        super().__init__()
        self.full, self.side = full, math.isqrt(ratio // FULL_RATIO)

    def forward(self, features: Float[Tensor, "T P C"]) -> Float[Tensor, "T N D"]:
        """Turn the patch features of each tile into its vision tokens."""
        tokens = self.full(features)
        grid = tokens.mT.unflatten(2, (math.isqrt(tokens.shape[1]), -1))  # T D rows columns
        return avg_pool2d(grid, self.side).flatten(2).mT


def with_pooling(model: VisionLanguageModel) -> VisionLanguageModel:
    """Return a model of the same weights that averages full vision tokens where this one compresses."""
    pooled, full = build_without_weights(model.spec).eval(), model.connectors.by_ratio[str(FULL_RATIO)]
    pooled.vision, pooled.language, pooled.router = model.vision, model.language, model.router
    for ratio in model.ratios:  # at the full ratio, an average of one
        pooled.connectors.by_ratio[str(ratio)] = PooledConnector(full, ratio)
    return pooled


@torch.no_grad()
def fastv_answers(
    predictor: Predictor,
    sample: TiledSample,
    prompt: Prompt,
    *,
    keep_fraction: float | int,
    max_new_tokens: int = 64,
    features: Float[Tensor, "T P C"] | None = None,
) -> str:
    """Answer a prompt as FastV does (arXiv 2403.06764), from full vision tokens.

    Two layers see them all. The next see, at their old positions, the fraction to which the prompt's last
    token pays most attention in the second layer, averaged over heads. `features` are the patch features of
    the sample, if they are known. `check_arms` says which models can run so.
    """
    model, device = predictor.model, predictor.device
    base: Any = model.language.base_model
    ratios = torch.full((len(sample.tiles),), FULL_RATIO, device=device)
    features = predictor.encode(sample.tiles) if features is None else features
    batch = collate([predictor.encode_prompt(sample, prompt)]).to(device)
    spliced = model.splice_batch(batch, features, ratios)
    within = torch.arange(model.tokens_per_full_tile, device=device)
    vision = (spliced.tile_starts[:, None] + within).flatten()  # positions of vision tokens
    model.language.set_attn_implementation(_ATTENTION)
    cache, received = DynamicCache(), list[Tensor]()
    positions = torch.arange(len(spliced.embeddings), device=device)
    states = _run(base, spliced.embeddings, positions, cache, slice(FASTV_LAYERS), received=received)
    rank = torch.full_like(received[-1], torch.inf)  # of text: all of it stays
    rank[vision] = received[-1][vision]
    num_kept = len(positions) - len(vision) + round(keep_fraction * len(vision))
    kept = rank.topk(num_kept).indices.sort().values
    states = _run(base, states[kept], positions[kept], cache, slice(FASTV_LAYERS, None))
    ids = list[int]()
    for _ in range(max_new_tokens):
        ids.append(int((model.head @ base.norm(states[-1])).argmax()))
        if ids[-1] == token_id(predictor.tokenizer, TURN_END):
            break
        embedding = base.get_input_embeddings()(torch.tensor(ids[-1:], device=device))
        states = _run(base, embedding, positions[-1:] + len(ids), cache, slice(None))
    return str(predictor.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _run(
    base: Any,
    states: Float[Tensor, "S D"],
    positions: Int64[Tensor, " S"],
    cache: DynamicCache,
    layers: slice,
    **given: Any,
) -> Float[Tensor, "S D"]:
    """Run layers on tokens after those in their cache."""
    hidden, places = states[None], positions[None]
    rotary = base.rotary_emb(hidden, position_ids=places)
    for layer in base.layers[layers]:
        hidden = layer(
            hidden, position_ids=places, position_embeddings=rotary, past_key_values=cache, **given
        )
    return hidden[0]


def _attention(
    _: nn.Module, query: Tensor, key: Tensor, value: Tensor, __: Any, *, scaling: float, **given: Any
) -> tuple[Tensor, None]:
    """Causal attention in a prompt or of one more token; `received` gets what the last token pays to each."""
    if "received" in given:
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        given["received"].append((query[:, :, -1:] @ keys.mT * scaling).float().softmax(-1).mean((0, 1, 2)))
    several = query.shape[2] > 1
    output = scaled_dot_product_attention(
        query, key, value, is_causal=several, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attention)
