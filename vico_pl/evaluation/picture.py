"""A routed image as a picture: which tiles kept their vision tokens, and what that cost."""

from collections.abc import Sequence

import PIL.Image
from PIL import ImageDraw, ImageFont

from vico_pl.data.shards.preview import MUTED, below, beside, text_block, to_pillow
from vico_pl.model.connector import FULL_RATIO
from vico_pl.types import Image

MAX_WIDTH, MAX_HEIGHT = 900, 640  # px, but tiles stay readable in a very wide or tall grid too
MIN_SIDE, MAX_SIDE = 150, 300  # px, of a tile
THUMBNAIL = 150  # px
FRAME, MARK_HEIGHT = 3, 26  # px, around and above a tile
GAP = 6  # px between tiles
MIN_CAPTION = 420  # px
KEPT, COMPRESSED = "#0072b2", "#4b5563"  # frame and mark
DIM_TO = (74, 78, 88)  # light and dark pixels both fade towards it: it shows on paper and in photographs


def draw_routing(
    image: Image, *, grid: tuple[int, int], ratios: Sequence[int], tokens: Sequence[int], caption: str = ""
) -> PIL.Image.Image:
    """Draw an image as the model saw it: square tiles with their vision tokens, compressed ones dimmed.

    Args:
        image: the whole image, before tiling.
        grid: (columns, rows) of tiles.
        ratios: patches per vision token of every tile, row by row, the thumbnail last if there is one.
        tokens: vision tokens of every tile, in the same order.
        caption: lines below the picture; the tokens spent are added to them.

    Raises:
        ValueError: the lists do not fit the grid.
    """
    columns, rows = grid
    if len(ratios) not in (columns * rows, columns * rows + 1) or len(tokens) != len(ratios):
        raise ValueError(
            f"{len(ratios)} ratios and {len(tokens)} token counts for {columns} x {rows} tiles; "
            "expected one each, and one more with a thumbnail"
        )
    picture = to_pillow(image)
    states = list(zip(ratios, tokens, strict=True))
    body = [_draw_grid(picture, grid=grid, states=states)]
    if len(states) > columns * rows:
        body.append(_draw_thumbnail(picture, state=states[-1]))
    page = beside(body, gap=2 * GAP)
    width = max(page.width, MIN_CAPTION)
    lines = [text_block(_spent(states), width=width, size=16, colour=MUTED)]
    if caption:
        lines.append(text_block(caption, width=width))
    return below([page, *lines], gap=8)


def _draw_grid(
    picture: PIL.Image.Image, *, grid: tuple[int, int], states: Sequence[tuple[int, int]]
) -> PIL.Image.Image:
    columns, rows = grid
    side = _tile_side(grid)
    resized = _resize(picture, width=columns * side, height=rows * side)
    lines = []
    for y in range(rows):
        boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for x in range(columns)]
        row = zip(boxes, states[y * columns : (y + 1) * columns], strict=True)
        lines.append(beside([_draw_tile(resized.crop(box), state=state) for box, state in row], gap=GAP))
    return below(lines, gap=GAP)


def _draw_thumbnail(picture: PIL.Image.Image, *, state: tuple[int, int]) -> PIL.Image.Image:
    tile = _draw_tile(_resize(picture, width=THUMBNAIL, height=THUMBNAIL), state=state)
    return below([tile, text_block("thumbnail", width=THUMBNAIL, size=15, colour=MUTED)], gap=4)


def _tile_side(grid: tuple[int, int]) -> int:
    columns, rows = grid
    fitting = min((MAX_WIDTH - THUMBNAIL) // columns - GAP, MAX_HEIGHT // rows - MARK_HEIGHT - GAP)
    return min(max(fitting, MIN_SIDE), MAX_SIDE)


def _resize(picture: PIL.Image.Image, *, width: int, height: int) -> PIL.Image.Image:
    return picture.resize((width, height), PIL.Image.Resampling.LANCZOS)


def _draw_tile(tile: PIL.Image.Image, *, state: tuple[int, int]) -> PIL.Image.Image:
    """Dim a compressed tile (the more, the coarser) and frame it, its vision tokens written above."""
    ratio, tokens = state
    colour = KEPT if ratio <= FULL_RATIO else COMPRESSED
    if ratio > FULL_RATIO:
        ground = PIL.Image.new("RGB", tile.size, DIM_TO)
        tile = PIL.Image.blend(ground, tile, (FULL_RATIO / ratio) ** 0.6)
    card = PIL.Image.new("RGB", (tile.width + 2 * FRAME, tile.height + MARK_HEIGHT + FRAME), colour)
    card.paste(tile, (FRAME, MARK_HEIGHT))
    font = ImageFont.load_default(17)
    place = (3 * FRAME, MARK_HEIGHT / 2)
    ImageDraw.Draw(card).text(place, f"{tokens} tokens", font=font, fill="#ffffff", anchor="lm")
    return card


def _spent(states: Sequence[tuple[int, int]]) -> str:
    spent = sum(tokens for _, tokens in states)
    full = sum(tokens * ratio // FULL_RATIO for ratio, tokens in states)
    return f"{spent} of {full} vision tokens ({100 * spent / full:.0f} %); dimmed: compressed"
