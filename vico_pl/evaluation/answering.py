"""Answer questions at given ratios and score the answers, or measure the agreement with full tokens."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vico_pl.data.collate import collate
from vico_pl.evaluation.scorers import SCORERS
from vico_pl.inference.predictor import Predictor
from vico_pl.losses.consistency import consistency_kl
from vico_pl.model.connector import FULL_RATIO
from vico_pl.types import EncodedSample, TiledSample

TOKENS_PER_BATCH = 16384  # padding included
EXTRA_TOKENS = 8  # an answer that is longer than all accepted ones by this many equals none of them
MAX_NEW_TOKENS = 128  # of answers that need not equal an accepted one

Ratios = Sequence[Int64[Tensor, " _"]]  # one entry per sample
_Choice = tuple[int, ...]  # ratios of a sample's tiles
_Prompt = tuple[int, _Choice]  # number of a question in its group, and its sample's ratios


class Result(NamedTuple):
    """An answer, empty where agreement is measured, and its score, 0 to 1."""

    answer: str
    score: float


@dataclass(frozen=True, kw_only=True)
class EvalQuestion:
    """One question of an evaluation set; where agreement is measured, one sample's conversation."""

    sample: int  # position of its sample in the set
    group: str  # what its score is reported under
    metric: str  # name of its scorer; empty: agreement
    prompt: tuple[str, ...]  # the question, after the turns before it
    answers: tuple[str, ...]  # accepted ones


@dataclass(frozen=True, kw_only=True)
class Group:
    """Consecutive samples of an evaluation set with their patch features."""

    samples: list[TiledSample]
    features: list[Float[Tensor, "_ P C"]]
    questions: list[EvalQuestion]
    first: int  # position of the first sample in the set

    @property
    def positions(self) -> slice:
        """Where the samples are in the set."""
        return slice(self.first, self.first + len(self.samples))


def full_tokens(group: Group) -> Ratios:
    """Return full tokens for every tile of a group."""
    return [torch.full((len(features),), FULL_RATIO) for features in group.features]


def score_answers(group: Group, answers: Sequence[Sequence[str]]) -> list[list[Result]]:
    """Score the answers to the questions of a group, one list per choice of ratios."""
    return [
        [
            Result(text, SCORERS[question.metric](text, list(question.answers)))
            for text, question in zip(texts, group.questions, strict=True)
        ]
        for texts in answers
    ]


def answer_group(predictor: Predictor, group: Group, choices: Sequence[Ratios]) -> list[list[str]]:
    """Answer all questions of a group at each choice of ratios; the same question at the same ratios once."""
    asked = [_prompts(group, ratios) for ratios in choices]
    unique = dict.fromkeys(prompt for prompts in asked for prompt in prompts)  # in order
    limits = [max_new_tokens(predictor, question) for question in group.questions]
    known: dict[_Prompt, str] = {}
    for batch in _batches(unique, group, limits, num_patches=predictor.model.vision.num_patches):
        questions = [group.questions[number] for number, _ in batch]
        places = [question.sample - group.first for question in questions]
        answers = predictor.answer(
            [group.samples[place] for place in places],
            [question.prompt for question in questions],
            features=[group.features[place] for place in places],
            ratios=[torch.tensor(ratios, dtype=torch.int64) for _, ratios in batch],
            max_new_tokens=max(limits[number] for number, _ in batch),
        )
        known.update(zip(batch, answers, strict=True))
    return [[known[prompt] for prompt in prompts] for prompts in asked]


def max_new_tokens(predictor: Predictor, question: EvalQuestion) -> int:
    """Return a limit that no right answer reaches."""
    if question.metric != "exact":
        return MAX_NEW_TOKENS
    lengths = [len(predictor.tokenizer.encode(text, add_special_tokens=False)) for text in question.answers]
    return max(lengths) + EXTRA_TOKENS


def _prompts(group: Group, ratios: Ratios) -> list[_Prompt]:
    of_sample = [tuple(r.tolist()) for r in ratios]
    return [(i, of_sample[q.sample - group.first]) for i, q in enumerate(group.questions)]


def _batches(
    prompts: Iterable[_Prompt], group: Group, limits: Sequence[int], *, num_patches: int
) -> Iterator[list[_Prompt]]:
    """Batch prompts of similar length, at most TOKENS_PER_BATCH tokens with padding."""

    def length(prompt: _Prompt) -> int:  # an estimate: a text has at most as many tokens as bytes
        number, ratios = prompt
        vision = sum(num_patches // ratio for ratio in ratios)
        return vision + sum(len(text.encode()) for text in group.questions[number].prompt) + limits[number]

    batch: list[_Prompt] = []
    for prompt in sorted(prompts, key=length):
        if batch and (len(batch) + 1) * length(prompt) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def agreement(
    predictor: Predictor, group: Group, choices: Sequence[Ratios], *, reference: Predictor
) -> list[list[Result]]:
    """Return exp(-KL(reference at full tokens || predictor)) of each sample at each choice of ratios.

    The KL is averaged over the response tokens of the sample's conversation.
    """
    columns: list[list[Result]] = [[] for _ in choices]
    for place, sample in enumerate(group.samples):
        chosen = [tuple(ratios[place].tolist()) for ratios in choices]
        unique = list(dict.fromkeys(chosen))
        kl = kl_at(predictor, sample, group.features[place], unique, reference=reference)
        known = dict(zip(unique, kl.neg().exp().tolist(), strict=True))
        for column, ratios in zip(columns, chosen, strict=True):
            column.append(Result("", known[ratios]))
    return columns


@torch.no_grad()
def kl_at(
    predictor: Predictor,
    sample: TiledSample,
    features: Float[Tensor, "t P C"],
    choices: Sequence[_Choice],
    *,
    reference: Predictor,
) -> Float[Tensor, " _"]:
    """Return the mean KL of a sample's response tokens at each choice of ratios, in nats."""
    encoded, model = encode_conversation(predictor, sample), predictor.model
    alone = collate([encoded]).to(predictor.device)
    theirs = features if reference is predictor else reference.encode(sample.tiles)
    target = reference.model.response_states(alone, theirs, model.full_ratios(alone))
    num_tokens = len(encoded.input_ids) + len(sample.tiles) * model.tokens_per_full_tile
    size, found = max(1, TOKENS_PER_BATCH // num_tokens), []
    for start in range(0, len(choices), size):
        rows = choices[start : start + size]
        batch = collate([encoded] * len(rows)).to(predictor.device)
        ratios = torch.tensor(rows, dtype=torch.int64, device=predictor.device).flatten()
        states = model.response_states(batch, features.repeat(len(rows), 1, 1), ratios)
        partners = torch.arange(len(target), device=states.device).repeat(len(rows))
        kl = consistency_kl(states, model.head, target, reference.model.head, reference_rows=partners)
        found.append(kl.view(len(rows), -1).mean(1))
    return torch.cat(found)


def encode_conversation(predictor: Predictor, sample: TiledSample) -> EncodedSample:
    """Encode a conversation of any length; evaluation is not bound by the limit of training.

    Raises:
        RecordError: it has more tokens than the language model has positions.
    """
    chat = replace(predictor.chat, config=replace(predictor.chat.config, max_tokens=sys.maxsize))
    return chat.encode(sample)
