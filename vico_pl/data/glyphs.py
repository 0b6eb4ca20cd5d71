"""GlyphDocs, the data set of the demo: images generated from a seed, with questions and their answers.

An image is a grid of 64 px tiles. Each tile is one of

    dense_text   a 4 x 4 grid of cells, each a letter and its digit: "F0"
    faint_text   the same with fewer cells and little contrast
    shape        one large coloured shape
    texture      noise, stripes or checks: many edges, no meaning
    blank        plain ground or a gradient

so that pixel detail is not meaning. Questions come in three skills: *perception* (the colour of a shape),
*reasoning* (count the shapes, compare two values) and *ocr* (the digit beside a letter, or all text of a
tile). A letter and its digit share one 16 px cell, which is one vision token at ratio 4; at ratio 16 four
cells share one.
"""

import io
import json
import math
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vico_pl.errors import check_settings

TILE, CELL = 64, 16  # px
FONT = ImageFont.load_default(12)
COLOURS = {
    "red": (205, 30, 35),
    "green": (25, 150, 60),
    "blue": (35, 75, 215),
    "yellow": (240, 205, 20),
    "purple": (135, 45, 165),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
GRIDS = ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (2, 3), (3, 2))  # rows, columns
TILE_KINDS = {"dense_text": 0.2, "faint_text": 0.1, "shape": 0.3, "texture": 0.2, "blank": 0.2}  # shares
MAX_PER_IMAGE = {"dense_text": 1, "faint_text": 1, "shape": 2}  # each letter once: 26 do for two tiles
READ_QUESTION = "Read the text."

Rng = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class GlyphsConfig:
    """What GlyphDocs images to draw."""

    max_tiles: int = 6  # without the thumbnail, 1 to 6
    questions_per_image: int = 8
    comparisons_per_image: int = 1  # at most so many of the questions ask which of two values is greater
    read_fraction: float = 0.0  # of images: one dense tile with the single request to read it (curriculum)

    def __post_init__(self) -> None:
        check_settings(
            "glyphs",
            self,
            max_tiles=(1 <= self.max_tiles <= 6, "1 to 6"),
            questions_per_image=(self.questions_per_image >= 1, "at least 1"),
            comparisons_per_image=(self.comparisons_per_image >= 0, "0 or more"),
            read_fraction=(0 <= self.read_fraction <= 1, "0 to 1"),
        )


class Question(NamedTuple):
    """A question, its answer and the skill it tests."""

    skill: str
    text: str
    answer: str


@dataclass
class Scene:
    """What an image shows; questions are made from it alone."""

    grid: tuple[int, int] = (1, 1)  # rows, columns
    kinds: list[str] = field(default_factory=list)
    shapes: dict[str, str] = field(default_factory=dict)  # shape -> colour
    values: dict[str, str] = field(default_factory=dict)  # letter -> digit, in reading order


