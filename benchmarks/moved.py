"""Draw aligned GlyphDocs on a larger grey page, moved by a multiple of a step: a set of the study.

    python benchmarks/moved.py STEP FOLDER

The step is in pixels; 0 moves nothing and only adds blank tiles.
"""

import io
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from vico_pl.data.glyphs import GlyphsConfig, draw_records
from vico_pl.data.glyphs.scene import TILE
from vico_pl.data.shards.build import build_set

NUM_IMAGES, SEED, GREY = 250, 21, 128


def records(positions: Sequence[int], *, step: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield records of at most two tiles of content, on a page one tile wider and higher."""
    config = GlyphsConfig(max_tiles=2)
    for key, files in draw_records(config, seed=SEED, start=positions[0], count=len(positions)):
        rng = np.random.default_rng([SEED, int(key)])
        image = Image.open(io.BytesIO(files["jpg"])).convert("RGB")
        page = Image.new("RGB", (image.width + TILE, image.height + TILE), (GREY,) * 3)
        most = TILE // step if step else 0
        left, top = (int(rng.integers(most + 1)) * step for _ in range(2))
        page.paste(image, (left, top))
        png, annotation = io.BytesIO(), json.loads(files["json"])
        page.save(png, "PNG")
        del annotation["tile_kinds"]  # of tiles that are moved
        yield key, {"png": png.getvalue(), "json": json.dumps(annotation).encode()}


if __name__ == "__main__":
    step, folder = int(sys.argv[1]), Path(sys.argv[2])
    build_set(folder, partial(records, step=step), [range(NUM_IMAGES)], settings={"step": step})
