"""Questions with known answers: read them from shards and answer them in batches."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from vico_pl.data.shards.reader import read_index
from vico_pl.evaluation.metrics import SKILLS, is_correct
from vico_pl.inference.predictor import Predictor
from vico_pl.types import Sample, TiledSample

SAMPLES_PER_GROUP = 32
TOKENS_PER_BATCH = 16384  # of generation, padding included
EXTRA_TOKENS = 8  # an answer that is longer than the expected one by this many is wrong anyway
NOTHING_RIGHT = (
    "0 % right at full tokens, so there is no accuracy to keep; answers must equal the expected ones, use "
    "questions with short answers that the model knows"
)

Ratios = Sequence[Int64[Tensor, " _"]]  # one entry per sample
_Prompt = tuple[int, tuple[int, ...]]  # number of a question in its group, and its sample's ratios


@dataclass(frozen=True, kw_only=True)
class EvalQuestion:
    """One question of an evaluation set."""

    sample: int  # position of its sample in the set
    skill: str
    text: str
    expected: str


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

    def grade(self, answers: Sequence[str]) -> list[bool]:
        """Return for each question whether it is answered correctly."""
        return [is_correct(text, q.expected) for text, q in zip(answers, self.questions, strict=True)]


def folder_groups(
    predictor: Predictor, folder: Path, *, title: str, samples: Iterable[TiledSample] | None = None
) -> Iterator[Group]:
    """Encode the samples of a folder, or `samples` made of them, with a progress bar."""
    groups = read_groups(predictor, predictor.samples(folder) if samples is None else samples)
    total = -(-read_index(folder).num_samples // SAMPLES_PER_GROUP)
    yield from tqdm(groups, desc=title, total=total, unit="group", disable=None)  # in log files


def read_groups(predictor: Predictor, samples: Iterable[TiledSample]) -> Iterator[Group]:
    """Encode samples group by group; only one group is in memory."""
    remaining, first = iter(samples), 0
    while members := list(islice(remaining, SAMPLES_PER_GROUP)):
        with torch.no_grad():
            features = predictor.encode(torch.cat([s.tiles for s in members]))
        yield Group(
            samples=members,
            features=list(features.split([len(s.tiles) for s in members])),
            questions=[q for i, sample in enumerate(members) for q in _questions(sample, first + i)],
            first=first,
        )
        first += len(members)


def has_questions(samples: Iterable[Sample]) -> bool:
    """Return whether any sample has a question with a skill; stops at the first."""
    return any(any(_questions(sample, 0)) for sample in samples)


def _questions(sample: Sample | TiledSample, position: int) -> Iterator[EvalQuestion]:
    for human, gpt in zip(sample.turns[::2], sample.turns[1::2], strict=True):
        if gpt.group in SKILLS:
            yield EvalQuestion(sample=position, skill=gpt.group, text=human.text, expected=gpt.text)


def answer_folder(
    predictor: Predictor, folder: Path, choices: Sequence[Ratios]
) -> Iterator[tuple[Group, list[list[str]]]]:
    """Answer the questions of a folder at several choices of ratios, group by group."""
    for group in folder_groups(predictor, folder, title="answering"):
        yield group, answer_group(predictor, group, [ratios[group.positions] for ratios in choices])


def answer_group(predictor: Predictor, group: Group, choices: Sequence[Ratios]) -> list[list[str]]:
    """Answer all questions of a group at each choice of ratios; the same question at the same ratios once."""
    asked = [_prompts(group, ratios) for ratios in choices]
    unique = dict.fromkeys(prompt for prompts in asked for prompt in prompts)  # in order
    encode = predictor.tokenizer.encode
    limits = [len(encode(q.expected, add_special_tokens=False)) + EXTRA_TOKENS for q in group.questions]
    known: dict[_Prompt, str] = {}
    for batch in _batches(unique, group, limits, num_patches=predictor.model.vision.num_patches):
        questions = [group.questions[number] for number, _ in batch]
        places = [question.sample - group.first for question in questions]
        answers = predictor.answer(
            [group.samples[place] for place in places],
            [question.text for question in questions],
            features=[group.features[place] for place in places],
            ratios=[torch.tensor(ratios, dtype=torch.int64) for _, ratios in batch],
            max_new_tokens=max(limits[number] for number, _ in batch),
        )
        known.update(zip(batch, answers, strict=True))
    return [[known[prompt] for prompt in prompts] for prompts in asked]


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
        return vision + len(group.questions[number].text.encode()) + limits[number]

    batch: list[_Prompt] = []
    for prompt in sorted(prompts, key=length):
        if batch and (len(batch) + 1) * length(prompt) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch
