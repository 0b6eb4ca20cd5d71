"""Calibration, report and pictures of a model that chooses between three ratios."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.folders import answered_records, write_model_folder, write_set
from tests.support.tiny import tiny_spec
from vico_pl.evaluation.calibrate import measure
from vico_pl.evaluation.evaluate import evaluate
from vico_pl.evaluation.questions import open_questions
from vico_pl.evaluation.report import format_table, routing_picture
from vico_pl.inference.predictor import Predictor
from vico_pl.model.router import RoutingRule

TOKENS = {4: 16, 16: 4, 64: 1}  # of a tile


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    vision = {**tiny_spec().vision, "patch_size": 4}
    return write_model_folder(tmp_path_factory.mktemp("three") / "model", ratios=list(TOKENS), vision=vision)


@pytest.fixture(scope="module")
def routed(folder, tmp_path_factory):
    """A set, the thresholds tried on it, and a session that routes at the middle one."""
    session = Predictor.load(folder)
    answered = write_set(tmp_path_factory.mktemp("answered") / "val", answered_records(session, count=8))
    curve = measure(open_questions(session, answered)).curve()
    rule = RoutingRule(threshold=curve[len(curve) // 2].threshold)
    return answered, curve, replace(session, rule=rule)


def test_one_threshold_sweeps_from_full_tokens_to_the_coarsest_and_is_obeyed(routed):
    answered, curve, session = routed
    fractions = [point.token_fraction for point in curve]
    assert fractions == sorted(fractions, reverse=True)
    assert (fractions[0], fractions[-1]) == (1, 1 / 16)
    with torch.no_grad():
        chosen = [session.choose_ratios(session.encode(s.tiles)) for s in session.samples(answered)]
    ratios = torch.cat(chosen)
    assert len(ratios.unique()) == 3, "the example tells ratios apart"
    assert (4 / ratios).mean().item() == pytest.approx(fractions[len(curve) // 2])


def test_arms_give_as_many_tiles_to_each_ratio_as_the_router_does(routed):
    answered, curve, session = routed
    report, examples = evaluate(open_questions(session, answered), seed=0)
    arms, fraction = report["arms"], curve[len(curve) // 2].token_fraction
    for arm in ("router", "random", "pixel_detail", "oracle"):
        assert arms[arm]["token_fraction"] == pytest.approx(fraction, abs=1e-5), arm
    assert arms["all_compressed"]["token_fraction"] == pytest.approx(1 / 16)
    for arm in ("router", "oracle"):
        swept = [point["token_fraction"] for point in report["pareto"] if point["arm"] == arm]
        assert (max(swept), min(swept), len(set(swept)) > 4) == (1, pytest.approx(1 / 16), True)
    assert "router" in format_table(report)
    assert {ratio for example in examples for ratio in example.ratios} <= set(TOKENS)


def test_pictures_dim_a_tile_the_more_the_coarser_it_is(routed):
    session, image = routed[2], torch.full((3, 32, 32), 255, dtype=torch.uint8)
    light = [np.asarray(routing_picture(session, image, [ratio])).mean() for ratio in TOKENS]
    assert light == sorted(light, reverse=True)
    assert len(set(light)) == 3
