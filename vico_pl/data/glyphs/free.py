"""The free layout of GlyphDocs: pages with their content at any pixel, on grounds from white to dark.

    text      lines of letters with their digits, "K3", small or large, half of them on a panel of their own
    shape     small or large
    texture   noise, stripes, checks or blocks, grey or coloured
    symbols   what looks like text and is never asked about

Tile borders cut through all of them, and most of a page is often empty. Small things are meant to need full
tokens and large ones not, so that colour, edges and contrast do not say which tiles matter.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vico_pl.data.glyphs.scene import COLOURS, SHAPES, TILE, Grid, Rgb, Rng, Scene, draw_shape

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold")
OTHER_FONTS = ("DejaVuSerif", "STIXGeneralBol", "cmss10", "DejaVuSans-BoldOblique")  # shift: fonts
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # I and O are too much like 1 and 0
SYMBOLS = "#%&*+=<>?/~$@"
LOOKALIKES = "#%&?$@*+"  # those with as much ink as letters
SMALL, LARGE = range(11, 15), range(24, 31)  # px, font sizes
OTHER_SIZES = {SMALL: (9, 10, 16, 17), LARGE: (20, 21, 34, 36)}  # px, shift: sizes
SMALL_SHAPE, LARGE_SHAPE = (7, 10), (17, 25)  # px, radii
MAX_LINES = {SMALL: (4, 5), LARGE: (2, 2)}  # pairs per line, lines
MAX_PAIRS = 16
MARGIN = 3  # px around everything
CONTRAST = 90  # grey levels between ink and ground, at least
MAX_SHAPES = 3
KINDS = {  # shares of what is placed
    "small_text": 0.2,
    "large_text": 0.17,
    "small_shape": 0.1,
    "large_shape": 0.18,
    "texture": 0.2,
    "symbols": 0.15,
}
PER_TILE = (0.35, 1.1)  # things placed per tile of a page, drawn uniformly
ATTEMPTS = 30  # to find a free place

Box = tuple[int, int, int, int]  # left, top, right, bottom, px


class Text(NamedTuple):
    """Pairs of glyphs in lines, and where to draw them."""

    font: ImageFont.FreeTypeFont
    lines: list[list[str]]
    pitch: tuple[int, int]  # px from pair to pair, and from line to line

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in px."""
        return max(map(len, self.lines)) * self.pitch[0], len(self.lines) * self.pitch[1]


class Page:
    """An image while it is drawn: what is on it, and where there is room."""

    def __init__(self, rng: Rng, grid: Grid, *, shift: str, is_plain: bool = False) -> None:
        self.rng, self.shift, self.is_plain = rng, shift, is_plain
        self.scene = Scene(grid=grid)
        self.width, self.height = grid[1] * TILE, grid[0] * TILE
        self.ground, self.image = self._paint_ground()
        self.draw = ImageDraw.Draw(self.image)
        self.taken: list[Box] = []

    def between(self, limits: tuple[int, int]) -> int:
        """Draw a whole number, both limits included."""
        return int(self.rng.integers(limits[0], limits[1] + 1))

    def chance(self, probability: float) -> bool:
        """Say yes with a probability."""
        return bool(self.rng.random() < probability)

    def place(self, width: int, height: int) -> Box | None:
        """Find room for a box and take it; None: there is none."""
        free = self.width - width, self.height - height
        if min(free) < 0:
            return None
        for _ in range(ATTEMPTS):
            left, top = (self.between((0, limit)) for limit in free)
            box = left, top, left + width, top + height
            if not any(_overlap(box, other) for other in self.taken):
                self.taken.append(box)
                return box
        return None

    def _paint_ground(self) -> tuple[float, Image.Image]:
        """Return the grey level and an image of it: slightly coloured, half of them with a gradient."""
        level = self.between((200, 255) if self.is_plain else (25, 255))
        tint = self.rng.integers(-12, 13, 3)
        slope = self.rng.uniform(-20, 20) if self.chance(0.5) else 0.0
        ramp = np.linspace(-slope, slope, self.height)[:, None, None] * np.ones((1, self.width, 1))
        if self.chance(0.5):
            ramp = np.linspace(-slope, slope, self.width)[:, None] * np.ones((self.height, 1, 1))
        pixels = np.clip(level + tint + ramp, 0, 255)
        return float(level), Image.fromarray(pixels.astype(np.uint8))


def draw_image(
    rng: Rng, grids: Sequence[Grid], *, only: str, max_pairs: int, lookalikes: float, shift: str
) -> tuple[Image.Image, Scene]:
    """Draw a page of one of the grids.

    `only` limits its content for a curriculum: "text", always on one tile, or "shapes"; "" does not. Other
    pages get up to `lookalikes` more blocks of symbols per tile.
    """
    grid = grids[int(rng.integers(len(grids)))]
    if only == "text":
        return _draw_reading_page(rng, max_pairs=max_pairs)
    if only == "shapes":
        return _draw_shapes_page(rng, grid)
    return _draw_page(rng, grid, lookalikes=lookalikes, shift=shift)


