from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import kl_div

from tests.support.folders import log_probabilities, tiled
from tests.support.tiny import TILE
from vico_pl.data.chat import ChatConfig
from vico_pl.data.tiling import TilingConfig, choose_grid
from vico_pl.evaluation.baselines import ranked, score_tiles, shrunken_tilings
from vico_pl.evaluation.questions import read_groups, scored_questions


@pytest.fixture
def group(predictor):
    sizes = [[(64, 64)], [], [(64, 32)]]
    samples = [tiled(predictor, *size, seed=i) for i, size in enumerate(sizes, 1)]
    return next(read_groups(predictor, samples, partial(scored_questions, metric=None)))


@pytest.mark.parametrize("arm", ["router", "random", "pixel_detail", "oracle"])
def test_every_arm_scores_every_tile(predictor, group, arm):
    scores = score_tiles(arm, predictor, group, seed=0)
    assert [len(s) for s in scores] == [5, 0, 3]
    assert torch.cat(scores).isfinite().all()
    assert not torch.cat(scores).requires_grad


def test_router_scores_are_the_routers_probabilities(predictor, group):
    with torch.no_grad():
        logits = predictor.model.router(predictor.model.encode_tiles(group.samples[0].tiles))
    scores = score_tiles("router", predictor, group, seed=0)
    torch.testing.assert_close(scores[0], logits.softmax(-1)[:, :1])


def test_random_scores_are_those_of_the_seed_and_groups_do_not_repeat_each_other(predictor, group):
    of_seed = [(group, 5), (group, 5), (group, 6), (replace(group, first=32), 5)]
    lots = [torch.cat(score_tiles("random", predictor, *one, seed=seed)).tolist() for *one, seed in of_seed]
    assert lots[0] == lots[1]
    assert lots[0] not in lots[2:]


def test_pixel_detail_compresses_the_blank_before_the_faint_before_the_busy(predictor, group):
    ramp = torch.arange(TILE, dtype=torch.uint8).expand(3, TILE, TILE)
    checks = (ramp % 2) * 255
    blank = torch.full((3, TILE, TILE), 200, dtype=torch.uint8)
    sample = replace(group.samples[0], tiles=torch.stack([checks, blank, ramp, ramp.mT, checks.mT]))
    (scores,) = score_tiles("pixel_detail", predictor, replace(group, samples=[sample]), seed=0)
    assert scores.argsort(descending=True, stable=True).tolist() == [1, 2, 3, 0, 4]
    assert scores[2] == scores[3], "rows and columns count alike"
    assert scores[1] == 0


def harm_by_hand(predictor, sample):
    """Mean divergence of the answers when one tile is compressed, from one forward pass for each."""
    full = torch.full((len(sample.tiles),), 4)
    wanted = log_probabilities(predictor, sample, full)
    harm = []
    for tile in range(len(full)):
        ratios = full.clone()
        ratios[tile] = 16
        got = log_probabilities(predictor, sample, ratios)
        harm.append(kl_div(got, wanted, reduction="none", log_target=True).sum(-1).mean().item())
    return harm


@torch.no_grad()
def test_oracle_ranks_tiles_by_the_harm_of_compressing_them(predictor, group):
    scores = score_tiles("oracle", predictor, group, seed=0)
    for place in (0, 2):
        harm = harm_by_hand(predictor, group.samples[place])
        ranks = scores[place].argsort(descending=True).tolist()
        assert ranks == sorted(range(len(harm)), key=harm.__getitem__)
        assert scores[place].tolist() == pytest.approx([-(h + 1e-6) / 1e-6 for h in harm], rel=1e-2)
        assert max(harm) > 1.2 * min(harm), "the tiles differ"


def test_oracle_takes_conversations_of_any_length(predictor, group):
    """Evaluation data is not held against the limit of training."""
    short = replace(predictor, chat=replace(predictor.chat, config=ChatConfig(max_tokens=5)))
    scores = [torch.cat(score_tiles("oracle", one, group, seed=0)) for one in (predictor, short)]
    assert torch.equal(*scores)


def test_ranks_keep_the_order_and_have_no_ties():
    scores = [torch.tensor([0.0, -5.0]), torch.tensor([]), torch.tensor([0.0, 3.0, 0.0])]
    assert [r.tolist() for r in ranked(scores)] == [[0.8, 0.2], [], [0.6, 1.0, 0.4]]


TILING = TilingConfig(tile_size=TILE, max_tiles=6)
SIZE = st.tuples(st.integers(20, 400), st.integers(20, 400))
SETS = st.lists(st.lists(SIZE, max_size=3), min_size=1, max_size=12)


def num_tiles(sizes, tiling):
    """Tiles of a sample's images, thumbnails counted."""
    grids = [choose_grid(*size, tiling.per_image(len(sizes))) for size in sizes]
    return sum(c * r + (c * r > 1) for c, r in grids)


def total(samples, tilings):
    return sum(num_tiles(sizes, tiling) for sizes, tiling in zip(samples, tilings, strict=True))


@settings(max_examples=40)
@given(samples=SETS, budget=st.floats(0.05, 1))
def test_shrunken_images_meet_the_budget_or_have_one_tile_each(samples, budget):
    tilings = shrunken_tilings(samples, TILING, budget=budget)
    spent, original = total(samples, tilings), total(samples, [TILING] * len(samples))
    num_images = sum(map(len, samples))
    assert spent <= budget * original or spent == num_images
    assert spent >= num_images, "every image keeps a tile"
    for sizes, tiling in zip(samples, tilings, strict=True):
        assert num_tiles(sizes, tiling) <= num_tiles(sizes, TILING)


@given(samples=SETS)
def test_a_budget_of_one_changes_nothing(samples):
    assert shrunken_tilings(samples, TILING, budget=1.0) == [TILING] * len(samples)


@pytest.mark.parametrize("budget", [0.35, 0.5, 0.62, 0.8])
def test_what_a_uniform_fraction_leaves_over_is_spent(budget):
    """Images of 7 tiles shrink to 5, 4, 3 or 1: one fraction for all would miss the budget by far."""
    samples = [[(96, 64)]] * 60
    tilings = shrunken_tilings(samples, TILING, budget=budget)
    spent = total(samples, tilings) / (7 * 60)
    assert budget - 6 / (7 * 60) < spent <= budget


def test_a_sample_without_images_costs_nothing_and_one_with_two_costs_both():
    tilings = shrunken_tilings(samples := [[], [(64, 32), (64, 32)], [(64, 64)]], TILING, budget=7 / 11)
    assert [num_tiles(sizes, t) for sizes, t in zip(samples, tilings, strict=True)] == [0, 6, 1]
