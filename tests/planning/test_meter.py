import pytest
import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from vico_pl.model.blocks import checkpoint_blocks
from vico_pl.planning.meter import DeviceRules, MemoryMeter

FLOAT = 4  # bytes


def meta(*shape, grad=False):
    return torch.empty(shape, device="meta", requires_grad=grad)


def test_the_peak_is_what_was_alive_together():
    with MemoryMeter() as meter:
        first = meta(10)
        second = first + 1
        del first
        third = second * 2
        del second, third
        meta(5)
    assert meter.peak == 2 * 10 * FLOAT


def test_views_and_known_tensors_do_not_count():
    known = meta(100)
    with MemoryMeter([known]) as meter:
        known.view(10, 10).add_(1)
        kept = meta(6)
        views = [kept.view(2, 3), kept[2:]]
    assert meter.peak == 6 * FLOAT
    assert len(views) == 2


def test_each_byte_belongs_to_the_part_that_made_it():
    with MemoryMeter() as meter:
        with meter.part("a"):
            kept = meta(3)
        with meter.part("b"):
            more = kept + 1
            with meter.part("c"):
                most = more + 1
        del kept, more, most
    assert meter.at_peak == {"a": 3 * FLOAT, "b": 3 * FLOAT, "c": 3 * FLOAT}


def test_values_on_the_cpu_remain_known():
    where = torch.tensor([True, False, True])
    with MemoryMeter() as meter:
        target = meta(3, 4)
        target[where] = meta(2, 4)
        picked = target[torch.tensor([0, 2])]
    assert picked.shape == (2, 4)
    assert where.nonzero().tolist() == [[0], [2]]
    assert meter.peak > 0


def test_a_backward_pass_takes_what_autograd_saved():
    """Of y = exp(exp(x)) both results are saved; the backward pass frees them."""
    given = meta(1000, grad=True)
    given.grad = torch.empty_like(given)
    with MemoryMeter([given, given.grad]) as meter:
        with meter.part("forward"):
            loss = given.exp().exp().sum()
        assert meter.at_peak["forward"] == 2 * 1000 * FLOAT + FLOAT
        loss.backward()
        del loss
    assert meter._alive["forward"] == 0


def test_attention_keeps_no_table_of_all_pairs():
    heads, length, width = 2, 512, 8
    with MemoryMeter() as meter, DeviceRules(None, meter):
        query = meta(1, heads, length, width, grad=True)
        output = scaled_dot_product_attention(query, query, query)
    assert output.shape == query.shape
    assert meter.peak < heads * length**2 * FLOAT / 4


@pytest.mark.parametrize("same", [True, False])
def test_multi_head_attention_gives_what_pytorch_gives_in_shape(same):
    with torch.device("meta"):
        layer = nn.MultiheadAttention(16, 4, batch_first=True)
        query = torch.empty(3, 5, 16)
        key = query if same else torch.empty(3, 7, 16)
    expected = layer(query, key, key, need_weights=False)[0].shape
    with MemoryMeter() as meter, DeviceRules(None, meter):
        assert layer(query, key, key, need_weights=False)[0].shape == expected


def test_mixed_precision_casts_a_weight_once_until_the_pass_ends():
    weight, given = meta(64, 64, grad=True), meta(8, 64)
    with MemoryMeter([weight, given]) as meter:
        rules = DeviceRules(torch.bfloat16, meter)
        with rules:
            outputs = [linear(given, weight) for _ in range(3)]
        assert {output.dtype for output in outputs} == {torch.bfloat16}
        assert meter._alive["weights as autocast has them"] == 64 * 64 * 2
        del outputs
        rules.forget_casts()
        assert meter._alive["weights as autocast has them"] == 0


@pytest.mark.parametrize("lowered", [None, torch.bfloat16])
def test_recomputed_blocks_obey_the_same_rules(lowered):
    def peak(*, checkpointing):
        with torch.device("meta"):
            network = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(6)))
            given = torch.empty(128, 32, requires_grad=True)
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter)
        known = [given, *network.parameters(), *(p.grad for p in network.parameters())]
        meter = MemoryMeter(known)
        rules = DeviceRules(lowered, meter)
        if checkpointing:
            rules.hold_within(network)
            checkpoint_blocks(network)
        with meter, rules:
            loss = network(given).sum()
            rules.forget_casts()
            loss.backward()
        return meter.peak

    assert peak(checkpointing=True) < peak(checkpointing=False)