def _draw_page(rng: Rng, grid: Grid, *, lookalikes: float, shift: str) -> tuple[Image.Image, Scene]:
    """Draw a page with something to ask about."""
    names, shares = list(KINDS), list(KINDS.values())
    while True:
        page = Page(rng, grid, shift=shift)
        count = max(1, round(rng.uniform(*PER_TILE) * math.prod(grid)))
        for name in rng.choice(names, count, p=shares):
            PAINTERS[str(name)](page)
        if page.scene.shapes or page.scene.values:
            for _ in range(round(rng.uniform(0, lookalikes) * math.prod(grid)) if lookalikes else 0):
                _paint_symbols(page, LOOKALIKES)
            return page.image, page.scene


def _draw_reading_page(rng: Rng, *, max_pairs: int) -> tuple[Image.Image, Scene]:
    """Draw text of at most so many pairs.

    A model learns to read single pairs in small dark letters on a light ground first; then, with half of
    the pages on such a ground, all others.
    """
    while True:
        is_first = max_pairs == 1
        page = Page(rng, (1, 1), shift="none", is_plain=is_first or bool(rng.random() < 0.5))
        _paint_text(page, SMALL if is_first or page.chance(0.7) else LARGE, max_pairs=max_pairs)
        if page.scene.values:
            return page.image, page.scene


def _draw_shapes_page(rng: Rng, grid: Grid) -> tuple[Image.Image, Scene]:
    """Draw two shapes or three, so that it takes the shape to find a colour."""
    while True:
        page = Page(rng, grid, shift="none")
        for _ in range(MAX_SHAPES):
            _paint_shape(page, SMALL_SHAPE if page.chance(0.5) else LARGE_SHAPE)
        if len(page.scene.shapes) > 1:
            return page.image, page.scene


def _paint_text(page: Page, sizes: range, *, max_pairs: int = MAX_PAIRS) -> None:
    """Draw lines of pairs, with letters that the page does not have yet."""
    text = _choose_text(page, sizes, limit=min(max_pairs, len(LETTERS) - len(page.scene.letters)))
    box = page.place(*text.size) if text else None
    if text is not None and box is not None:
        _write_pairs(page, text, box)


def _write_pairs(page: Page, text: Text, box: Box) -> None:
    letters = iter(page.rng.permutation([x for x in LETTERS if x not in page.scene.letters]).tolist())
    lines = [[next(letters) + str(page.rng.integers(10)) for _ in line] for line in text.lines]
    for pair, where in _write(page, text._replace(lines=lines), box):
        page.scene.letters.add(pair[0])
        if _in_one_tile(where):  # a pair that a tile border cuts is on the page, but nobody asks about it
            page.scene.values[pair[0]] = pair[1]


def _paint_symbols(page: Page, symbols: str = SYMBOLS) -> None:
    """Draw what looks like text and says nothing."""
    text = _choose_text(page, SMALL if page.chance(0.7) else LARGE)
    box = page.place(*text.size) if text else None
    if text is not None and box is not None:
        lines = [["".join(page.rng.choice(list(symbols), 2)) for _ in line] for line in text.lines]
        _write(page, text._replace(lines=lines), box)


