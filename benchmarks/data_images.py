"""Time from JPEG bytes to tiles: ours, its stages alone, InternVL's recipe and transformers."""

import io
import json
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import harness  # noqa: F401 - one thread, set before torch is imported
import numpy as np
import PIL.Image
import torch
from data_turns import Round, speedup, take_turns, time_rows
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from vico_pl.data.decode import decode_record
from vico_pl.data.tiling import TilingConfig, choose_grid, tile_sample
from vico_pl.types import Record

WIDTH, HEIGHT, QUALITY = 1000, 800, 90
TILE = 448  # px
MAX_TILES = {5: 4, 13: 12}  # tiles of such an image with its thumbnail -> the most it may be cut into
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STAGES = ("decode", "resize", "thumbnail", "copy")
TITLES = {
    "ours": "`decode_record` and `tile_sample`: uint8 tiles",
    "decode": "its stages alone: torchvision's `decode_image`",
    "resize": "resizing to the grid",
    "thumbnail": "resizing to the thumbnail",
    "copy": "copying as many bytes as the tiles have",
    "internvl": "InternVL's recipe: Pillow, each tile transformed to float32",
    "transformers": "transformers' `GotOcr2ImageProcessor` on torchvision's pixels: float32 tiles",
}


def measure_tiles(*, images: int, rounds: int) -> dict[str, list[Round]]:
    """Return rounds of seconds for `images` images, by number of tiles."""
    contents = [draw_jpeg(seed) for seed in range(images)]
    return {str(tiles): _measure(contents, tiles, rounds=rounds) for tiles in MAX_TILES}


def tile_figures(measured: dict[str, list[Round]]) -> dict[str, float]:
    """Return our speedup over the others, and the sum of our stages over the whole."""
    figures = {}
    for tiles, rounds in measured.items():
        stages = [{**round_, "stages": sum(round_[name] for name in STAGES)} for round_ in rounds]
        figures[f"tiles_{tiles}_over_internvl"] = speedup(rounds, "internvl")
        figures[f"tiles_{tiles}_over_transformers_fast"] = speedup(rounds, "transformers")
        figures[f"tiles_{tiles}_over_sum_of_stages"] = speedup(stages, "stages")
    return figures


def tile_table(measured: dict[str, list[Round]], *, images: int) -> list[str]:
    """Return the tables of times."""
    lines = []
    for tiles, rounds in measured.items():
        lines += [
            f"| {WIDTH} x {HEIGHT} JPEG to {tiles} tiles | ms (lowest to highest) | images/s |",
            "|---|---|---|",
            *time_rows(rounds, TITLES, repeats=images),
            "",
        ]
    return lines


def draw_jpeg(seed: int, *, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """Draw noise at many scales, stronger at coarser ones, as in a photo."""
    generator = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0, dtype=np.float32)
    for cells in (4, 8, 16, 32, 64, 128, 256, 1000):
        noise = generator.normal(size=(3, max(2, cells * height // width), cells)).astype(np.float32)
        for channel, coarse in enumerate(noise):
            fine = PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)
            pixels[..., channel] += 70 * cells**-0.5 * np.asarray(fine)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _measure(contents: list[bytes], tiles: int, *, rounds: int) -> list[Round]:
    runs = {name: partial(_for_each, run, contents) for name, run in runs_of(contents[0], tiles).items()}
    return take_turns(runs, rounds=rounds)


def _for_each(run: Callable[[bytes], Tensor], contents: list[bytes]) -> None:
    for content in contents:
        run(content)


def runs_of(content: bytes, tiles: int) -> dict[str, Callable[[bytes], Tensor]]:
    """Return what is measured, by name; the stages that follow decoding work on the pixels of one image.

    Raises:
        RuntimeError: an implementation makes another number of tiles.
    """
    config = TilingConfig(max_tiles=MAX_TILES[tiles], tile_size=TILE)
    columns, rows = choose_grid(WIDTH, HEIGHT, config)
    pixels, cut = _decode(content), _ours(content, config)
    whole = {
        "ours": partial(_ours, config=config),
        "internvl": partial(_internvl, grid=(columns, rows)),
        "transformers": partial(_transformers, max_tiles=config.max_tiles),
    }
    stages = {
        "decode": _decode,
        "resize": lambda _: _resize(pixels, rows * TILE, columns * TILE),
        "thumbnail": lambda _: _resize(pixels, TILE, TILE),
        "copy": lambda _: cut.clone(),
    }
    for name, run in whole.items():
        if (shape := run(content).shape) != (tiles, 3, TILE, TILE):
            raise RuntimeError(f"{name} made tiles of shape {tuple(shape)}, not {tiles} of {TILE} px")
    return {name: {**whole, **stages}[name] for name in TITLES}


def _ours(content: bytes, config: TilingConfig) -> Tensor:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a photo"}]
    annotation = json.dumps({"conversations": turns}).encode()
    record = Record(shard="photos.tar", key="0", files={"jpg": content, "json": annotation})
    return tile_sample(decode_record(record), config).tiles


def _decode(content: bytes) -> Tensor:
    return decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    bicubic = v2.InterpolationMode.BICUBIC
    return v2.functional.resize(pixels, [height, width], interpolation=bicubic, antialias=True)


def _internvl(content: bytes, grid: tuple[int, int]) -> Tensor:
    """Run InternVL's `load_image` without choosing the grid, which takes no time."""
    image = PIL.Image.open(io.BytesIO(content)).convert("RGB")
    columns, rows = grid
    resized = image.resize((columns * TILE, rows * TILE))  # Pillow's default, bicubic
    corners = [(column * TILE, row * TILE) for row in range(rows) for column in range(columns)]
    tiles = [resized.crop((left, top, left + TILE, top + TILE)) for left, top in corners]
    tiles.append(image.resize((TILE, TILE)))
    return torch.stack([_internvl_transform()(tile) for tile in tiles])


@cache
def _internvl_transform() -> Callable[[PIL.Image.Image], Tensor]:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Lambda(_to_rgb),
            transforms.Resize((TILE, TILE), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(mean=MEAN, std=STD),
        ]
    )


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _transformers(content: bytes, max_tiles: int) -> Tensor:
    return _processor(max_tiles)(_decode(content), return_tensors="pt")["pixel_values"]


@cache
def _processor(max_tiles: int) -> Any:
    from transformers import GotOcr2ImageProcessor

    size = {"height": TILE, "width": TILE}
    return GotOcr2ImageProcessor(
        size=size, crop_to_patches=True, max_patches=max_tiles, image_mean=MEAN, image_std=STD
    )
