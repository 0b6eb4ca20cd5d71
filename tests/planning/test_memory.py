from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from tests.support.tiny import tiny_spec
from vico_pl.config import load_config
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.planning.memory import (
    DeviceRules,
    MemoryMeter,
    num_bytes,
    ready,
    stage_on_meta,
    step_terms,
    trained_parameters,
)
from vico_pl.planning.plan import Layout, RunMemory, measure_memory
from vico_pl.planning.sources import MicroBatch, ModelShape, draw_batch, find_model
from vico_pl.stages import build_stage

MICRO_BATCH = MicroBatch(num_samples=2, tiles=3, text_tokens=20, response_tokens=8)
MEMORY = RunMemory(
    weights={"policy weights": 800.0, "reference weights": 400.0},
    shared=0.0,
    gradients=160.0,
    optimizer=320.0,
    largest=10.0,
    micro_batch={"activations": 1000.0},
    unit=80.0,
    root=40.0,
)


DEMO = Path(__file__).parents[2] / "recipes" / "demo"


class RandomModels:
    """Models with random weights in the place of those of a stage on `meta`."""

    same_weights = True

    def __init__(self, stage, dropout):
        self.specs, self.dropout = [model.spec for model in stage.sharded_models()], dropout

    def policy(self):
        model = VisionLanguageModel(self.specs[0])
        model.set_dropout(self.dropout)
        return model

    def reference(self):
        return VisionLanguageModel(self.specs[-1])

    def rule(self):
        return None


def real_peak(stage, micro_batch):
    """The most bytes that PyTorch's allocator held at a time during a step with real weights on the CPU."""
    for parameter in trained_parameters(stage):
        parameter.grad = torch.zeros_like(parameter)
    drawn = draw_batch(stage.trained_model(), micro_batch)
    batch = replace(drawn, tiles=torch.zeros(drawn.tiles.shape, dtype=torch.uint8))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        stage.step(batch).loss_sum.backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("pretrain", "trainer.activation_checkpointing=false"),
        ("consistency", "trainer.activation_checkpointing=false"),
        ("consistency", "trainer.activation_checkpointing=true"),
        ("consistency", "model.trainable=[connectors,lora]"),
        ("router", "router.label_mode=tile"),
        ("router", "router.label_mode=image"),
    ],
)
def test_the_plan_predicts_the_peak_of_a_real_step(name, setting):
    changes = [setting, "router.min_history=1", "consistency.ratio_draw=full"]
    demo = load_config(DEMO / f"{name}.yaml", changes)
    config = replace(demo, model=replace(demo.model, reference=demo.model.path))
    spec = find_model(load_config(DEMO / "pretrain.yaml", []).model).spec
    micro_batch = MicroBatch(num_samples=4, tiles=5, text_tokens=60, response_tokens=30)
    planned = stage_on_meta(config, ModelShape(name="demo", spec=spec, dtype=torch.float32))
    predicted = sum(step_terms(planned, micro_batch, precision="32-true").values())
    real = ready(build_stage(config, RandomModels(planned, config.model.dropout)))
    assert predicted == pytest.approx(real_peak(real, micro_batch), rel=0.05)


def trained_bytes(part, dtype_bytes=4):
    model = VisionLanguageModel(tiny_spec(router_heads=None))
    return sum(p.numel() for p in getattr(model, part).parameters()) * dtype_bytes


@pytest.fixture
def measured(config, shape):
    """Measure stage 1 with some settings."""
    return lambda **sections: measure_memory(config(**sections), shape, MICRO_BATCH)


def test_what_is_trained_is_float32_and_what_is_frozen_as_stored(measured, shape):
    memory = measured()
    parts = sum(trained_bytes(part) for part in ("vision", "connectors", "language"))
    assert (memory.weights["policy weights"], memory.gradients, memory.optimizer) == (parts, parts, 2 * parts)
    reference = VisionLanguageModel(shape.spec)
    assert memory.weights["reference weights"] == num_bytes(reference.parameters()) / 2


