"""Ask a question about an image and show which tiles were compressed.

    python examples/answer.py runs/demo/router/model page.png "How many shapes are there?"

Without an image it draws one of GlyphDocs, the only kind that the model of `make demo` knows.
"""

import sys

from vico_pl import Answer, Predictor
from vico_pl.data.glyphs import GlyphsConfig, draw_records


def main(
    model: str = "runs/demo/router/model",
    image: str | None = None,
    question: str = "How many shapes are there?",
) -> Answer:
    predictor = Predictor.load(model)
    picture = image if image is not None else drawn_image()
    answer = predictor.generate([picture], question, max_new_tokens=32)[0]
    print(f"{question} {answer.text}")
    print(f"{answer.vision_tokens} of {answer.full_vision_tokens} vision tokens")
    routing = answer.images[0]
    columns, rows = routing.grid
    for row in range(rows):
        tiles = range(row * columns, (row + 1) * columns)
        print("  ".join(f"{routing.vision_tokens[tile]:4d} tokens" for tile in tiles))
    if routing.has_thumbnail:
        print(f"thumbnail: {routing.vision_tokens[-1]} tokens")
    return answer


def drawn_image() -> bytes:
    """Return the bytes of a JPEG with text in some tiles and none in others."""
    ((_, files),) = draw_records(GlyphsConfig(), seed=3, start=6, count=1)
    return files["jpg"]


if __name__ == "__main__":
    main(*sys.argv[1:])
