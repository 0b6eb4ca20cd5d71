import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from vico_pl.data.tiling import TilingConfig, choose_grid, tile_image, tile_sample
from vico_pl.types import Sample, Turn


def internvl_target_ratios(min_num, max_num):
    ratios = {
        (i, j)
        for n in range(min_num, max_num + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if min_num <= i * j <= max_num
    }
    return sorted(ratios, key=lambda x: x[0] * x[1])


def internvl_closest_aspect_ratio(aspect_ratio, target_ratios, width, height, image_size):
    """`find_closest_aspect_ratio` of InternVL's `dynamic_preprocess`."""
    best_ratio_diff = float("inf")
    best_ratio = (1, 1)
    area = width * height
    for ratio in target_ratios:
        target_aspect_ratio = ratio[0] / ratio[1]
        ratio_diff = abs(aspect_ratio - target_aspect_ratio)
        if ratio_diff < best_ratio_diff:
            best_ratio_diff = ratio_diff
            best_ratio = ratio
        elif ratio_diff == best_ratio_diff and area > 0.5 * image_size * image_size * ratio[0] * ratio[1]:
            best_ratio = ratio
    return best_ratio


def internvl_boxes(columns, rows, size):
    """The crops of `dynamic_preprocess`, in its order: (left, upper, right, lower)."""
    boxes = []
    for i in range(columns * rows):
        left, upper = (i % columns) * size, (i // columns) * size
        boxes.append((left, upper, left + size, upper + size))
    return boxes


def picture(width, height, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


@given(
    scale=st.integers(1, 1200),
    aspect=st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 1), (3, 2), (2, 3), (1, 3)]),
)
def test_ties_between_grids_of_one_aspect_ratio_go_as_internvls(scale, aspect):
    width, height = scale * aspect[0], scale * aspect[1]
    expected = internvl_closest_aspect_ratio(
        width / height, internvl_target_ratios(1, 12), width, height, 448
    )
    assert choose_grid(width, height, TilingConfig()) == expected


@given(
    width=st.integers(1, 3000), height=st.integers(1, 3000), low=st.integers(1, 12), high=st.integers(1, 24)
)
@example(width=1000, height=500, low=1, high=12)
@example(width=1400, height=700, low=1, high=12)
@example(width=1500, height=1000, low=1, high=2)
@example(width=896, height=448, low=1, high=12)
@example(width=5, height=4, low=2, high=3)  # as near to 1 x 2 as to 2 x 1
def test_the_grid_is_the_one_internvl_chooses(width, height, low, high):
    low, high = min(low, high), max(low, high)
    expected = internvl_closest_aspect_ratio(
        width / height, internvl_target_ratios(low, high), width, height, 448
    )
    assert choose_grid(width, height, TilingConfig(min_tiles=low, max_tiles=high)) == expected


@given(columns=st.integers(1, 3), rows=st.integers(1, 3))
def test_tiles_lie_row_by_row_and_the_thumbnail_is_last(columns, rows):
    size = 8
    config = TilingConfig(tile_size=size, min_tiles=columns * rows, max_tiles=columns * rows)
    image = picture(columns * size, rows * size)  # needs no resizing: tiles are exact crops
    tiles = tile_image(image, config)
    boxes = internvl_boxes(columns, rows, size)
    crops = [image[:, upper:lower, left:right] for left, upper, right, lower in boxes]
    assert len(tiles) == len(crops) + (len(crops) > 1)
    assert all(torch.equal(tile, crop) for tile, crop in zip(tiles, crops, strict=False))
    assert tiles.is_contiguous(memory_format=torch.channels_last)


def test_the_thumbnail_is_the_whole_image():
    image = torch.zeros(3, 16, 32, dtype=torch.uint8)
    image[0, :, :16] = 200  # red on the left, black on the right
    tiles = tile_image(image, TilingConfig(tile_size=16, max_tiles=2))
    assert len(tiles) == 3
    assert (tiles[0][0] == 200).all()
    assert (tiles[1][0] == 0).all()
    assert (tiles[2][0, :, :6] > 190).all()
    assert (tiles[2][0, :, -6:] < 10).all()


def test_one_tile_needs_no_thumbnail_and_thumbnails_can_be_left_out():
    assert len(tile_image(picture(20, 20), TilingConfig(tile_size=16))) == 1
    assert len(tile_image(picture(64, 32), TilingConfig(tile_size=16, use_thumbnail=False))) == 8


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 500), (500, 1), (3, 7)])
def test_tiny_and_narrow_images_become_tiles(width, height):
    tiles = tile_image(picture(width, height), TilingConfig(tile_size=16))
    assert tiles.shape[1:] == (3, 16, 16)
    assert 1 <= len(tiles) <= 13


def test_a_sample_keeps_its_images_in_order():
    images = [picture(32, 16), picture(16, 16, seed=1)]
    sample = Sample(id="x", images=images, turns=[Turn(role="human", text="q")], metadata={"a": 1})
    tiled = tile_sample(sample, TilingConfig(tile_size=16, max_tiles=4))
    assert tiled.tiles_per_image == [3, 1]
    assert tiled.tiles.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(tiled.tiles[3], images[1])
    assert (tiled.id, tiled.turns, tiled.metadata) == (sample.id, sample.turns, sample.metadata)


@pytest.mark.parametrize(("num_images", "share"), [(1, 12), (2, 6), (5, 2), (12, 1), (30, 1)])
def test_the_images_of_a_sample_share_its_tiles(num_images, share):
    config = TilingConfig(tile_size=8, max_tiles=12, use_thumbnail=False)
    sample = Sample(id="x", images=[picture(8 * 12, 8)] * num_images, turns=[], metadata={})
    assert tile_sample(sample, config).tiles_per_image == [share] * num_images


@given(width=st.integers(20, 90), height=st.integers(20, 90))
@example(width=12, height=90)  # Pillow 13 itself would begin with the columns
def test_pixels_are_those_of_pillows_bicubic_resize_rows_first(width, height):
    image = picture(width, height)
    (tile,) = tile_image(image, TilingConfig(tile_size=16, max_tiles=1))
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
    for size in ((16, height), (16, 16)):
        pillow = pillow.resize(size, Image.Resampling.BICUBIC)
    assert (tile.permute(1, 2, 0).int() - torch.from_numpy(np.array(pillow)).int()).abs().max() <= 2


def test_a_sample_of_text_alone_has_no_tiles():
    tiled = tile_sample(Sample(id="x", images=[], turns=[], metadata={}), TilingConfig(tile_size=16))
    assert tiled.tiles.shape == (0, 3, 16, 16)
    assert tiled.tiles_per_image == []
