import pickle

import pytest

from tests.support.tiny import tiny_spec
from vico_pl.config import RunConfig
from vico_pl.model.flops import count_flops
from vico_pl.stages import STAGES
from vico_pl.stages.consistency import ConsistencyConfig
from vico_pl.stages.cost import SampleCounts, forward_parts
from vico_pl.stages.labels import RouterConfig
from vico_pl.stages.settings import PARTS, ModelConfig, TrainerConfig

FLOPS = count_flops(tiny_spec())


def cost(stage, *, trainable=PARTS, **sections):
    sections = {"consistency": ConsistencyConfig(ratio_draw="image"), **sections}
    model = ModelConfig(path="m", trainable=list(trainable))
    run = RunConfig(stage=stage, run_dir="x", model=model, **sections)
    return pickle.loads(pickle.dumps(STAGES[stage].cost(run, FLOPS)))  # as data workers get it


def forward(tiles, text_tokens):
    return sum(forward_parts(FLOPS, tiles, text_tokens).values())


def test_a_forward_pass_is_its_tiles_and_the_tokens_they_become():
    parts = forward_parts(FLOPS, {4: 1, 16: 1}, 10)
    tokens = sum(FLOPS.vision_tokens_per_tile[ratio] for ratio in (4, 16))
    assert parts["vision"] == 2 * FLOPS.vision_per_tile
    assert parts["connectors"] == FLOPS.connector_per_tile[4] + FLOPS.connector_per_tile[16]
    assert parts["language"] == FLOPS.language(10 + tokens)


def test_text_alone_costs_three_forward_passes_of_the_policy_and_one_of_the_reference():
    assert cost("consistency")(0, [], 20) == 4 * FLOPS.language(20)
    assert cost("pretrain")(0, [], 20) == 3 * FLOPS.language(20)


def test_a_sample_costs_what_its_own_draw_costs():
    full, compressed = (3 * forward({ratio: 3}, 20) + forward({4: 3}, 20) for ratio in (4, 16))
    assert {cost("consistency")(position, [3], 20) for position in range(50)} == {full, compressed}


def test_a_frozen_tower_has_no_backward_pass_and_runs_once_for_both_models():
    frozen = {"trainable": ["connectors", "language"]}
    settings = ({}, {**frozen, "trainer": TrainerConfig(strategy="fsdp")}, frozen)
    trained, own, shared = (cost("consistency", **each)(7, [2], 5) for each in settings)
    tower = 2 * FLOPS.vision_per_tile
    assert own - shared == pytest.approx(tower)
    connectors = trained - own - 2 * tower  # no gradient of the patch features either
    assert 0 < connectors < tower


def test_recomputing_activations_costs_a_forward_pass_of_the_blocks():
    again = cost("pretrain", trainer=TrainerConfig(activation_checkpointing=True))
    extra = again(0, [2], 5) - cost("pretrain")(0, [2], 5)
    parts = forward_parts(FLOPS, {4: 2}, 5)
    assert extra == parts["vision"] + parts["language"]


def test_labels_per_tile_cost_more_than_in_proportion_to_the_tiles_and_more_than_per_image():
    per_tile, per_image = (cost("router", router=RouterConfig(label_mode=mode)) for mode in ("tile", "image"))
    assert per_tile(0, [8], 10) > 2 * per_tile(0, [4], 10) > 4 * per_tile(0, [2], 10)
    assert per_tile(0, [8], 10) > per_image(0, [8], 10)


@pytest.mark.parametrize("stage", STAGES)
def test_the_expected_cost_is_the_mean_over_draws_with_the_heads(stage):
    found = cost(stage)
    draws = [found(position, [3], 20) for position in range(400)]
    expected = sum(found.expected_parts(3, 20, 0).values())
    router = 3 * 3 * FLOPS.router_per_tile if stage == "router" else 0
    assert expected - router == pytest.approx(sum(draws) / len(draws), rel=0.03)
    heads = sum(found.expected_parts(3, 20, 10).values()) - expected
    assert heads >= 3 * 10 * FLOPS.head_per_token


def test_a_cost_knows_its_vision_tokens():
    full, compressed = (FLOPS.vision_tokens_per_tile[ratio] for ratio in (4, 16))
    assert cost("pretrain").vision_tokens(2) == {"policy": 2 * full}
    assert cost("consistency").vision_tokens(2) == {"policy": full + compressed, "reference": 2 * full}
    assert cost("router").vision_tokens(1) == {"policy": full, "reference": full}


@pytest.mark.parametrize("mode", ["tile", "image"])
def test_labels_of_three_ratios_cost_the_passes_of_each_coarser_one(mode):
    flops = count_flops(tiny_spec(ratios=[4, 16, 64], vision={**tiny_spec().vision, "patch_size": 4}))

    def compressed(*ratios):
        model, router = ModelConfig(path="m", ratios=[4, *ratios]), RouterConfig(label_mode=mode)
        run = RunConfig(stage="router", run_dir="x", model=model, router=router)
        parts = STAGES["router"].cost_parts(run, flops, SampleCounts({4: 3}, 20, 5))
        return parts["policy with tiles compressed"]

    assert compressed(16, 64) == pytest.approx(compressed(16) + compressed(64))
    assert (compressed(64) < compressed(16)) == (mode == "image")