def _choose_text(page: Page, sizes: range, *, limit: int = MAX_PAIRS) -> Text | None:
    """Choose font, lines and pairs per line; None: not even one pair is possible."""
    possible = OTHER_SIZES[sizes] if page.shift == "sizes" else sizes
    fonts = OTHER_FONTS if page.shift == "fonts" else FONTS
    font = _font(str(page.rng.choice(fonts)), possible[page.between((0, len(possible) - 1))])
    wide, high = math.ceil(font.getlength("W8")), math.ceil(1.1 * font.size)
    pitch = wide + page.between((2, 4 + int(font.size) // 6)), high + page.between((0, 3))
    most = page.width // pitch[0], page.height // pitch[1]
    if min(*most, limit) < 1:
        return None
    columns, rows = (page.between((1, min(*limits))) for limits in zip(most, MAX_LINES[sizes], strict=True))
    columns = min(columns, limit)
    return Text(font, [[""] * columns for _ in range(min(rows, limit // columns))], pitch)


def _write(page: Page, text: Text, box: Box) -> list[tuple[str, Box]]:
    """Draw lines of pairs; return each with the box of its ink."""
    ground, ink = _inks(page)
    if ground is not None:
        page.draw.rectangle((box[0] - 1, box[1] - 1, box[2], box[3]), fill=ground)
    written = []
    for row, line in enumerate(text.lines):
        for column, pair in enumerate(line):
            x, y = box[0] + column * text.pitch[0] + 1, box[1] + row * text.pitch[1]
            left, top, right, bottom = text.font.getbbox(pair)
            y -= int(top) - 1
            page.draw.text((x, y), pair, fill=ink, font=text.font)
            written.append((pair, (x + int(left), y + int(top), x + int(right), y + int(bottom))))
    return written


def _inks(page: Page) -> tuple[Rgb | None, Rgb]:
    """Choose the colour of a panel, or none, and of ink that stands out from it or from the page."""
    panel, level = None, page.ground
    if page.is_plain:
        return None, (page.between((0, 70)),) * 3
    if page.chance(0.5):
        panel = page.rng.integers(20, 256, 3) if page.chance(0.4) else np.full(3, page.between((20, 255)))
        level = float(panel @ [0.3, 0.59, 0.11])
    far = [
        grey
        for grey in (page.between((0, 70)), page.between((185, 255)), page.between((60, 200)))
        if abs(grey - level) >= CONTRAST
    ]
    grey = far[page.rng.integers(len(far))] if far else (0 if level > 127 else 255)
    ink = np.full(3, grey) + (page.rng.integers(-40, 41, 3) if page.chance(0.4) else 0)
    return None if panel is None else _rgb(panel), _rgb(ink)


def _paint_shape(page: Page, radii: tuple[int, int]) -> None:
    unused = [shape for shape in SHAPES if shape not in page.scene.shapes]
    radius = page.between(radii)
    box = page.place(2 * radius + 2, 2 * radius + 2) if len(page.scene.shapes) < MAX_SHAPES else None
    if box is None:
        return
    ground = _rgb(np.asarray(page.image)[box[1] + radius, box[0] + radius])
    visible = [name for name, rgb in COLOURS.items() if np.abs(np.subtract(rgb, ground)).max() >= CONTRAST]
    colour = str(page.rng.choice(visible))
    shape = str(page.rng.choice(unused))
    page.scene.shapes[shape] = colour
    ink = _rgb(np.array(COLOURS[colour]) + page.rng.integers(-12, 13, 3))
    draw_shape(page.draw, shape, (box[0] + radius + 1, box[1] + radius + 1), radius, ink=ink, ground=ground)


def _paint_texture(page: Page) -> None:
    """Draw edges without meaning: noise, checks, stripes or blocks, grey or coloured."""
    width, height = (page.between((18, 64)) for _ in range(2))
    box = page.place(min(width, page.width), min(height, page.height))
    if box is None:
        return
    shape = box[3] - box[1], box[2] - box[0]
    dark, light = page.rng.integers(0, 110, 3), page.rng.integers(150, 256, 3)
    if page.chance(0.5):
        dark, light = np.full(3, dark[0]), np.full(3, light[0])
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    period, style = page.between((2, 6)), page.rng.integers(4)
    if style == 0:
        mask = page.rng.random(shape) < 0.5
    elif style == 1:
        mask = (rows // period + columns // period) % 2 == 0
    elif style == 2:
        mask = (rows * page.between((-2, 2)) + columns) // period % 2 == 0
    else:
        cells = page.rng.random((shape[0] // 4 + 1, shape[1] // 4 + 1)) < 0.5
        mask = np.kron(cells, np.ones((4, 4), bool))[: shape[0], : shape[1]]
    pixels = np.where(mask[..., None], dark, light).astype(np.uint8)
    page.image.paste(Image.fromarray(pixels), box[:2])


def _overlap(box: Box, other: Box) -> bool:
    apart = box[2] + MARGIN <= other[0] or other[2] + MARGIN <= box[0]
    return not (apart or box[3] + MARGIN <= other[1] or other[3] + MARGIN <= box[1])


def _in_one_tile(box: Box) -> bool:
    return box[0] // TILE == (box[2] - 1) // TILE and box[1] // TILE == (box[3] - 1) // TILE


def _rgb(values: np.ndarray) -> Rgb:
    return tuple(int(value) for value in np.clip(values, 0, 255))


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f"{mpl.get_data_path()}/fonts/ttf/{name}.ttf", size)


PAINTERS: dict[str, Callable[[Page], None]] = {
    "small_text": lambda page: _paint_text(page, SMALL),
    "large_text": lambda page: _paint_text(page, LARGE),
    "small_shape": lambda page: _paint_shape(page, SMALL_SHAPE),
    "large_shape": lambda page: _paint_shape(page, LARGE_SHAPE),
    "texture": _paint_texture,
    "symbols": _paint_symbols,
}
