"""What a GlyphDocs image shows, and the questions that follow from it."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import ImageDraw

TILE = 64  # px
COLOURS = {
    "red": (205, 30, 35),
    "green": (25, 150, 60),
    "blue": (35, 75, 215),
    "yellow": (240, 205, 20),
    "purple": (135, 45, 165),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
READ_QUESTION = "Read the text."

Rng = np.random.Generator
Rgb = tuple[int, ...]
Grid = tuple[int, int]  # rows, columns of tiles


class Question(NamedTuple):
    """A question, its answer and the skill it tests."""

    skill: str
    text: str
    answer: str


@dataclass
class Scene:
    """What an image shows; questions are made from it alone."""

    grid: Grid = (1, 1)
    kinds: list[str] = field(default_factory=list)  # of tiles, in the aligned layout
    shapes: dict[str, str] = field(default_factory=dict)  # shape -> colour
    values: dict[str, str] = field(default_factory=dict)  # letter -> digit, in reading order
    letters: set[str] = field(default_factory=set)  # on the page, also those that nobody asks about


def choose_questions(rng: Rng, scene: Scene, *, count: int, comparisons: int) -> list[Question]:
    """Draw up to `count` different questions, the skills in turn."""
    pools = [_perception(scene), _reasoning(rng, scene, comparisons), _ocr(scene)]
    for pool in pools:
        rng.shuffle(pool)
    chosen = list[Question]()
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
    """Ask for colours; in the aligned layout only for that of a single shape."""
    if scene.kinds and len(scene.shapes) > 1:
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


def reading_questions(scene: Scene) -> list[Question]:
    """Ask for all text of the image."""
    return [Question("ocr", READ_QUESTION, " ".join(k + v for k, v in scene.values.items()))]


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, centre: tuple[int, int], radius: int, *, ink: Rgb, ground: Rgb
) -> None:
    """Draw one of `SHAPES`; a ring shows the ground inside."""
    (x, y), side, inner = centre, radius * 17 // 20, radius * 11 // 20
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


def _box(x: int, y: int, half_width: int, half_height: int) -> tuple[int, int, int, int]:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _corners(x: int, y: int, radii: list[int]) -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / len(radii) - math.pi / 2 for i in range(len(radii))]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
