import pytest

from tests.helpers import tiny_spec
from vico_pl.model.flops import count_flops
from vico_pl.stages.cost import ConsistencyCost, PretrainCost, RouterCost, forward_flops

FLOPS = count_flops(tiny_spec())
FULL, COMPRESSED = (FLOPS.vision_tokens_per_tile[ratio] for ratio in (4, 16))


def consistency(**changes):
    return ConsistencyCost(**{"flops": FLOPS, "ratios": [4, 16], "ratio_draw": "image", "seed": 0, **changes})


def test_a_forward_pass_is_its_tiles_and_the_tokens_they_become():
    cost = forward_flops(FLOPS, [4, 16], 10)
    tiles = 2 * FLOPS.vision_per_tile + FLOPS.connector_per_tile[4] + FLOPS.connector_per_tile[16]
    assert cost == tiles + FLOPS.language(10 + FULL + COMPRESSED)


def test_text_alone_costs_three_forward_passes_of_the_policy_and_one_of_the_reference():
    assert consistency()(0, [], 20) == 4 * FLOPS.language(20)
    assert PretrainCost(flops=FLOPS)(0, [], 20) == 3 * FLOPS.language(20)


def test_a_sample_costs_what_its_own_draw_costs():
    full, compressed = (
        3 * forward_flops(FLOPS, [ratio] * 3, 20) + forward_flops(FLOPS, [4] * 3, 20) for ratio in (4, 16)
    )
    found = {consistency()(position, [3], 20) for position in range(50)}
    assert found == {full, compressed}


def test_a_frozen_tower_has_no_backward_pass():
    trained, frozen = (consistency(trains_vision=trains)(7, [2], 5) for trains in (True, False))
    assert trained - frozen == pytest.approx(2 * 2 * FLOPS.vision_per_tile)


def test_labels_cost_more_than_in_proportion_to_the_tiles():
    cost = RouterCost(flops=FLOPS)
    assert cost(0, [8], 10) > 2 * cost(0, [4], 10) > 4 * cost(0, [2], 10)
