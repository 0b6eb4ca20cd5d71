"""Image -> square tiles, as InternVL cuts them: grid nearest in aspect ratio, row by row, thumbnail last."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from vico_pl.data.shards.tars import SampleSize
from vico_pl.errors import check_settings
from vico_pl.types import Image, Sample, TiledSample

Size = tuple[int, int]  # width and height of an image in pixels
MAX_TILES = 1024  # of a sample; all grids of so many are tried
_resize = partial(resize, interpolation=InterpolationMode.BICUBIC, antialias=True)


@dataclass(frozen=True, kw_only=True)
class TilingConfig:
    """How images become tiles."""

    tile_size: int = 448  # px, side of a tile
    min_tiles: int = 1  # per image, thumbnail not counted
    max_tiles: int = 12  # per sample without thumbnails; divided equally among its images, at least 1 each
    use_thumbnail: bool = True  # add the whole image as one more tile when it was cut

    def __post_init__(self) -> None:
        is_range = 1 <= self.min_tiles <= self.max_tiles
        expected = f"1 to data.tiling.max_tiles ({self.max_tiles})"
        most = (self.max_tiles <= MAX_TILES, f"at most {MAX_TILES}")
        check_settings("data.tiling", self, min_tiles=(is_range, expected), max_tiles=most)

    def per_image(self, num_images: int) -> "TilingConfig":
        """Return the settings for each image of a sample with `num_images` of them."""
        limit = max(1, self.max_tiles // max(1, num_images))
        return replace(self, min_tiles=min(self.min_tiles, limit), max_tiles=limit)


def tile_sample(sample: Sample, config: TilingConfig) -> TiledSample:
    """Cut all images of a sample."""
    per_image = config.per_image(len(sample.images))
    tiles = [tile_image(image, per_image) for image in sample.images]
    none = torch.empty(0, 3, config.tile_size, config.tile_size, dtype=torch.uint8)
    return TiledSample(
        id=sample.id,
        tiles=tiles[0] if len(tiles) == 1 else torch.cat(tiles or [none]),  # a single image's are not copied
        tiles_per_image=[len(t) for t in tiles],
        turns=sample.turns,
        metadata=sample.metadata,
    )


def tile_image(image: Image, config: TilingConfig) -> UInt8[Tensor, "t 3 side side"]:
    """Cut one image: a 1000 x 500 image at 448 px becomes 2 x 1 tiles and a thumbnail.

    Tiles keep the decoder's channels-last memory format: converting would take as long as resizing.
    """
    _, height, width = image.shape
    columns, rows = choose_grid(width, height, config)
    size, num_cut = config.tile_size, columns * rows
    has_thumbnail = config.use_thumbnail and num_cut > 1
    shape = (num_cut + has_thumbnail, 3, size, size)
    tiles = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    resized = _resize(image, [rows * size, columns * size])
    grid = resized.unflatten(1, (rows, size)).unflatten(3, (columns, size))  # 3 rows H columns W
    tiles[:num_cut].unflatten(0, (rows, columns)).copy_(grid.permute(1, 3, 0, 2, 4))
    if has_thumbnail:
        tiles[-1] = _resize(image, [size, size])
    return tiles


def estimated_tiles(size: SampleSize, config: TilingConfig) -> list[int]:
    """Return how many tiles each image of a sample will have if all are shaped like its first.

    >>> estimated_tiles(SampleSize(text_tokens=25, num_images=2, width=1000, height=500), TilingConfig())
    [3, 3]
    """
    if min(size.width, size.height) < 1:
        return [1] * size.num_images
    tiles = _tiles_of_image((size.width, size.height), config.per_image(size.num_images))
    return [tiles] * size.num_images


def count_tiles(sizes: Sequence[Size], config: TilingConfig) -> int:
    """Return the number of tiles of a sample's images, thumbnails included."""
    per_image = config.per_image(len(sizes))
    return sum(_tiles_of_image(size, per_image) for size in sizes)


def choose_grid(width: int, height: int, config: TilingConfig) -> tuple[int, int]:
    """Return (columns, rows): nearest aspect ratio; on a tie the larger grid that the image fills to half.

    >>> choose_grid(1000, 500, TilingConfig())
    (2, 1)
    >>> choose_grid(1400, 700, TilingConfig())
    (4, 2)
    """
    aspect, area = width / height, width * height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in _grids(config.min_tiles, config.max_tiles):
        difference = abs(aspect - columns / rows)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif difference == best_difference and area > 0.5 * config.tile_size**2 * columns * rows:
            best = (columns, rows)
    return best


@lru_cache(maxsize=65536)
def _tiles_of_image(size: Size, config: TilingConfig) -> int:
    columns, rows = choose_grid(*size, config)
    return columns * rows + (config.use_thumbnail and columns * rows > 1)


@lru_cache
def _grids(min_tiles: int, max_tiles: int) -> list[tuple[int, int]]:
    """List grids by number of tiles; grids of the same number in the order of the released code.

    That order decides ties, and it is that of a Python set filled in just this way: hence no list.
    """
    grids = {
        (columns, rows)
        for limit in range(min_tiles, max_tiles + 1)
        for columns in range(1, limit + 1)
        for rows in range(1, min(limit, max_tiles // columns) + 1)
        if min_tiles <= columns * rows
    }
    return sorted(grids, key=lambda grid: grid[0] * grid[1])
