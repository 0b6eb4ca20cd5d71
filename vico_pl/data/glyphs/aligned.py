"""The aligned layout of GlyphDocs: a grid of tiles, each of one kind.

    dense_text   a 4 x 4 grid of cells, each a letter and its digit: "F0"
    faint_text   the same with fewer cells and little contrast
    shape        one large coloured shape
    texture      noise, stripes or checks: many edges, no meaning
    blank        plain ground or a gradient

A letter and its digit share one 16 px cell, which is one vision token at ratio 4; at ratio 16 four cells
share one. `jitter` moves the text of a tile off these cells: a curriculum step towards the free layout.
"""

import math
import string
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vico_pl.data.glyphs.scene import COLOURS, SHAPES, TILE, Grid, Rng, Scene, draw_shape

CELL = 16  # px; one vision token at ratio 4
FONT = ImageFont.load_default(12)
TILE_KINDS = {"dense_text": 0.2, "faint_text": 0.1, "shape": 0.3, "texture": 0.2, "blank": 0.2}  # shares
MAX_PER_IMAGE = {"dense_text": 1, "faint_text": 1, "shape": 2}  # each letter once: 26 do for two tiles


def draw_image(rng: Rng, grids: Sequence[Grid], *, reads: bool, jitter: int) -> tuple[Image.Image, Scene]:
    """Draw an image of one of the grids; one that `reads` is a single tile of dense text.

    The text of a tile is moved by up to `jitter` px, 0 to 15, right and down.
    """
    scene = Scene(kinds=["dense_text"])
    if not reads:
        scene.grid = grids[int(rng.integers(len(grids)))]
        scene.kinds = _choose_kinds(rng, math.prod(scene.grid))
    rows, columns = scene.grid
    image = Image.new("RGB", (columns * TILE, rows * TILE))
    for index, kind in enumerate(scene.kinds):
        tile = PAINTERS[kind](rng, scene, jitter)
        image.paste(tile, (index % columns * TILE, index // columns * TILE))
    return image, scene


def _choose_kinds(rng: Rng, num_tiles: int) -> list[str]:
    """Draw tile kinds within the limits of letters and shapes until there is something to ask about."""
    names, shares = list(TILE_KINDS), list(TILE_KINDS.values())
    while True:
        kinds = [names[i] for i in rng.choice(len(names), num_tiles, p=shares)]
        within = all(kinds.count(kind) <= limit for kind, limit in MAX_PER_IMAGE.items())
        if within and any(kind in MAX_PER_IMAGE for kind in kinds):
            return kinds


def _paint_dense_text(rng: Rng, scene: Scene, jitter: int) -> Image.Image:
    ground, ink = int(rng.integers(200, 256)), int(rng.integers(0, 70))
    return _paint_text(rng, scene, cells=int(rng.integers(11, 15)), ground=ground, ink=ink, jitter=jitter)


def _paint_faint_text(rng: Rng, scene: Scene, jitter: int) -> Image.Image:
    ground, cells = int(rng.integers(190, 256)), int(rng.integers(6, 11))
    return _paint_text(
        rng, scene, cells=cells, ground=ground, ink=ground - int(rng.integers(60, 90)), jitter=jitter
    )


def _paint_text(rng: Rng, scene: Scene, *, cells: int, ground: int, ink: int, jitter: int) -> Image.Image:
    tile = Image.new("RGB", (TILE, TILE), (ground,) * 3)
    draw, per_row = ImageDraw.Draw(tile), TILE // CELL
    left, top = _draw_offset(rng, jitter) if jitter else (0, 0)
    if left or top:  # there is room for one row and one column less
        per_row -= 1
        cells = min(cells, per_row**2 - 1)
    unused = [letter for letter in string.ascii_uppercase if letter not in scene.values]
    places = np.sort(rng.choice(per_row**2, cells, replace=False))
    for place, letter in zip(places, rng.permutation(unused)[:cells].tolist(), strict=True):
        digit = scene.values[letter] = str(rng.integers(10))
        x = left + place % per_row * CELL
        y = top + place // per_row * CELL + int(rng.integers(-1, 2))
        for offset, glyph in ((4, letter), (12, digit)):
            draw.text((x + offset, y + CELL // 2), glyph, fill=(ink,) * 3, font=FONT, anchor="mm")
    return tile


def _draw_offset(rng: Rng, jitter: int) -> tuple[int, int]:
    """Draw how far text is moved, in px: first a limit, then both distances up to it."""
    most = int(rng.integers(jitter + 1))
    return int(rng.integers(most + 1)), int(rng.integers(most + 1))


def _paint_shape(rng: Rng, scene: Scene, _: int) -> Image.Image:
    ground = (int(rng.integers(205, 256)),) * 3
    shape = str(rng.choice([s for s in SHAPES if s not in scene.shapes]))
    colour = scene.shapes[shape] = str(rng.choice(list(COLOURS)))
    radius = int(rng.integers(18, 27))
    x, y = (int(rng.integers(radius + 2, TILE - radius - 1)) for _ in range(2))
    ink = tuple(int(np.clip(v + rng.integers(-12, 13), 0, 255)) for v in COLOURS[colour])
    tile = Image.new("RGB", (TILE, TILE), ground)
    draw_shape(ImageDraw.Draw(tile), shape, (x, y), radius, ink=ink, ground=ground)
    return tile


def _paint_texture(rng: Rng, scene: Scene, _: int) -> Image.Image:
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


def _paint_blank(rng: Rng, scene: Scene, _: int) -> Image.Image:
    corners = rng.integers(120, 256, (2, 3))
    if rng.random() < 0.5:
        corners[1] = corners[0]
    ramp = np.linspace(0, 1, TILE)[:, None, None] * np.ones((1, TILE, 1))
    if rng.random() < 0.5:
        ramp = ramp.transpose(1, 0, 2)
    return Image.fromarray((corners[0] * (1 - ramp) + corners[1] * ramp).astype(np.uint8))


PAINTERS: dict[str, Callable[[Rng, Scene, int], Image.Image]] = {
    "dense_text": _paint_dense_text,
    "faint_text": _paint_faint_text,
    "shape": _paint_shape,
    "texture": _paint_texture,
    "blank": _paint_blank,
}
