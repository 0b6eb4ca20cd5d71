"""The score that lmms-eval must give: write the questions of a set as its task, and ask them one at a time.

Samples have one image each, as in GlyphDocs. docs/lmms-eval.md says what to run next.

python benchmarks/lmms.py runs/demo/router/model --data data/shards/glyphs/val --output runs/lmms
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from torchvision.io import write_png

from vico_pl.data.shards.reader import read_samples
from vico_pl.data.tiling import tile_sample
from vico_pl.inference.predictor import Predictor
from vico_pl.model.router import RoutingRule

MAX_NEW_TOKENS = 16  # as docs/lmms_eval/glyphs.yaml


def main(arguments: Sequence[str] | None = None) -> float:
    """Write `questions.jsonl` and `images/`, and print the score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of shards")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--threshold", type=float, help="of routing; otherwise the calibrated one")
    given = parser.parse_args(arguments)
    predictor = Predictor.load(given.model)
    if given.threshold is not None:
        predictor = replace(predictor, rule=RoutingRule(threshold=given.threshold))
    (given.output / "images").mkdir(parents=True, exist_ok=True)
    lines, correct = [], []
    for number, sample in enumerate(islice(read_samples(given.data), given.images)):
        path = given.output / "images" / f"{number:08d}.png"
        write_png(sample.images[0], str(path))
        tiled = tile_sample(sample, predictor.tiling)
        features = predictor.encode(tiled.tiles).detach()
        for asked, expected in zip(sample.turns[::2], sample.turns[1::2], strict=True):
            question = asked.text.replace("<image>", "").strip()
            lines.append(json.dumps({"image": str(path), "question": question, "answer": expected.text}))
            routed = {"features": [features], "ratios": [predictor.choose_ratios(features)]}
            (answer,) = predictor.answer([tiled], [question], **routed, max_new_tokens=MAX_NEW_TOKENS)
            # As exact_match with ignore_case.
            correct.append(answer.strip().lower() == expected.text.strip().lower())
    (given.output / "questions.jsonl").write_text("\n".join(lines) + "\n")
    score = sum(correct) / len(correct)
    sys.stdout.write(f"{sum(correct)} of {len(correct)} questions right: {score:.6f}\n")
    return score


if __name__ == "__main__":
    main()
