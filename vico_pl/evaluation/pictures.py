"""Pictures of the tiles that a router compresses, for the report and for single images."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure

from vico_pl.data.shards.inspect import read_samples
from vico_pl.data.shards.preview import render
from vico_pl.data.tiling import choose_grid, tile_image
from vico_pl.evaluation.evaluate import RoutedExample
from vico_pl.inference.predictor import Predictor
from vico_pl.types import Image

KEPT, COMPRESSED = "#0072b2", "#4b5563"  # frame and title of a tile
DIM_TO = (74, 78, 88)  # compressed tiles fade towards it, light and dark pixels alike
CHARACTERS_PER_INCH = 11  # of a caption


@torch.no_grad()
def route_image(predictor: Predictor, image: Image) -> list[int]:
    """Return the ratio the router chooses for each tile of an image, the thumbnail last."""
    return predictor.route(predictor.encode(tile_image(image, predictor.tiling))).tolist()


def routing_picture(
    predictor: Predictor, image: Image, ratios: Sequence[int], *, caption: str = ""
) -> PIL.Image.Image:
    """Draw the tiles of an image, thumbnail last, compressed ones dimmed: the more, the coarser."""
    columns, rows = choose_grid(image.shape[2], image.shape[1], predictor.tiling)
    tiles = tile_image(image, predictor.tiling).permute(0, 2, 3, 1).cpu().numpy()
    full_ratio, num_patches = predictor.model.ratios[0], predictor.model.vision.num_patches
    has_thumbnail = len(tiles) > columns * rows
    side = 3 if columns <= 3 else 9 / columns  # inches
    size = (max((columns + has_thumbnail) * side, 4.5), rows * (side + 0.3) + 0.6)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    grid = figure.subplots(rows, columns + has_thumbnail, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    cells = [*grid[:, :columns].flat, *grid[:1, columns:].flat]
    for axes, tile, ratio in zip(cells, tiles, ratios, strict=True):
        colour = KEPT if ratio <= full_ratio else COMPRESSED
        weight = min(1.0, full_ratio / ratio) ** 0.6
        axes.imshow((weight * tile + (1 - weight) * np.array(DIM_TO)).astype(np.uint8))
        axes.set_axis_on()
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=colour, linewidth=4)
        axes.set_title(f"{num_patches // ratio} tokens", color=colour, fontweight="bold")
    if has_thumbnail:
        cells[-1].set_xlabel("thumbnail")
    spent, full = sum(num_patches // ratio for ratio in ratios), len(ratios) * (num_patches // full_ratio)
    lines = [f"{spent} of {full} vision tokens ({100 * spent / full:.0f} %); dimmed: compressed"]
    for line in caption.splitlines():
        lines += textwrap.wrap(line, int(CHARACTERS_PER_INCH * size[0]))
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize="medium", parse_math=False)
    return render(figure)


def build_gallery(
    predictor: Predictor, folder: Path, examples: Sequence[RoutedExample]
) -> list[tuple[RoutedExample, PIL.Image.Image]]:
    """Draw the examples of an evaluation in the order of the set."""
    wanted = {example.sample: example for example in examples}
    return [
        (wanted[position], routing_picture(predictor, sample.images[0], wanted[position].ratios))
        for position, sample in enumerate(read_samples(folder))
        if position in wanted
    ]
