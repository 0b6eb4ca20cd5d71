"""Write image-text records of your own as a shard, check it, and look at it.

    python examples/write_shards.py data/shards/own

With annotations in a JSONL file, `vico shards build` does the same without code.
"""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

from vico_pl.data.shards.preview import contact_sheet
from vico_pl.data.shards.reader import find_faults, read_samples, write_index, write_shard


def records() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield a key and its files: an image, and a conversation that marks the image with <image>."""
    for number, colour in enumerate(("red", "green", "blue")):
        image = Image.new("RGB", (320, 160), "white")
        ImageDraw.Draw(image).ellipse((40, 40, 120, 120), fill=colour)
        ImageDraw.Draw(image).text((180, 70), f"No. {number}", fill="black")
        file = io.BytesIO()
        image.save(file, "PNG")
        turns = [
            {"from": "human", "value": "<image>\nWhat colour is the disc?"},
            {"from": "gpt", "value": colour},
        ]
        content = {"conversations": turns, "skills": ["colour"], "source": "discs"}
        yield f"{number:06d}", {"png": file.getvalue(), "json": json.dumps(content).encode()}


def main(folder: str = "data/shards/own") -> Path:
    shards = Path(folder)
    write_shard(shards / "train-000000.tar", records())
    index = write_index(shards)
    print(f"{shards}: {index.num_samples} samples, {len(list(find_faults(index)))} of them bad")
    picture = shards / "preview.png"
    contact_sheet(list(read_samples(shards))).save(picture)
    print(f"{picture} shows them")
    return picture


if __name__ == "__main__":
    main(*sys.argv[1:])
