"""The arm `statistics`: does a router know more than colour, edges, contrast and the place of a tile?

Ridge regression predicts the oracle's ranks of tiles from statistics of their pixels. It is fitted to the
evaluated set itself, which favours it over the router. Each tile is scored by a fit without its image.
"""

from itertools import combinations_with_replacement
from zlib import crc32

import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor
from torch.nn.functional import avg_pool2d

from vico_pl.data.tiling import choose_grid
from vico_pl.evaluation.questions import QuestionSet

NUM_FOLDS = 5
EDGE_SCALES = (1, 4)  # px averaged before neighbours are compared
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)  # of grey values
PENALTIES = torch.logspace(-3, 2, 11, dtype=torch.float64)  # of the ridge, per tile


def statistics_scores(
    questions: QuestionSet, oracle: list[Float64[Tensor, " _"]], *, seed: int
) -> list[Float64[Tensor, " _"]]:
    """Score the tiles of a set by predicting the oracle's ranks of them."""
    found, images, counts = list[Tensor](), list[int](), list[int]()
    for sample, tiled in questions.samples():
        tiling = questions.predictor.tiling.per_image(len(sample.images))
        parts = tiled.tiles.split(tiled.tiles_per_image)
        for image, tiles in zip(sample.images, parts, strict=True):
            grid = choose_grid(image.shape[2], image.shape[1], tiling)
            found.append(tile_statistics(tiles, columns=grid[0], rows=grid[1]))
        # Samples with the same first image are in the same fold.
        images += [crc32(parts[0].contiguous().numpy())] * len(tiled.tiles) if parts else []
        counts.append(len(tiled.tiles))
    folds = assign_folds(torch.tensor(images, dtype=torch.int64), seed=seed)
    return list(cross_fitted(torch.cat(found), torch.cat(oracle), folds).split(counts))


def tile_statistics(tiles: UInt8[Tensor, "t 3 H W"], *, columns: int, rows: int) -> Float[Tensor, "t F"]:
    """Describe each tile of an image by 25 numbers: colour, contrast, edges and place in the grid."""
    pixels = tiles.float() / 255
    grey, brightest = pixels.mean(1), pixels.amax(1)
    saturation = (brightest - pixels.amin(1)) / brightest.clamp(min=1 / 255)
    ordered = grey.flatten(1).sort().values
    found = [ordered[:, round(p / 100 * (ordered.shape[1] - 1))] for p in PERCENTILES]
    for values in (*pixels.unbind(1), saturation):
        found += [values.mean((1, 2)), values.std((1, 2))]
    found.append(grey.std((1, 2)))
    for scale in EDGE_SCALES:
        coarse = avg_pool2d(grey[:, None], scale)
        found += [coarse.diff(dim=dim).abs().mean((1, 2, 3)) for dim in (2, 3)]
    place = torch.arange(len(tiles))
    is_thumbnail = place >= columns * rows
    centre = torch.where(is_thumbnail, 0.5, (place % columns + 0.5) / columns)
    middle = torch.where(is_thumbnail, 0.5, (place // columns + 0.5) / rows)
    count = torch.full_like(centre, len(tiles))
    return torch.stack([*found, centre, middle, is_thumbnail.float(), count], 1)


def assign_folds(images: Int64[Tensor, " n"], *, seed: int) -> Int64[Tensor, " n"]:
    """Put tiles into `NUM_FOLDS` folds of about equally many images; tiles of an image share a fold."""
    unique, image_of_tile = images.unique(return_inverse=True)
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed))
    return (order % NUM_FOLDS)[image_of_tile]


def cross_fitted(
    statistics: Float[Tensor, "n F"], ranks: Float64[Tensor, " n"], folds: Int64[Tensor, " n"]
) -> Float64[Tensor, " n"]:
    """Predict the rank of each tile from the tiles of the other folds.

    There is no intercept: it would be the mean of the other folds, which is low where the fold's own is high.
    """
    terms, centred, predicted = _quadratic(statistics), ranks - ranks.mean(), torch.zeros_like(ranks)
    for fold in folds.unique():
        mine = folds == fold
        predicted[mine] = terms[mine] @ ridge(terms[~mine], centred[~mine])
    return predicted


def ridge(terms: Float64[Tensor, "n F"], target: Float64[Tensor, " n"]) -> Float64[Tensor, " F"]:
    """Return the weights of the penalty whose leave-one-out error is the lowest."""
    values, vectors = torch.linalg.eigh(terms.T @ terms)
    rotated, best = terms @ vectors, torch.tensor(torch.inf, dtype=torch.float64)
    weights = torch.zeros_like(values)
    for penalty in max(1, len(terms)) * PENALTIES:
        of_penalty = (rotated.T @ target) / (values.clamp(min=0) + penalty)
        leverage = (rotated.square() / (values.clamp(min=0) + penalty)).sum(1)
        error = ((target - rotated @ of_penalty) / (1 - leverage)).square().mean()
        if error < best:
            best, weights = error, vectors @ of_penalty
    return weights


def _quadratic(statistics: Float[Tensor, "n F"]) -> Float64[Tensor, "n Q"]:
    """Standardise statistics and append squares and products of pairs, also standardised."""
    base = _standardised(statistics.double())
    pairs = torch.tensor([*combinations_with_replacement(range(base.shape[1]), 2)], dtype=torch.int64).T
    return torch.cat([base, _standardised(base[:, pairs[0]] * base[:, pairs[1]])], 1)


def _standardised(values: Float64[Tensor, "n F"]) -> Float64[Tensor, "n F"]:
    centred = values - values.mean(0)
    return centred / centred.square().mean(0).sqrt().clamp(min=1e-6)
