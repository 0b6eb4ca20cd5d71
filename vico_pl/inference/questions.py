"""Questions with known answers: reading them from shards, putting them to a model, counting what is right."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vico_pl.inference.generate import answer
from vico_pl.inference.session import Session
from vico_pl.types import TiledSample

SKILLS = ("perception", "reasoning", "ocr")
SAMPLES_PER_GROUP = 32
QUESTIONS_PER_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of an evaluation set."""

    sample: int  # position of its sample in the set
    skill: str
    text: str
    expected: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Some neighbouring samples of an evaluation set with their patch features."""

    samples: list[TiledSample]
    features: list[Float[Tensor, "t P C"]]
    questions: list[Question]
    first: int  # position of the first sample in the set


def read_groups(session: Session, samples: Iterable[TiledSample]) -> Iterator[Group]:
    """Encode samples group by group; never more than one group is held."""
    first = 0
    for members in batched(samples, SAMPLES_PER_GROUP):
        with torch.no_grad():
            features = session.model.encode_tiles(torch.cat([s.tiles for s in members]))
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


class Answerer:
    """Answers all questions of one group at any choice of ratios; equal choices are answered once."""

    def __init__(self, session: Session, group: Group, *, max_new_tokens: int = 32) -> None:
        """Answer nothing yet."""
        self._session, self._group, self._max_new_tokens = session, group, max_new_tokens
        self._known: dict[tuple[int, tuple[int, ...]], str] = {}

    def __call__(self, ratios: Sequence[Int64[Tensor, " t"]]) -> list[str]:
        """Answer the group's questions with tiles at the given ratios, one entry per sample."""
        keys = [(i, tuple(ratios[self._owner(i)].tolist())) for i in range(len(self._group.questions))]
        unknown = sorted((key for key in keys if key not in self._known), key=lambda key: sum(1 / r for r in key[1]))
        for chunk in (unknown[i : i + QUESTIONS_PER_BATCH] for i in range(0, len(unknown), QUESTIONS_PER_BATCH)):
            self._known.update(zip(chunk, self._answer(chunk), strict=True))
        return [self._known[key] for key in keys]

    def correct(self, ratios: Sequence[Int64[Tensor, " t"]]) -> list[bool]:
        """Say which questions are answered as expected."""
        given = self(ratios)
        return [is_correct(text, q.expected) for text, q in zip(given, self._group.questions, strict=True)]

    def _owner(self, question: int) -> int:
        return self._group.questions[question].sample - self._group.first

    def _answer(self, keys: Sequence[tuple[int, tuple[int, ...]]]) -> list[str]:
        owners = [self._owner(question) for question, _ in keys]
        return answer(
            self._session,
            [self._group.samples[s] for s in owners],
            [self._group.questions[question].text for question, _ in keys],
            features=[self._group.features[s] for s in owners],
            ratios=[torch.tensor(ratios, dtype=torch.int64) for _, ratios in keys],
            max_new_tokens=self._max_new_tokens,
        )


def is_correct(given: str, expected: str) -> bool:
    """Compare answers as exact match, whatever the case and the spaces around.

    >>> is_correct("Red ", "red"), is_correct("F3 K7 K", "F3 K7 F")
    (True, False)
    """
    return given.strip().lower() == expected.strip().lower()


def at_threshold(
    scores: Sequence[Float[Tensor, " t"]], threshold: float, *, ratios: list[int]
) -> list[Int64[Tensor, " t"]]:
    """Compress the tiles whose score reaches the threshold to the coarsest ratio."""
    return [torch.where(score >= threshold, ratios[-1], ratios[0]) for score in scores]


def threshold_for(scores: Sequence[Float[Tensor, " t"]], *, compressed_fraction: float) -> float:
    """Return the threshold that this share of all tiles reaches: the score of the last one that does.

    >>> threshold_for([torch.tensor([0.1, 0.9]), torch.tensor([0.4, 0.6])], compressed_fraction=0.5)
    0.6000000238418579
    """
    ranked = torch.cat(list(scores)).sort(descending=True).values
    count = round(compressed_fraction * len(ranked))
    return float("inf") if count == 0 else float(ranked[count - 1])


def vision_tokens(chosen: Sequence[Int64[Tensor, " t"]], *, num_patches: int) -> list[int]:
    """Return the vision tokens each sample spends."""
    return [int((num_patches // ratios).sum()) for ratios in chosen]


def accuracy_by_skill(skills: Sequence[str], correct: Sequence[bool]) -> dict[str, float | None]:
    """Return the share of right answers per skill (None without questions) and the mean over skills."""
    table: dict[str, float | None] = {}
    for skill in SKILLS:
        mine = [right for name, right in zip(skills, correct, strict=True) if name == skill]
        table[skill] = sum(mine) / len(mine) if mine else None
    present = [value for value in table.values() if value is not None]
    return {**table, "mean": sum(present) / len(present)}


def _questions(sample: TiledSample, position: int) -> Iterator[Question]:
    for human, gpt in zip(sample.turns[::2], sample.turns[1::2], strict=True):
        if gpt.skill in SKILLS:
            yield Question(sample=position, skill=gpt.skill, text=human.text, expected=gpt.text)
