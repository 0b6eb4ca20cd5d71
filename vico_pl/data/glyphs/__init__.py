"""GlyphDocs, the data set of the demo: images generated from a seed, with questions and their answers.

Pixel detail is not meaning: text, shapes and textures all have edges, and only some are asked about. In the
layout `aligned`, that of the demo, each tile shows one thing; in `free`, pages have their content anywhere.
Questions come in three skills: *perception* (the colour of a shape), *reasoning* (count the shapes, compare
two values) and *ocr* (the digit beside a letter, or all text of an image).
"""

import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from PIL import Image

from vico_pl.data.glyphs import aligned, free
from vico_pl.data.glyphs.scene import Grid, choose_questions, question_words, reading_questions
from vico_pl.errors import check_settings

__all__ = ["GlyphsConfig", "draw_records", "question_words"]

GRIDS: tuple[Grid, ...] = ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (2, 3), (3, 2))  # rows, columns
LAYOUTS = ("aligned", "free")
SHIFTS = ("none", "fonts", "sizes", "damage")  # the last three are for tests, never to train on
MOST_LOOKALIKES = 10  # blocks per tile; no page has room for more
NOISE = 14  # standard deviation in grey levels, shift: damage
DAMAGED_QUALITY = 30  # of JPEG, shift: damage


@dataclass(frozen=True, kw_only=True)
class GlyphsConfig:
    """What GlyphDocs images to draw."""

    layout: str = "aligned"
    # Free layout: away from what is trained on, by other fonts, other sizes, or noise and strong JPEG.
    shift: str = "none"
    # Free layout: at most so many more blocks of symbols per tile, which look like text and say nothing.
    lookalikes: float = 0.0
    max_tiles: int = 6  # without the thumbnail, 1 to 6
    # Curriculum: text of the aligned layout is moved off its cells by up to so many px, 0 to 15.
    jitter: int = 0
    questions_per_image: int = 8
    comparisons_per_image: int = 1  # at most so many of the questions ask which of two values is greater
    # Curriculum: the fraction of images that are one tile of text with the single request to read it, and in
    # the free layout how many pairs of a letter and its digit such a text has at most; then the fraction of
    # free pages with shapes alone.
    read_fraction: float = 0.0
    read_pairs: int = 16
    shapes_fraction: float = 0.0

    def __post_init__(self) -> None:
        known_shifts = f"one of {', '.join(SHIFTS)}, all but the first with layout free"
        check_settings(
            "glyphs",
            self,
            layout=(self.layout in LAYOUTS, f"one of {', '.join(LAYOUTS)}"),
            shift=(self.shift in SHIFTS[: None if self.layout == "free" else 1], known_shifts),
            jitter=(
                0 <= self.jitter <= (15 if self.layout == "aligned" else 0),
                "0 to 15, with layout aligned",
            ),
            lookalikes=(
                0 <= self.lookalikes <= (MOST_LOOKALIKES if self.layout == "free" else 0),
                f"0 to {MOST_LOOKALIKES}, with layout free",
            ),
            max_tiles=(1 <= self.max_tiles <= 6, "1 to 6"),
            questions_per_image=(self.questions_per_image >= 1, "at least 1"),
            comparisons_per_image=(self.comparisons_per_image >= 0, "0 or more"),
            read_pairs=(self.read_pairs >= 1, "at least 1"),
            read_fraction=(0 <= self.read_fraction <= 1, "0 to 1"),
            shapes_fraction=(
                0 <= self.shapes_fraction <= (self.layout == "free")
                and self.read_fraction + self.shapes_fraction <= 1,
                "0, or with layout free at most what read_fraction leaves of 1",
            ),
        )


def draw_records(
    config: GlyphsConfig, *, seed: int, start: int, count: int
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield `count` records from position `start` on; record i depends on (config, seed, i) alone."""
    for position in range(start, start + count):
        rng = np.random.default_rng([seed, position])
        drawn, only = rng.random(), ""
        if drawn < config.read_fraction:
            only = "text"
        elif drawn < config.read_fraction + config.shapes_fraction:
            only = "shapes"
        reads = only == "text"
        grids = [grid for grid in GRIDS if math.prod(grid) <= config.max_tiles]
        if config.layout == "free":
            image, scene = free.draw_image(
                rng,
                grids,
                only=only,
                max_pairs=config.read_pairs,
                lookalikes=config.lookalikes,
                shift=config.shift,
            )
        else:
            image, scene = aligned.draw_image(rng, grids, reads=reads, jitter=config.jitter)
        limits = {"count": config.questions_per_image, "comparisons": config.comparisons_per_image}
        questions = reading_questions(scene) if reads else choose_questions(rng, scene, **limits)
        texts = [text for question in questions for text in (question.text, question.answer)]
        texts[0] = f"<image>\n{texts[0]}"
        turns = [{"from": role, "value": text} for role, text in zip(cycle(("human", "gpt")), texts)]
        skills = [question.skill for question in questions]
        annotation = {"conversations": turns, "skills": skills}
        if scene.kinds:
            annotation["tile_kinds"] = scene.kinds
        content = json.dumps(annotation, separators=(",", ":")).encode()
        jpeg = _encode(rng, image, is_damaged=config.shift == "damage")
        yield f"{position:08d}", {"jpg": jpeg, "json": content}


def _encode(rng: np.random.Generator, image: Image.Image, *, is_damaged: bool) -> bytes:
    if is_damaged:
        pixels = np.asarray(image, np.float64)
        noisy = pixels + NOISE * rng.standard_normal(pixels.shape)
        image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=DAMAGED_QUALITY if is_damaged else 92)
    return jpeg.getvalue()
