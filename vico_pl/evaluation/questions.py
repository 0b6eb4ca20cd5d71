"""Questions with known answers: reading them from shards, putting them to a model, counting what is right."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vico_pl.data.shards.reader import read_index
from vico_pl.inference.generate import answer
from vico_pl.inference.predictor import Predictor
from vico_pl.types import Sample, TiledSample

SKILLS = ("perception", "reasoning", "ocr")
SAMPLES_PER_GROUP = 32
TOKENS_PER_BATCH = 16384  # of generation, padding included
EXTRA_TOKENS = 8  # an answer longer than the expected one by these is wrong, whatever would follow


@dataclass(frozen=True, kw_only=True)
class EvalQuestion:
    """One question of an evaluation set."""

    sample: int  # position of its sample in the set
    skill: str
    text: str
    expected: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Some neighbouring samples of an evaluation set with their patch features."""

    samples: list[TiledSample]
    features: list[Float[Tensor, "_ P C"]]
    questions: list[EvalQuestion]
    first: int  # position of the first sample in the set


_Key = tuple[int, tuple[int, ...]]  # a question of the group, and the ratios of its sample's tiles
Track = Callable[[Iterable[Group], str, int], Iterable[Group]]  # shows progress: groups, title, how many


def silent(groups: Iterable[Group], title: str, total: int) -> Iterable[Group]:
    """Show no progress."""
    return groups


def count_groups(folder: Path) -> int:
    """Return how many groups the samples of a folder make."""
    return -(-read_index(folder).num_samples // SAMPLES_PER_GROUP)


def read_groups(predictor: Predictor, samples: Iterable[TiledSample]) -> Iterator[Group]:
    """Encode samples group by group; never more than one group is held."""
    first = 0
    for members in batched(samples, SAMPLES_PER_GROUP):
        with torch.no_grad():
            features = predictor.encode(torch.cat([s.tiles for s in members]))
        yield Group(
            samples=members,
            features=list(features.split([len(s.tiles) for s in members])),
            questions=[q for i, sample in enumerate(members) for q in _questions(sample, first + i)],
            first=first,
        )
        first += len(members)


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Gather `size` items at a time; the last group may be shorter."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def has_questions(samples: Iterable[Sample]) -> bool:
    """Say whether one of the samples asks something with a skill; stops at the first."""
    return any(turn.skill in SKILLS for sample in samples for turn in sample.turns)


class Answerer:
    """Answers all questions of one group at any choice of ratios; equal choices are answered once."""

    def __init__(self, predictor: Predictor, group: Group) -> None:
        """Answer nothing yet."""
        self._session, self._group = predictor, group
        self._known: dict[_Key, str] = {}
        tokenizer = predictor.tokenizer
        self._limits = [
            len(tokenizer.encode(q.expected, add_special_tokens=False)) + EXTRA_TOKENS
            for q in group.questions
        ]

    def prepare(self, choices: Iterable[Sequence[Int64[Tensor, " _"]]]) -> None:
        """Answer everything that several choices ask for, so that it fits into few batches."""
        asked = dict.fromkeys(key for ratios in choices for key in self._keys(ratios))  # each once, in order
        for batch in self._batches([key for key in asked if key not in self._known]):
            self._known.update(zip(batch, self._answer(batch), strict=True))

    def __call__(self, ratios: Sequence[Int64[Tensor, " _"]]) -> list[str]:
        """Answer the group's questions with tiles at the given ratios, one entry per sample."""
        self.prepare([ratios])
        return [self._known[key] for key in self._keys(ratios)]

    def correct(self, ratios: Sequence[Int64[Tensor, " _"]]) -> list[bool]:
        """Say which questions are answered as expected."""
        given = self(ratios)
        return [is_correct(text, q.expected) for text, q in zip(given, self._group.questions, strict=True)]

    def _keys(self, ratios: Sequence[Int64[Tensor, " _"]]) -> list[_Key]:
        of_sample = [tuple(r.tolist()) for r in ratios]
        return [(i, of_sample[self._owner(i)]) for i in range(len(self._group.questions))]

    def _owner(self, question: int) -> int:
        return self._group.questions[question].sample - self._group.first

    def _batches(self, keys: Sequence[_Key]) -> Iterator[list[_Key]]:
        """Put prompts of like length together, as many as stay within TOKENS_PER_BATCH with their padding."""
        batch: list[_Key] = []
        for key in sorted(keys, key=self._length):
            if batch and (len(batch) + 1) * self._length(key) > TOKENS_PER_BATCH:
                yield batch
                batch = []
            batch.append(key)
        if batch:
            yield batch

    def _length(self, key: _Key) -> int:
        """Estimate the tokens of a prompt and its answer: those of the text are at most its bytes."""
        question, ratios = key
        spent = sum(self._session.model.vision.num_patches // ratio for ratio in ratios)
        return spent + len(self._group.questions[question].text.encode()) + self._limits[question]

    def _answer(self, keys: Sequence[_Key]) -> list[str]:
        owners = [self._owner(question) for question, _ in keys]
        return answer(
            self._session,
            [self._group.samples[s] for s in owners],
            [self._group.questions[question].text for question, _ in keys],
            features=[self._group.features[s] for s in owners],
            ratios=[torch.tensor(ratios, dtype=torch.int64) for _, ratios in keys],
            max_new_tokens=max(self._limits[question] for question, _ in keys),
        )


def is_correct(given: str, expected: str) -> bool:
    """Compare answers as exact match, whatever the case and the spaces around.

    >>> is_correct("Red ", "red"), is_correct("F3 K7 K", "F3 K7 F")
    (True, False)
    """
    return given.strip().lower() == expected.strip().lower()


def at_threshold(
    scores: Sequence[Float[Tensor, " _"]], threshold: float, *, ratios: list[int]
) -> list[Int64[Tensor, " _"]]:
    """Compress the tiles whose score reaches the threshold to the coarsest ratio."""
    return [torch.where(score >= threshold, ratios[-1], ratios[0]) for score in scores]


def threshold_for(scores: Sequence[Float[Tensor, " _"]], *, compressed_fraction: float) -> float:
    """Return the threshold that this share of all tiles reaches: the score of the last one that does.

    >>> threshold_for([torch.tensor([0.1, 0.9]), torch.tensor([0.4, 0.6])], compressed_fraction=0.5)
    0.6000000238418579
    """
    ranked = torch.cat(list(scores)).sort(descending=True).values
    count = round(compressed_fraction * len(ranked))
    return float("inf") if count == 0 else float(ranked[count - 1])


def vision_tokens(chosen: Sequence[Int64[Tensor, " _"]], *, num_patches: int) -> list[int]:
    """Return the vision tokens each sample spends."""
    return [int((num_patches // ratios).sum()) for ratios in chosen]


def accuracy_by_skill(skills: Sequence[str], correct: Sequence[bool]) -> dict[str, float | None]:
    """Return the share of right answers per skill (None without questions) and the mean over skills."""
    table: dict[str, float | None] = {}
    for skill in SKILLS:
        mine = [right for name, right in zip(skills, correct, strict=True) if name == skill]
        table[skill] = sum(mine) / len(mine) if mine else None
    present = [value for value in table.values() if value is not None]
    return {**table, "mean": sum(present) / len(present) if present else None}


def _questions(sample: TiledSample, position: int) -> Iterator[EvalQuestion]:
    for human, gpt in zip(sample.turns[::2], sample.turns[1::2], strict=True):
        if gpt.skill in SKILLS:
            yield EvalQuestion(sample=position, skill=gpt.skill, text=human.text, expected=gpt.text)