def draw_records(
    config: GlyphsConfig, *, seed: int, start: int, count: int
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield `count` records from position `start` on; record i depends on (config, seed, i) alone."""
    for position in range(start, start + count):
        rng = np.random.default_rng([seed, position])
        reads = bool(rng.random() < config.read_fraction)
        image, scene = draw_image(rng, reading_page=reads, max_tiles=config.max_tiles)
        questions = _reading(scene) if reads else choose_questions(rng, scene, config)
        texts = [text for question in questions for text in (question.text, question.answer)]
        texts[0] = f"<image>\n{texts[0]}"
        turns = [{"from": role, "value": text} for role, text in zip(cycle(("human", "gpt")), texts)]
        skills = [question.skill for question in questions]
        annotation = {"conversations": turns, "skills": skills, "tile_kinds": scene.kinds}
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=92)
        content = json.dumps(annotation, separators=(",", ":")).encode()
        yield f"{position:08d}", {"jpg": jpeg.getvalue(), "json": content}


def draw_image(rng: Rng, *, reading_page: bool, max_tiles: int) -> tuple[Image.Image, Scene]:
    """Draw one image; a reading page is a single dense tile."""
    scene = Scene(kinds=["dense_text"])
    if not reading_page:
        grids = [grid for grid in GRIDS if math.prod(grid) <= max_tiles]
        scene.grid = grids[rng.integers(len(grids))]
        scene.kinds = _choose_kinds(rng, math.prod(scene.grid))
    rows, columns = scene.grid
    image = Image.new("RGB", (columns * TILE, rows * TILE))
    for index, kind in enumerate(scene.kinds):
        tile = PAINTERS[kind](rng, scene)
        image.paste(tile, (index % columns * TILE, index // columns * TILE))
    return image, scene


def choose_questions(rng: Rng, scene: Scene, config: GlyphsConfig) -> list[Question]:
    """Draw up to `questions_per_image` different questions, the skills in turn."""
    pools = [_perception(scene), _reasoning(rng, scene, config.comparisons_per_image), _ocr(scene)]
    for pool in pools:
        rng.shuffle(pool)
    count, chosen = config.questions_per_image, list[Question]()
    while len(chosen) < count and any(pools):
        chosen += [pool.pop() for pool in pools if pool]
    chosen = chosen[:count]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def question_words() -> list[str]:
    """Return sentences with every word of GlyphDocs, to build a tokenizer from."""
    shapes = dict(zip(SHAPES, COLOURS, strict=True))
    scene = Scene(shapes=shapes, values={"A": "0", "B": "1"})
    questions = [q for shape, colour in shapes.items() for q in _perception(Scene(shapes={shape: colour}))]
    questions += [*_reasoning(np.random.default_rng(0), scene, 1), *_ocr(scene)]
    return [q.text for q in questions] + [q.answer for q in questions] + [READ_QUESTION]


def _perception(scene: Scene) -> list[Question]:
    """Ask for the colour of a single shape: the tiny model cannot learn which of two has which."""
    if len(scene.shapes) > 1:
        return []
    return [Question("perception", f"What colour is the {s}?", c) for s, c in scene.shapes.items()]


def _reasoning(rng: Rng, scene: Scene, num_comparisons: int) -> list[Question]:
    questions = [Question("reasoning", "How many shapes are there?", str(len(scene.shapes)))]
    letters = list(scene.values)
    for _ in range(num_comparisons if len(letters) > 1 else 0):
        a, b = (letters[i] for i in rng.choice(len(letters), 2, replace=False))
        if scene.values[a] != scene.values[b]:
            greater = max(a, b, key=scene.values.__getitem__)
            answer = f"{a}{scene.values[a]} {b}{scene.values[b]} {greater}"
            questions.append(Question("reasoning", f"Which is greater, {a} or {b}?", answer))
    return list({question.text: question for question in questions}.values())


def _ocr(scene: Scene) -> list[Question]:
    return [Question("ocr", f"What is the value of {k}?", v) for k, v in scene.values.items()]


def _reading(scene: Scene) -> list[Question]:
    return [Question("ocr", READ_QUESTION, " ".join(k + v for k, v in scene.values.items()))]


def _choose_kinds(rng: Rng, num_tiles: int) -> list[str]:
    """Draw tile kinds within the limits of letters and shapes until there is something to ask about."""
    names, shares = list(TILE_KINDS), list(TILE_KINDS.values())
    while True:
        kinds = [names[i] for i in rng.choice(len(names), num_tiles, p=shares)]
        within = all(kinds.count(kind) <= limit for kind, limit in MAX_PER_IMAGE.items())
        if within and any(kind in MAX_PER_IMAGE for kind in kinds):
            return kinds


def _paint_dense_text(rng: Rng, scene: Scene) -> Image.Image:
    ground, ink = int(rng.integers(200, 256)), int(rng.integers(0, 70))
    return _paint_text(rng, scene, cells=int(rng.integers(11, 15)), ground=ground, ink=ink)


def _paint_faint_text(rng: Rng, scene: Scene) -> Image.Image:
    ground, cells = int(rng.integers(190, 256)), int(rng.integers(6, 11))
    return _paint_text(rng, scene, cells=cells, ground=ground, ink=ground - int(rng.integers(60, 90)))


def _paint_text(rng: Rng, scene: Scene, *, cells: int, ground: int, ink: int) -> Image.Image:
    tile = Image.new("RGB", (TILE, TILE), (ground,) * 3)
    draw, per_row = ImageDraw.Draw(tile), TILE // CELL
    unused = [letter for letter in string.ascii_uppercase if letter not in scene.values]
    places = np.sort(rng.choice(per_row**2, cells, replace=False))
    for place, letter in zip(places, rng.permutation(unused)[:cells].tolist(), strict=True):
        digit = scene.values[letter] = str(rng.integers(10))
        x, y = place % per_row * CELL, place // per_row * CELL + int(rng.integers(-1, 2))
        for offset, glyph in ((4, letter), (12, digit)):
            draw.text((x + offset, y + CELL // 2), glyph, fill=(ink,) * 3, font=FONT, anchor="mm")
    return tile


def _paint_shape(rng: Rng, scene: Scene) -> Image.Image:
    ground = (int(rng.integers(205, 256)),) * 3
    shape = str(rng.choice([s for s in SHAPES if s not in scene.shapes]))
    colour = scene.shapes[shape] = str(rng.choice(list(COLOURS)))
    radius = int(rng.integers(18, 27))
    x, y = (int(rng.integers(radius + 2, TILE - radius - 1)) for _ in range(2))
    ink = tuple(int(np.clip(v + rng.integers(-12, 13), 0, 255)) for v in COLOURS[colour])
    tile = Image.new("RGB", (TILE, TILE), ground)
    draw, side, inner = ImageDraw.Draw(tile), radius * 17 // 20, radius * 11 // 20
    if shape in ("circle", "ring"):
        draw.ellipse(_box(x, y, radius, radius), fill=ink)
        if shape == "ring":
            draw.ellipse(_box(x, y, inner, inner), fill=ground)
    elif shape == "square":
        draw.rectangle(_box(x, y, side, side), fill=ink)
    elif shape == "cross":
        draw.rectangle(_box(x, y, radius, radius // 3), fill=ink)
        draw.rectangle(_box(x, y, radius // 3, radius), fill=ink)
    else:
        radii = [radius] * 3 if shape == "triangle" else [radius, radius * 2 // 5] * 5  # of a star
        draw.polygon(_corners(x, y, radii), fill=ink)
    return tile


def _box(x: int, y: int, half_width: int, half_height: int) -> tuple[int, int, int, int]:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _corners(x: int, y: int, radii: list[int]) -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / len(radii) - math.pi / 2 for i in range(len(radii))]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _paint_texture(rng: Rng, scene: Scene) -> Image.Image:
    dark, light = rng.integers(0, 110, 3), rng.integers(150, 256, 3)
    rows, columns = np.mgrid[0:TILE, 0:TILE]
    period, style = int(rng.integers(2, 7)), rng.integers(4)
    if style == 0:
        mask = rng.random((TILE, TILE)) < 0.5
    elif style == 1:
        mask = (rows // period + columns // period) % 2 == 0
    elif style == 2:
        mask = (rows * int(rng.integers(-2, 3)) + columns) // period % 2 == 0
    else:
        mask = np.kron(rng.random((TILE // 4, TILE // 4)) < 0.5, np.ones((4, 4), bool))
    return Image.fromarray(np.where(mask[..., None], dark, light).astype(np.uint8))


def _paint_blank(rng: Rng, scene: Scene) -> Image.Image:
    corners = rng.integers(120, 256, (2, 3))
    if rng.random() < 0.5:
        corners[1] = corners[0]
    ramp = np.linspace(0, 1, TILE)[:, None, None] * np.ones((1, TILE, 1))
    if rng.random() < 0.5:
        ramp = ramp.transpose(1, 0, 2)
    return Image.fromarray((corners[0] * (1 - ramp) + corners[1] * ramp).astype(np.uint8))


PAINTERS: dict[str, Callable[[Rng, Scene], Image.Image]] = {
    "dense_text": _paint_dense_text,
    "faint_text": _paint_faint_text,
    "shape": _paint_shape,
    "texture": _paint_texture,
    "blank": _paint_blank,
}
