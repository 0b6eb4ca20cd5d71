"""Pictures of how a model spends its vision tokens, for the report and for any single image."""

from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import torch

from vico_pl.data.decode import IMAGE_TOKEN
from vico_pl.data.shards.inspect import read_samples
from vico_pl.data.tiling import choose_grid, tile_image
from vico_pl.evaluation.evaluate import RoutedExample
from vico_pl.evaluation.pictures import draw_routing
from vico_pl.evaluation.report import GalleryItem
from vico_pl.inference.predictor import Predictor
from vico_pl.types import Image


@torch.no_grad()
def route_image(predictor: Predictor, image: Image) -> list[int]:
    """Return the ratio the router chooses for each tile of an image, the thumbnail last."""
    return predictor.route(predictor.encode(tile_image(image, predictor.tiling))).tolist()


def routing_picture(
    predictor: Predictor, image: Image, ratios: Sequence[int], *, caption: str = ""
) -> PIL.Image.Image:
    """Draw an image with its compressed tiles dimmed."""
    tokens = [predictor.model.vision.num_patches // ratio for ratio in ratios]
    grid = choose_grid(image.shape[2], image.shape[1], predictor.tiling)
    return draw_routing(image, grid=grid, ratios=ratios, tokens=tokens, caption=caption)


def build_gallery(predictor: Predictor, folder: Path, examples: Sequence[RoutedExample]) -> list[GalleryItem]:
    """Draw the examples of an evaluation, whose images are read again."""
    wanted = {example.sample: example for example in examples}
    return [
        _item(predictor, sample.images[0], wanted[position])
        for position, sample in enumerate(read_samples(folder))
        if position in wanted
    ]


def _item(predictor: Predictor, image: Image, example: RoutedExample) -> GalleryItem:
    full_ratio = predictor.model.ratios[0]
    return GalleryItem(
        picture=routing_picture(predictor, image, example.ratios),
        question=example.question.replace(IMAGE_TOKEN, "").strip(),
        expected=example.expected,
        full_answer=example.full_answer,
        router_answer=example.router_answer,
        token_fraction=sum(full_ratio / ratio for ratio in example.ratios) / len(example.ratios),
    )
