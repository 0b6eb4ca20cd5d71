import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

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
        views = [meta(6).view(2, 3)]
    assert meter.peak == 6 * FLOAT
    assert views


def test_values_on_the_cpu_remain_known():
    where = torch.tensor([True, False, True])
    with MemoryMeter() as meter:
        target = meta(3, 4)
        target[where] = meta(2, 4)
        picked = target[torch.tensor([0, 2])]
    assert picked.shape == (2, 4)
    assert where.nonzero().tolist() == [[0], [2]]
    assert meter.peak > 0


def test_attention_keeps_no_table_of_all_pairs():
    heads, length, width = 2, 512, 8
    with MemoryMeter() as meter, DeviceRules(None, meter):
        query = meta(1, heads, length, width, grad=True)
        output = scaled_dot_product_attention(query, query, query)
    assert output.shape == query.shape
    assert meter.peak < heads * length**2 * FLOAT / 4


def test_mixed_precision_casts_a_weight_once():
    weight, given = meta(64, 64, grad=True), meta(8, 64)
    with MemoryMeter([weight, given]) as meter, DeviceRules(torch.bfloat16, meter):
        outputs = [linear(given, weight) for _ in range(3)]
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    assert meter.at_peak["weights as autocast has them"] == 64 * 64 * 2


def test_each_byte_belongs_to_the_part_that_made_it():
    class Network(nn.Module):
        def inner(self):
            return meta(3)

        def outer(self):
            return self.inner(), meta(2)

    network = Network()
    with MemoryMeter() as meter:
        meter.watch(network, "inner", part="inner")
        meter.watch(network, "outer", part="outer")
        kept = [network.outer(), network.inner(), meta(1)]
        with meter.part("named"):
            kept.append(meta(4))
    del kept
    assert meter.at_peak == {"outer": 5 * FLOAT, "inner": 3 * FLOAT, "loss": FLOAT, "named": 4 * FLOAT}