def test_frozen_parts_serve_the_reference_too(measured):
    shared = measured(model={"trainable": ["connectors"]})
    apart = measured(model={"trainable": ["connectors"], "reference": "other"})
    assert 0 < shared.weights["reference weights"] < trained_bytes("connectors", 2)
    assert apart.weights["reference weights"] > shared.weights["reference weights"]
    assert shared.gradients == trained_bytes("connectors")


def test_adapters_take_less_than_the_language_model(measured):
    adapters = measured(model={"trainable": ["lora"], "lora": {"rank": 2}})
    assert 0 < adapters.gradients < measured(model={"trainable": ["language"]}).gradients / 4
    connectors = measured(model={"trainable": ["connectors"]})
    assert adapters.shared == connectors.shared  # the reference shares the language model, not its adapters


@pytest.mark.parametrize(("stage", "ratios"), [("pretrain", [4]), ("consistency", [4, 16])])
def test_activations_grow_with_the_micro_batch_and_shrink_by_recomputing(config, shape, stage, ratios):
    settings = config(stage, model={"ratios": ratios})
    recomputing = config(stage, model={"ratios": ratios}, trainer={"activation_checkpointing": True})
    more = replace(MICRO_BATCH, num_samples=8)
    small = measure_memory(settings, shape, MICRO_BATCH).micro_batch
    large, again = (measure_memory(each, shape, more).micro_batch for each in (settings, recomputing))
    for part in ("vision activations", "language activations"):
        assert large[part] == pytest.approx(4 * small[part], rel=0.05)
    assert sum(again.values()) < sum(large.values())


def test_half_precision_saves_activations(measured):
    whole = measured().micro_batch
    half = {"precision": "bf16-mixed"}
    mixed = measured(trainer=half).micro_batch
    recomputed = measured(trainer={**half, "activation_checkpointing": True}).micro_batch
    assert mixed["language activations"] < whole["language activations"]
    assert sum(recomputed.values()) < sum(mixed.values())
    assert "weights as autocast has them" in mixed
    assert "weights as autocast has them" not in whole


def test_ddp_adds_its_buckets_whatever_the_number_of_gpus():
    one, two, many = (MEMORY.per_gpu(Layout(world=world)) for world in (1, 2, 64))
    weights = {"policy weights": 800, "reference weights": 400}
    assert one == {**weights, "gradients": 160, "optimizer": 320, "activations": 1000}
    assert two == many == {**one, "buckets of DDP": 160}


def test_fsdp_divides_all_but_the_micro_batch_and_what_computes():
    terms = replace(MEMORY, shared=200.0).per_gpu(Layout(world=4, sharded=True))
    assert [terms[name] for name in ("policy weights", "gradients", "optimizer")] == [200, 40, 80]
    assert terms["activations"] == 1000
    assert terms["gathered by FSDP"] == (2 * 80 + 40) * 3 / 4 + 80
    assert terms["reference weights"] == (400 + 200) / 4, "each model has a shard of what they share"


def test_the_optimizer_counts_where_it_takes_more_than_a_micro_batch():
    small = replace(MEMORY, micro_batch={"activations": 100.0})
    assert small.per_gpu(Layout())["optimizer's temporaries"] == 160
    assert "activations" not in small.per_gpu(Layout())
    assert small.per_gpu(Layout(), foreach=False)["activations"] == 100


@pytest.mark.parametrize("placeholder_id", [0, 5])
def test_drawn_samples_have_the_sizes_they_should(placeholder_id):
    model = VisionLanguageModel(tiny_spec(placeholder_id=placeholder_id))
    batch = draw_batch(model, MICRO_BATCH)
    assert (batch.num_samples, batch.num_tiles) == (2, 6)
    assert (batch.input_ids == placeholder_id).sum() == 6
    assert batch.sample_lengths.tolist() == [23, 23]
    assert batch.response_mask.sum() == 16
    assert not batch.response_mask[batch.input_ids == placeholder_id].any()


FLOAT = 4  # bytes


def meta(*shape, grad=False):
    return torch.empty(shape, device="meta", requires_grad=grad)


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
