"""Questions with known answers: read them from shards and answer them in batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vico_pl.data.shards.reader import read_index
from vico_pl.evaluation.metrics import SKILLS, is_correct
from vico_pl.inference.predictor import Predictor
from vico_pl.types import Sample, TiledSample

SAMPLES_PER_GROUP = 32
TOKENS_PER_BATCH = 16384  # of generation, padding included
EXTRA_TOKENS = 8  # an answer that is longer than the expected one by this many is wrong anyway


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


_Key = tuple[int, tuple[int, ...]]  # a question of the group, and the ratios of its sample's tiles
Track = Callable[[Iterable[Group], str, int], Iterable[Group]]  # progress: groups, title, number of groups


def silent(groups: Iterable[Group], title: str, total: int) -> Iterable[Group]:
    """Show no progress."""
    return groups


def count_groups(folder: Path) -> int:
    """Return the number of groups of a folder's samples."""
    return -(-read_index(folder).num_samples // SAMPLES_PER_GROUP)


def folder_groups(predictor: Predictor, folder: Path, *, title: str, track: Track) -> Iterable[Group]:
    """Read the groups of a folder and show progress."""
    return track(read_groups(predictor, predictor.samples(folder)), title, count_groups(folder))


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


class Answerer:
    """Answers all questions of one group for any ratios; the same question at the same ratios only once."""

    def __init__(self, predictor: Predictor, group: Group) -> None:
        self._predictor, self._group = predictor, group
        self._known: dict[_Key, str] = {}
        encode = predictor.tokenizer.encode
        self._limits = [
            len(encode(q.expected, add_special_tokens=False)) + EXTRA_TOKENS for q in group.questions
        ]

    def prepare(self, choices: Iterable[Sequence[Int64[Tensor, " _"]]]) -> None:
        """Answer all questions at several choices of ratios together, in few batches."""
        asked = dict.fromkeys(key for ratios in choices for key in self._keys(ratios))  # unique, in order
        for batch in self._batches([key for key in asked if key not in self._known]):
            self._known.update(zip(batch, self._answer(batch), strict=True))

    def __call__(self, ratios: Sequence[Int64[Tensor, " _"]]) -> list[str]:
        """Answer the group's questions with tiles at the given ratios, one entry per sample."""
        self.prepare([ratios])
        return [self._known[key] for key in self._keys(ratios)]

    def correct(self, ratios: Sequence[Int64[Tensor, " _"]]) -> list[bool]:
        """Return for each question whether it is answered correctly."""
        given = self(ratios)
        return [is_correct(text, q.expected) for text, q in zip(given, self._group.questions, strict=True)]

    def _keys(self, ratios: Sequence[Int64[Tensor, " _"]]) -> list[_Key]:
        of_sample = [tuple(r.tolist()) for r in ratios]
        return [(i, of_sample[self._owner(i)]) for i in range(len(self._group.questions))]

    def _owner(self, question: int) -> int:
        return self._group.questions[question].sample - self._group.first

    def _batches(self, keys: Sequence[_Key]) -> Iterator[list[_Key]]:
        """Batch prompts of similar length, at most TOKENS_PER_BATCH tokens with padding."""
        batch: list[_Key] = []
        for key in sorted(keys, key=self._length):
            if batch and (len(batch) + 1) * self._length(key) > TOKENS_PER_BATCH:
                yield batch
                batch = []
            batch.append(key)
        if batch:
            yield batch

    def _length(self, key: _Key) -> int:
        """Estimate the tokens of a prompt and its answer; a text has at most as many tokens as bytes."""
        question, ratios = key
        vision = sum(self._predictor.model.vision.num_patches // ratio for ratio in ratios)
        return vision + len(self._group.questions[question].text.encode()) + self._limits[question]

    def _answer(self, keys: Sequence[_Key]) -> list[str]:
        owners = [self._owner(question) for question, _ in keys]
        return self._predictor.answer(
            [self._group.samples[s] for s in owners],
            [self._group.questions[question].text for question, _ in keys],
            features=[self._group.features[s] for s in owners],
            ratios=[torch.tensor(ratios, dtype=torch.int64) for _, ratios in keys],
            max_new_tokens=max(self._limits[question] for question, _ in keys),
        )


def _questions(sample: Sample | TiledSample, position: int) -> Iterator[EvalQuestion]:
    for human, gpt in zip(sample.turns[::2], sample.turns[1::2], strict=True):
        if gpt.skill in SKILLS:
            yield EvalQuestion(sample=position, skill=gpt.skill, text=human.text, expected=gpt.text)
