import json

import numpy as np
import pytest

from vico_pl.data.glyphs import GRIDS, GlyphsConfig, draw_records
from vico_pl.data.glyphs.aligned import draw_image
from vico_pl.data.glyphs.scene import COLOURS, READ_QUESTION, TILE


def records(count=20, *, seed=3, start=0, **settings):
    return list(draw_records(GlyphsConfig(**settings), seed=seed, start=start, count=count))


def annotations(*args, **settings):
    return [json.loads(files["json"]) for _, files in records(*args, **settings)]


def scenes(count=60):
    for seed in range(count):
        rng = np.random.default_rng(seed)
        yield rng, *draw_image(rng, GRIDS, reads=False, jitter=0)


def test_a_scene_matches_its_picture():
    for _, image, scene in scenes():
        rows, columns = scene.grid
        assert image.size == (columns * TILE, rows * TILE)
        assert len(scene.kinds) == rows * columns
        assert len(scene.shapes) == scene.kinds.count("shape")
        assert bool(scene.values) == bool({"dense_text", "faint_text"} & set(scene.kinds))
        assert scene.values or scene.shapes, "blank and textured tiles never stand alone"


def test_the_colour_of_a_shape_is_in_its_tile():
    checked = 0
    for _, image, scene in scenes():
        if scene.kinds.count("shape") != 1:
            continue
        place, columns = scene.kinds.index("shape"), scene.grid[1]
        x, y = place % columns * TILE, place // columns * TILE
        pixels = np.asarray(image)[y : y + TILE, x : x + TILE].reshape(-1, 3).astype(int)
        (colour,) = scene.shapes.values()
        distance = np.abs(pixels - np.array(COLOURS[colour])).max(1)
        assert (distance <= 12).sum() > 100
        checked += 1
    assert checked > 10


def test_a_reading_page_asks_for_all_its_text_in_reading_order():
    for annotation in annotations(5, read_fraction=1.0):
        assert annotation["tile_kinds"] == ["dense_text"]
        question, answer = annotation["conversations"]
        assert question["value"] == f"<image>\n{READ_QUESTION}"
        pairs = answer["value"].split()
        assert 11 <= len(pairs) <= 14
        assert all(pair[0].isupper() and pair[1].isdigit() for pair in pairs)
        assert len({pair[0] for pair in pairs}) == len(pairs)


def ink_of_reading_pages(jitter):
    drawn = [draw_image(np.random.default_rng(i), [(1, 1)], reads=True, jitter=jitter) for i in range(40)]
    pixels = np.stack([np.asarray(image.convert("L")).astype(int) for image, _ in drawn])
    return np.abs(pixels - pixels.max((1, 2), keepdims=True)) > 60, [len(scene.values) for _, scene in drawn]


def test_jitter_moves_text_across_the_borders_of_cells_and_never_out_of_the_tile():
    (upright, many), (moved, few) = ink_of_reading_pages(0), ink_of_reading_pages(15)
    assert upright[:, :, 15::16].mean() < 0.2 * upright.mean(), "gaps between cells"
    assert moved[:, :, 15::16].mean() > 0.5 * moved.mean()
    assert not moved[:, -1].any()
    assert not moved[:, :, -1].any()
    assert min(many) == 11
    assert sum(number <= 8 for number in few) > 20, "there is room for 3 x 3 cells"


def test_jitter_is_for_the_aligned_layout_alone():
    with pytest.raises(ValueError, match=r"jitter is 3; expected 0 to 15, with layout aligned"):
        GlyphsConfig(layout="free", jitter=3)
    with pytest.raises(ValueError, match="jitter is 16"):
        GlyphsConfig(jitter=16)
