"""The score that lmms-eval must give: questions of a set are written as a task of its, and asked one at a time.

python benchmarks/lmms.py runs/demo/router/model --data data/shards/glyphs/val --output runs/lmms
"""

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from torchvision.io import write_png

from vico_pl.data.shards.inspect import read_samples
from vico_pl.data.tiling import tile_sample
from vico_pl.evaluation.metrics import is_correct
from vico_pl.inference.predictor import Predictor


def main(arguments: Sequence[str] | None = None) -> float:
    """Write `questions.jsonl` and `images/`, and print the score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of shards")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--images", type=int, default=60)
    given = parser.parse_args(arguments)
    predictor = Predictor.load(given.model)
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
            (answer,) = predictor.answer(
                [tiled], [question], features=[features], ratios=[predictor.choose_ratios(features)]
            )
            correct.append(is_correct(answer, expected.text))
    (given.output / "questions.jsonl").write_text("\n".join(lines) + "\n")
    score = sum(correct) / len(correct)
    print(f"{sum(correct)} of {len(correct)} questions right: {score:.6f}")
    return score


if __name__ == "__main__":
    main()
