"""Questions that are asked while training: after each validation, at full tokens and compressed."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import webdataset as wds

from vico_pl.callbacks.dashboard import writers
from vico_pl.data.decode import IMAGE_TOKEN
from vico_pl.data.module import RankBatches, ValidationConfig
from vico_pl.data.order import EvenOrder
from vico_pl.evaluation.answering import EvalQuestion, answer_group, full_tokens
from vico_pl.evaluation.questions import read_groups, scored_questions
from vico_pl.evaluation.scorers import SCORERS
from vico_pl.inference.predictor import Predictor
from vico_pl.stages.figures import Mean, add_up, means
from vico_pl.types import EncodedSample, TiledSample

NUM_SHOWN = 4  # samples of each set, whose first questions are shown
FULL = "full"


class Row(NamedTuple):
    """A question about a sample, and what the model answers at each choice of ratios."""

    sample: str
    question: EvalQuestion
    said: dict[str, str]


class ValidationAnswers(L.Callback):
    """Logs the mean score of answers as `val/SET/score_CHOICE`, and shows the first answers as text.

    Each rank asks about its share of the samples. Under fsdp none does: each new token would gather all
    weights.
    """

    def __init__(self, sets: Sequence[ValidationConfig]) -> None:
        """Keep the validation sets, in the order of their loaders."""
        self._sets = sets

    def on_train_start(self, trainer: L.Trainer, stage: Any) -> None:
        """Read the questions once, so that a fault in them shows before the first step.

        Raises:
            ValueError: an answer names an unknown metric.
        """
        for number in range(len(self._sets)):
            for sample in self._samples(trainer, number):
                list(_questions(sample, 0))

    def on_validation_epoch_end(self, trainer: Any, stage: Any) -> None:
        """Ask the questions of each set, unless its validation was interrupted."""
        if stage.is_sharded or stage.validated_step != trainer.global_step:
            return
        for number, entry in enumerate(self._sets):
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                scores, rows = self._ask(trainer, stage, number)
            of_ranks = stage.ranks.gather((scores, rows[:NUM_SHOWN]))
            for figure, value in means(add_up(scores for scores, _ in of_ranks)).items():
                stage.log(f"val/{entry.name}/{figure}", value, batch_size=1)
            shown = sorted((row for _, rows in of_ranks for row in rows), key=lambda row: row.sample)
            for writer in writers(trainer) if shown and trainer.is_global_zero else ():
                writer.add_text(
                    f"val/{entry.name}/answers", format_rows(shown[:NUM_SHOWN]), trainer.global_step
                )

    def _ask(self, trainer: Any, stage: Any, number: int) -> tuple[dict[str, Mean], list[Row]]:
        """Return the scores of this rank's answers, and the first answers about each sample."""
        data = trainer.datamodule
        predictor = Predictor(
            folder=Path(trainer.default_root_dir),
            model=stage.trained_model(),
            tokenizer=data.chat.tokenizer,
            tiling=data.config.tiling,
            chat=data.chat,
            rule=None,
        )
        scores: list[dict[str, Mean]] = []
        rows: list[Row] = []
        for group in read_groups(predictor, self._samples(trainer, number), _questions):
            compressed = [stage.compressed_ratios(features) for features in group.features]
            choices = {FULL: full_tokens(group)}
            choices |= {name: [ratios[name] for ratios in compressed] for name in compressed[0]}
            answers = answer_group(predictor, group, list(choices.values()))
            for question, *texts in zip(group.questions, *answers, strict=True):
                said = dict(zip(choices, texts, strict=True))
                if question.metric:
                    score, right = SCORERS[question.metric], list(question.answers)
                    scores.append(
                        {f"score_{name}": Mean(score(text, right), 1) for name, text in said.items()}
                    )
                sample = group.samples[question.sample - group.first].id
                if not rows or rows[-1].sample != sample:
                    rows.append(Row(sample, question, said))
        return add_up(scores), rows

    def _samples(self, trainer: Any, number: int) -> Iterator[TiledSample]:
        """Read this rank's share of the samples that are asked about.

        Bad records are left out, also those that are too long for the run.
        """
        data, rank, world = trainer.datamodule, trainer.global_rank, trainer.world_size
        held_out = data.held_out[number]
        count = min(self._sets[number].answers, held_out.order.count)
        chosen = EvenOrder(size=held_out.order.count, count=count)
        positions = [chosen(place).sample for place in range(rank, count, world)]
        *stages, encode = RankBatches(data, rank=rank, world=world, held_out=held_out).stages
        for item in wds.DataPipeline(partial(iter, positions), *stages):
            ((_, encoded),) = encode([item])
            if isinstance(encoded, EncodedSample):
                yield item[1]


def _questions(sample: TiledSample, position: int) -> list[EvalQuestion]:
    """Return the questions whose answers can be scored; if there are none, the first one."""
    texts = tuple(turn.text for turn in sample.turns)
    first = EvalQuestion(sample=position, group="", metric="", prompt=texts[:1], answers=texts[1:2])
    return list(scored_questions(sample, position, metric=None)) or [first]


def format_rows(rows: Sequence[Row]) -> str:
    """Format answers as a Markdown table."""
    header = ("sample", "question", "expected", *rows[0].said)
    lines = [header, ("---",) * len(header)]
    for sample, question, said in rows:
        text = question.prompt[-1].replace(IMAGE_TOKEN, "")
        lines.append((sample, text, *(question.answers[:1] or ["-"]), *said.values()))
    cells = [[" ".join(cell.replace("|", "/").split()) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
