"""Compare the router with other arms on questions of your own, scored by a function of your own.

    python examples/evaluate.py runs/demo/router/model

Your own images and questions replace those of `records`.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from vico_pl import Predictor
from vico_pl.data.glyphs import GlyphsConfig, draw_records
from vico_pl.data.shards.reader import write_index, write_shard
from vico_pl.evaluation.evaluate import evaluate
from vico_pl.evaluation.questions import open_questions
from vico_pl.evaluation.report import format_table
from vico_pl.evaluation.scorers import SCORERS


def similarity(prediction: str, answers: Sequence[str]) -> float:
    """Return how alike the texts are, from 0 to 1; of several accepted answers, the best counts."""
    return max(SequenceMatcher(None, prediction, answer).ratio() for answer in answers)


SCORERS["similarity"] = similarity


def records(count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield images of GlyphDocs whose answers are scored by `similarity`."""
    for key, files in draw_records(GlyphsConfig(), seed=11, start=0, count=count):
        content = {**json.loads(files["json"]), "metrics": "similarity"}
        yield key, {**files, "json": json.dumps(content).encode()}


def main(model: str = "runs/demo/router/model", count: int | str = 40) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "test-000000.tar", records(int(count)))
        write_index(folder)
        report, _ = evaluate(open_questions(Predictor.load(model), folder), seed=0)
    print(format_table(report))
    return report


if __name__ == "__main__":
    main(*sys.argv[1:])
