"""The classifier on tile statistics finds what they tell, and nothing that they do not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.tiny import TILE
from vico_pl.data.tiling import TilingConfig
from vico_pl.evaluation import statistics
from vico_pl.evaluation.baselines import ranked
from vico_pl.evaluation.questions import Measure, QuestionSet
from vico_pl.evaluation.statistics import (
    assign_folds,
    cross_fitted,
    ridge,
    statistics_scores,
    tile_statistics,
)
from vico_pl.types import Sample, Turn

COLUMNS, ROWS, THUMBNAIL, COUNT = -4, -3, -2, -1  # places of statistics


def rank_correlation(one, other):
    return np.corrcoef([torch.cat(ranked([values])).numpy() for values in (one, other)])[0, 1]


def checks(period):
    rows, columns = torch.meshgrid(*[torch.arange(TILE)] * 2, indexing="ij")
    return ((rows // period + columns // period) % 2 * 255).to(torch.uint8).expand(3, TILE, TILE)


def test_statistics_say_colour_contrast_edges_and_place():
    red = torch.zeros(3, TILE, TILE, dtype=torch.uint8)
    red[0] = 204
    tiles = torch.stack([red, checks(1), checks(4), red, red, red, red])
    found = tile_statistics(tiles, columns=3, rows=2)
    assert found.isfinite().all()
    percentiles, colours, contrast = found[:, :7], found[:, 7:15], found[:, 15]
    edges = found[:, 16:20]
    assert percentiles[0].tolist() == pytest.approx([0.8 / 3] * 7)
    assert colours[0].tolist() == pytest.approx([0.8, 0, 0, 0, 0, 0, 1, 0], abs=1e-6), (
        "means, stds, saturation"
    )
    assert percentiles[1, [0, 1, 5, 6]].tolist() == pytest.approx([0, 0, 1, 1])
    assert contrast.tolist() == pytest.approx([0, 0.5, 0.5, 0, 0, 0, 0], abs=1e-3)
    assert edges[0].tolist() == [0] * 4
    assert edges[1].tolist() == pytest.approx([1, 1, 0, 0]), "checks of 1 px are even at 4 px"
    assert edges[2, 2:].tolist() == pytest.approx([1, 1])
    assert found[:, COLUMNS].tolist() == pytest.approx([1 / 6, 0.5, 5 / 6, 1 / 6, 0.5, 5 / 6, 0.5])
    assert found[:, ROWS].tolist() == [0.25] * 3 + [0.75] * 3 + [0.5]
    assert found[:, THUMBNAIL].tolist() == [0] * 6 + [1]
    assert found[:, COUNT].tolist() == [7] * 7


def test_edges_count_rows_and_columns_apart():
    stripes = (torch.arange(TILE) % 2 * 255).to(torch.uint8).expand(1, 3, TILE, TILE)
    upright, lying = (tile_statistics(x, columns=1, rows=1)[0, 16:18].tolist() for x in (stripes, stripes.mT))
    assert (upright, lying) == ([0, 1], [1, 0])


def test_harm_that_follows_statistics_is_found_and_other_harm_is_not():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(400, 25, generator=generator)
    folds = assign_folds(torch.arange(400) // 4, seed=0)
    curved = ((values[:, 7] - 0.5).square() + 0.2 * values[:, 3] * values[:, 9]).double()
    found = rank_correlation(cross_fitted(values, curved, folds), curved)
    assert found > 0.9, "although 320 tiles fit 350 terms"
    unrelated = [torch.rand(400, generator=generator).double() for _ in range(20)]
    found = [rank_correlation(cross_fitted(values, harm, folds), harm) for harm in unrelated]
    assert abs(np.mean(found)) < 0.05
    assert max(map(abs, found)) < 0.25
    permuted = curved[torch.randperm(400, generator=generator)]
    assert abs(rank_correlation(cross_fitted(values, permuted, folds), permuted)) < 0.2


def test_tiles_of_an_image_do_not_tell_of_each_other():
    """Here harm belongs to the image, and so do the statistics: folds of tiles would find it."""
    generator = torch.Generator().manual_seed(1)
    image = torch.arange(400) // 5
    values = torch.rand(80, 25, generator=generator)[image]
    values += 0.01 * torch.rand(400, 25, generator=generator)
    harm = torch.rand(80, generator=generator).double()[image]
    leaking = cross_fitted(values, harm, assign_folds(torch.arange(400), seed=0))
    assert rank_correlation(leaking, harm) > 0.8
    assert abs(rank_correlation(cross_fitted(values, harm, assign_folds(image, seed=0)), harm)) < 0.3


def test_folds_hold_whole_images_are_of_equal_size_and_depend_on_the_seed():
    image = torch.randint(1000, (300,), generator=torch.Generator().manual_seed(0))
    folds = assign_folds(image, seed=0)
    per_image = {i: set(folds[image == i].tolist()) for i in image.tolist()}
    assert all(len(of_image) == 1 for of_image in per_image.values())
    sizes = np.bincount([fold for of_image in per_image.values() for fold in of_image])
    assert len(sizes) == statistics.NUM_FOLDS
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(folds, assign_folds(image, seed=0))
    assert not torch.equal(folds, assign_folds(image, seed=1))


@pytest.mark.parametrize(("count", "width"), [(30, 4), (20, 60)])
def test_ridge_takes_the_penalty_of_the_lowest_leave_one_out_error(count, width):
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(count, width, generator=generator, dtype=torch.float64)
    target = terms[:, 0] + 0.5 * torch.randn(count, generator=generator, dtype=torch.float64)

    def fit(rows, penalty):
        x, y = terms[rows], target[rows]
        return torch.linalg.solve(x.T @ x + penalty * torch.eye(width, dtype=torch.float64), x.T @ y)

    def error(penalty):
        others = [[i for i in range(count) if i != left_out] for left_out in range(count)]
        return sum((target[i] - terms[i] @ fit(rows, penalty)) ** 2 for i, rows in enumerate(others))

    best = min((count * p for p in statistics.PENALTIES), key=error)
    torch.testing.assert_close(ridge(terms, target), fit(slice(None), best))


@pytest.mark.parametrize("images", [[0], [0, 0, 0], [0, 1]])
def test_very_few_tiles_are_scored_too(images):
    values = torch.rand(len(images), 25)
    scores = cross_fitted(
        values, torch.rand(len(images)).double(), assign_folds(torch.tensor(images), seed=0)
    )
    assert scores.isfinite().all()
    assert len(scores) == len(images)


def painted(predictor, greys):
    """A set of images of 2 x 2 tiles in plain greys, and one sample without image."""
    turns = [Turn(role="human", text="<image>?"), Turn(role="gpt", text="a")]
    samples = [Sample(id="text", images=[], turns=[Turn(role="human", text="?"), turns[1]], metadata={})]
    for number, of_image in enumerate(greys):
        image = of_image.view(1, 2, 2).repeat_interleave(TILE, 1).repeat_interleave(TILE, 2)
        sample = Sample(id=str(number), images=[image.expand(3, -1, -1)], turns=turns, metadata={})
        samples.append(sample)
    return QuestionSet(
        name="painted",
        read=lambda: iter(samples),
        num_records=len(samples),
        predictor=replace(predictor, tiling=TilingConfig(tile_size=TILE, max_tiles=4, min_tiles=4)),
        measure=Measure.ANSWERS,
    )


def test_a_set_whose_harm_is_brightness_is_ranked_as_the_oracle_does(predictor):
    generator = torch.Generator().manual_seed(0)
    greys = torch.randint(256, (30, 4), dtype=torch.uint8, generator=generator)
    questions = painted(predictor, greys)
    harm = [torch.empty(0)] + [torch.cat([g, g.float().mean()[None]]).double() for g in greys]
    scores = statistics_scores(questions, ranked(harm), seed=0)
    assert [len(of_sample) for of_sample in scores] == [0] + [5] * 30
    assert rank_correlation(torch.cat(scores), torch.cat(harm)) > 0.95
    assert all(map(torch.equal, scores, statistics_scores(questions, ranked(harm), seed=0)))


def test_an_image_that_comes_twice_is_in_one_fold(predictor, monkeypatch):
    greys = torch.randint(256, (10, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = []
    monkeypatch.setattr(statistics, "assign_folds", lambda images, **_: seen.append(images) or images % 2)
    statistics_scores(painted(predictor, torch.cat([greys, greys])), ranked([torch.rand(100)]), seed=0)
    images = seen[0].view(20, 5)
    assert torch.equal(images[:10], images[10:])
    assert len(images.unique()) == 10
