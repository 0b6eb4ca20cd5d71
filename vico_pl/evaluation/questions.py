"""Evaluation sets: which questions they ask, and what their scores are.

Any samples will do. Questions that name a metric or a skill are asked and their answers scored. Otherwise
each sample's score is the agreement with full tokens on its responses: exp(-KL), the KL averaged over tokens.
The responses are those of the data or, if it has none, the model's own at full tokens.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from vico_pl.data.shards.reader import read_index, read_samples
from vico_pl.data.tiling import TilingConfig, tile_sample
from vico_pl.errors import RecordError
from vico_pl.evaluation.answering import (
    EvalQuestion,
    Group,
    Ratios,
    Result,
    agreement,
    answer_group,
    encode_conversation,
    full_tokens,
    score_answers,
)
from vico_pl.evaluation.scorers import SCORERS
from vico_pl.evaluation.suites import SUITES, read_suite
from vico_pl.inference.generate import prompt_texts
from vico_pl.inference.predictor import Predictor
from vico_pl.types import Sample, TiledSample, Turn

SAMPLES_PER_GROUP = 32
DECIDING_SAMPLES = 1000  # the first of a set, which say how it is scored
GROUP_FIELDS = ("source", "category", "question_type")  # of a record's JSON: group of questions without skill
NO_GROUP = "all"
NOTHING_RIGHT = (
    "0 % right at full tokens, so there is no accuracy to keep; use questions that the model can answer, "
    "or a metric that accepts its answers (--metric)"
)


class Measure(StrEnum):
    """What the scores of an evaluation set are."""

    SCORES = "scores of the answers"
    ANSWERS = "agreement with full tokens on the answers of the data"
    OWN = "agreement with full tokens on the model's own answers"


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """An evaluation set and the model that is asked."""

    name: str  # folder of shards, or a suite
    read: Callable[[], Iterator[Sample]]
    num_records: int | None  # bad ones included; None: unknown before a suite is read
    predictor: Predictor
    measure: Measure
    metric: str | None = None  # of answers that name none; None: without skill they are not scored
    responses: Sequence[str] = ()  # to each sample, if they are the model's own

    def samples(self) -> Iterator[tuple[Sample, TiledSample]]:
        """Yield the samples, also tiled; those too long for the model are left out, with a warning."""
        responses, num_long = iter(self.responses), 0
        for sample in self.read():
            tiled = tile_sample(sample, self.predictor.tiling)
            if not _fits(self.predictor, tiled):
                num_long += 1
                continue
            if self.responses:
                (text,) = prompt_texts(sample.turns[0].text, num_images=len(sample.images))
                asked, answer = Turn(role="human", text=text), Turn(role="gpt", text=next(responses))
                tiled = replace(tiled, turns=[asked, answer])
            yield sample, tiled
        if num_long:
            warnings.warn(f"{self.name}: {num_long} samples are too long for the model", stacklevel=2)

    def groups(self, *, title: str, tilings: Sequence[TilingConfig] = ()) -> Iterator[Group]:
        """Encode the samples, each with its own tiling if there are some, with a progress bar."""
        samples: Iterator[TiledSample] = (tiled for _, tiled in self.samples())
        if tilings:
            smaller = zip(self.samples(), tilings, strict=True)
            samples = (replace(tile_sample(s, tiling), turns=tiled.turns) for (s, tiled), tiling in smaller)
        total = None if self.num_records is None else -(-self.num_records // SAMPLES_PER_GROUP)
        groups = read_groups(self.predictor, samples, self._questions)
        yield from tqdm(groups, desc=title, total=total, unit="group", disable=None)  # no bar in log files

    def grade(
        self, group: Group, choices: Sequence[Ratios], *, reference: Predictor | None = None
    ) -> list[list[Result]]:
        """Score all questions of a group at each choice of ratios; agreement is that with the reference."""
        if self.measure != Measure.SCORES:
            return agreement(self.predictor, group, choices, reference=reference or self.predictor)
        return score_answers(group, answer_group(self.predictor, group, choices))

    def checked_groups(self) -> Iterator[Group]:
        """Yield the groups, for their tiles to be scored, and refuse a set from which nothing can be learnt.

        Raises:
            ValueError: at the end: the set has no tile, or the sum of all scores at full tokens is 0.
        """
        num_tiles, right = 0, 0.0
        for group in self.groups(title="scoring tiles"):
            yield group
            num_tiles += sum(map(len, group.features))
            right += sum(result.score for result in self.grade(group, [full_tokens(group)])[0])
        if not num_tiles:
            raise ValueError(f"{self.name}: no image to calibrate or evaluate on")
        if not right:
            raise ValueError(f"{self.name}: {NOTHING_RIGHT}")

    def _questions(self, sample: TiledSample, position: int) -> Iterator[EvalQuestion]:
        if self.measure == Measure.SCORES:
            yield from scored_questions(sample, position, metric=self.metric)
        else:
            texts = tuple(turn.text for turn in sample.turns)
            answers, group = texts[1::2], _group_of(sample)
            yield EvalQuestion(sample=position, group=group, metric="", prompt=texts[:1], answers=answers)


def open_questions(
    predictor: Predictor, data: Path | str, *, suite_dir: Path | None = None, metric: str | None = None
) -> QuestionSet:
    """Open shards, or with `suite_dir` a suite by its name, and decide how the set is scored.

    `metric` scores the answers that name no metric.

    Raises:
        ValueError: no such data or scorer, or no usable sample.
    """
    if metric is not None:
        _check_metric("--metric", metric)
    read, name = reader(data, suite_dir=suite_dir), str(data)
    opened = QuestionSet(
        name=name,
        read=read,
        predictor=predictor,
        measure=decide_measure(read(), metric=metric, name=name),
        metric=metric,
        num_records=read_index(data).num_samples if suite_dir is None else None,
    )
    return replace(opened, responses=own_responses(opened)) if opened.measure == Measure.OWN else opened


def reader(data: Path | str, *, suite_dir: Path | None) -> Callable[[], Iterator[Sample]]:
    """Return what reads the samples of shards, or of a suite by its name."""
    if suite_dir is not None:
        return partial(read_suite, str(data), suite_dir)
    if str(data) in SUITES and not Path(data).exists():
        raise ValueError(f"{data}: a suite is read from its published files; say where with --suite-dir")
    return partial(read_samples, data)


def describe(data: Path | str, *, suite_dir: Path | None = None, metric: str | None = None) -> str:
    """Say how a set will be scored, without a model.

    Raises:
        ValueError: no such data, or no usable sample.
    """
    read = reader(data, suite_dir=suite_dir)
    measure = decide_measure(read(), metric=metric, name=str(data))
    if measure != Measure.SCORES:
        return f"{data}: {measure}, as no answer names a metric or a skill"
    found = (q for sample in read() for q in scored_questions(sample, 0, metric=metric))
    counts = Counter(f"{question.group} by {question.metric}" for question in found)
    listed = ", ".join(f"{count} of {name}" for name, count in counts.most_common(10))
    return f"{data}: {measure}, {counts.total()} questions: {listed}"


def decide_measure(samples: Iterable[Sample], *, metric: str | None, name: str) -> Measure:
    """Look at the first samples of a set for answers to score, or else for answers.

    Raises:
        ValueError: an answer names an unknown metric, or there is no sample.
    """
    measure = None
    for sample in islice(samples, DECIDING_SAMPLES):
        if any(scored_questions(sample, 0, metric=metric)):
            return Measure.SCORES
        has_answer = any(turn.text.strip() for turn in sample.turns[1::2])
        measure = Measure.ANSWERS if has_answer else measure or Measure.OWN
    if measure is None:
        raise ValueError(f"{name}: no usable sample; see 'vico shards check {name}'")
    return measure


@torch.no_grad()
def own_responses(questions: QuestionSet) -> list[str]:
    """Answer the first question of each sample at full tokens."""
    predictor, responses = questions.predictor, list[str]()
    for group in questions.groups(title="answering"):
        asked = [
            EvalQuestion(sample=group.first + i, group="", metric="", prompt=(s.turns[0].text,), answers=())
            for i, s in enumerate(group.samples)
        ]
        responses += answer_group(predictor, replace(group, questions=asked), [full_tokens(group)])[0]
    return responses


def read_groups(
    predictor: Predictor,
    samples: Iterable[TiledSample],
    questions: Callable[[TiledSample, int], Iterable[EvalQuestion]],
) -> Iterator[Group]:
    """Encode samples group by group; only one group is in memory."""
    remaining, first = iter(samples), 0
    while members := list(islice(remaining, SAMPLES_PER_GROUP)):
        with torch.no_grad():
            features = predictor.encode(torch.cat([s.tiles for s in members]))
        yield Group(
            samples=members,
            features=list(features.split([len(s.tiles) for s in members])),
            questions=[q for i, sample in enumerate(members) for q in questions(sample, first + i)],
            first=first,
        )
        first += len(members)


def scored_questions(
    sample: Sample | TiledSample, position: int, *, metric: str | None
) -> Iterator[EvalQuestion]:
    """Yield the questions of a sample whose answers can be scored, with `metric` if they name none."""
    texts = tuple(turn.text for turn in sample.turns)
    for place, turn in list(enumerate(sample.turns))[1::2]:
        scorer = turn.metric or metric or (turn.group and "exact")
        if scorer:
            _check_metric(sample.id, scorer)
            yield EvalQuestion(
                sample=position,
                group=turn.group or _group_of(sample),
                metric=scorer,
                # Questions with a skill are asked alone, whatever else is asked about the images.
                prompt=texts[place - 1 : place] if turn.group else texts[:place],
                answers=turn.answers or (turn.text,),
            )


def _check_metric(where: str, metric: str) -> None:
    if metric not in SCORERS:
        raise ValueError(f"{where}: metric is '{metric}'; expected one of {', '.join(SCORERS)}")


def _group_of(sample: Sample | TiledSample) -> str:
    named = (sample.metadata.get(field) for field in GROUP_FIELDS)
    return next((name for name in named if name and isinstance(name, str)), NO_GROUP)


def _fits(predictor: Predictor, sample: TiledSample) -> bool:
    if predictor.chat.max_positions is None:
        return True
    try:
        encode_conversation(predictor, sample)
    except RecordError:
        return False
    return True
