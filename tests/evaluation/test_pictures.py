import numpy as np
import pytest
import torch
from PIL import ImageColor

from vico_pl.evaluation import pictures
from vico_pl.evaluation.pictures import COMPRESSED, FRAME, GAP, KEPT, MARK_HEIGHT, THUMBNAIL, draw_routing

NOISE = torch.randint(0, 256, (3, 64, 128), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
WHITE = torch.full((3, 64, 128), 255, dtype=torch.uint8)


def draw(image, ratios, *, grid=(2, 1), caption=""):
    return draw_routing(image, grid=grid, ratios=ratios, tokens=[64 // r for r in ratios], caption=caption)


def card(drawn, column, *, grid=(2, 1), row=0):
    """Cut out a tile with its frame."""
    side = pictures._tile_side(grid)
    width, height = side + 2 * FRAME, side + MARK_HEIGHT + FRAME
    x, y = column * (width + GAP), row * (height + GAP)
    return np.asarray(drawn.crop((x, y, x + width, y + height)), dtype=float)


def inside(tile):
    return tile[MARK_HEIGHT:-FRAME, FRAME:-FRAME]


def frame_is(tile, colour):
    return (tile[-1, :] == ImageColor.getrgb(colour)).all()


def test_compressed_tile_is_darker_and_flatter_than_a_kept_one():
    white, noise = draw(WHITE, [4, 16]), draw(NOISE, [4, 16])
    assert (inside(card(white, 0)) == 255).all()
    assert inside(card(white, 1)).max() < 170
    assert inside(card(noise, 1)).std() < 0.6 * inside(card(noise, 0)).std()


def test_a_coarser_ratio_dims_more():
    drawn = draw(WHITE, [64, 16])
    assert inside(card(drawn, 0)).mean() < inside(card(drawn, 1)).mean() - 20


def test_frames_tell_kept_from_compressed_in_row_order():
    grid = (2, 2)
    drawn = draw(WHITE, [16, 4, 4, 16], grid=grid)
    kept = [frame_is(card(drawn, i % 2, grid=grid, row=i // 2), KEPT) for i in range(4)]
    assert kept == [False, True, True, False]
    assert frame_is(card(drawn, 0, grid=grid), COMPRESSED)


def test_tiles_show_their_part_of_the_image():
    image = torch.zeros(3, 64, 128, dtype=torch.uint8)
    image[0, :, 64:] = 255  # the right half is red
    drawn = draw(image, [4, 4])
    assert inside(card(drawn, 0))[:, :-20].max() == 0
    assert (inside(card(drawn, 1))[:, 20:].mean((0, 1)) == (255, 0, 0)).all()


@pytest.mark.parametrize(("ratio", "colour"), [(4, KEPT), (16, COMPRESSED)])
def test_thumbnail_stands_beside_with_its_own_state(ratio, colour):
    without, drawn = draw(WHITE, [4, 16]), draw(WHITE, [4, 16, ratio])
    x = without.width + 2 * GAP
    assert drawn.width == x + THUMBNAIL + 2 * FRAME
    assert drawn.getpixel((x, 40)) == ImageColor.getrgb(colour)
    middle = drawn.getpixel((x + THUMBNAIL // 2, THUMBNAIL // 2))
    assert (middle == (255, 255, 255)) == (ratio == 4)


@pytest.mark.parametrize("grid", [(1, 1), (3, 1), (1, 3), (3, 2), (4, 3), (2, 5)])
def test_tiles_are_readable_and_the_page_is_not_wide(grid):
    ratios = [4] * (grid[0] * grid[1] + 1)
    assert pictures._tile_side(grid) >= 150
    assert draw(WHITE, ratios, grid=grid).width <= 950


def test_tokens_are_written_above_each_tile(monkeypatch):
    written = []
    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.text", lambda self, xy, text, **_: written.append(text))
    draw_routing(WHITE, grid=(2, 1), ratios=[4, 16, 16], tokens=[256, 64, 64], caption="What colour?\nred")
    assert written[:2] == ["256 tokens", "64 tokens"]
    assert "384 of 768 vision tokens (50 %); dimmed: compressed" in written
    assert written[-2:] == ["What colour?", "red"]


def test_long_captions_are_wrapped():
    short, long = (draw(WHITE, [4, 16], caption=text) for text in ("word", "word " * 200))
    assert long.width == short.width
    assert long.height > short.height + 100


@pytest.mark.parametrize(("ratios", "tokens"), [([4], [16]), ([4] * 4, [16] * 4), ([4, 4], [16])])
def test_lists_that_do_not_fit_the_grid_are_refused(ratios, tokens):
    with pytest.raises(ValueError, match="2 x 1 tiles"):
        draw_routing(WHITE, grid=(2, 1), ratios=ratios, tokens=tokens)
