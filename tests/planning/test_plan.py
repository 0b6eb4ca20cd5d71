import json
from pathlib import Path

import pytest

from tests.support.tiny import tiny_spec
from vico_pl.config import load_config
from vico_pl.model.families.folder import save_model
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.planning import plan as planning
from vico_pl.planning.plan import GIB, Layout, RunMemory, build_plan, format_plan, smallest_layout
from vico_pl.planning.sources import GPUS, USABLE, Gpu

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.joinpath("recipes").rglob("*.yaml"))
WITHOUT_SHAPE = {
    "internvl3_5-38b/router.yaml",  # its model is that of stage 1, and no reference names the released one
    "llava/consistency.yaml",
    "llava/router.yaml",
    "llava/instruct.yaml",
}


def memory_of(gib, *, micro_batch=0.0):
    """A run whose weights, gradients, optimizer and its temporaries take `gib` in all; FSDP divides all."""
    part = gib * GIB / 6
    return RunMemory(
        weights={"policy weights": part, "reference weights": part},
        shared=0.0,
        gradients=part,
        optimizer=2 * part,
        largest=0.0,
        micro_batch={"activations": float(micro_batch * GIB)},
        unit=0.0,
        root=0.0,
    )


@pytest.fixture
def recipe(tmp_path):
    """A recipe of a tiny model, whose folder holds no tokenizer."""
    save_model(VisionLanguageModel(tiny_spec(ratios=[4], router_heads=None)), tmp_path / "model")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"stage: consistency\nrun_dir: {tmp_path}/run\nmodel: {{path: {tmp_path}/model}}\n"
        "data: {sources: [{path: nowhere}], batch_size: 4}\ntrainer: {max_steps: 10}\n"
    )
    return path


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (memory_of(40), Layout()),
        (memory_of(100), Layout(world=2, sharded=True)),
        (memory_of(800), Layout(world=16, sharded=True)),
        (memory_of(1, micro_batch=100), None),  # a micro-batch that is too large fits nowhere
    ],
)
def test_the_fewest_gpus_that_fit_are_found(memory, expected):
    assert smallest_layout(memory, Gpu(80 / USABLE, 1.0, 1.0)) == expected


def test_hours_follow_from_operations_and_speed(recipe):
    plan = build_plan(load_config(recipe, ["trainer.precision=bf16-mixed"]), mfu=0.5)
    assert plan.figures["flops"] == 10 * 4 * sum(plan.figures["flops_per_sample"].values())
    expected = plan.figures["flops"] / (0.5 * GPUS["H100-80"].half_tflops * 1e12) / 3600
    assert plan.figures["gpu_hours"]["H100-80"] == pytest.approx(expected)


def test_tables_are_aligned_and_show_the_recipes_own_gpus(recipe):
    text = format_plan(build_plan(load_config(recipe, ["trainer.devices='3'", "trainer.num_nodes=2"])))
    tables = [block.splitlines() for block in text.split("\n\n") if "FSDP x6" in block or "6 GPUs" in block]
    assert len(tables) == 3  # memory with and without recomputing, and hours
    assert all(len({len(line) for line in table}) == 1 for table in tables)


def test_what_does_not_fit_comes_with_what_would(recipe, monkeypatch):
    config = load_config(recipe, [])
    held = sum(build_plan(config).memory["1 GPU"].values())
    sizes = {"Small": held / 100, "Medium": held * 0.99 / USABLE, "Large": held * 2}
    monkeypatch.setattr(planning, "GPUS", {name: Gpu(gib, 1.0, 1.0) for name, gib in sizes.items()})
    lines = "\n".join(build_plan(config).figures["advice"])
    assert "does not fit, not even sharded by FSDP" in lines
    assert "needs FSDP over 2 GPUs or more" in lines
    assert "fits on each GPU" in lines
    settings = ("activation_checkpointing=true", "[connectors,language]", "[connectors,lora]", "max_tiles=")
    assert all(setting in lines for setting in settings)


def test_a_router_of_no_heads_is_an_error(recipe):
    with pytest.raises(ValueError, match=r"set model\.router_heads"):
        build_plan(load_config(recipe, ["stage=router"]))


def test_a_ratio_that_the_model_has_and_the_recipe_not_is_an_error(recipe):
    save_model(VisionLanguageModel(tiny_spec(ratios=[4, 16])), recipe.parent / "model")
    with pytest.raises(ValueError, match=r"but the model has \[4, 16\]"):
        build_plan(load_config(recipe, ["model.ratios=[4,64]"]))


# Hundreds of layers with every call type-checked take a while.
@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_can_be_planned(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(path, ["data.micro_batch.max_tiles=6"])
    if f"{path.parent.name}/{path.name}" in WITHOUT_SHAPE:
        with pytest.raises(ValueError, match="its shape is not known here"):
            build_plan(config)
        return
    figures = build_plan(config).figures
    assert figures["flops"] > 0
    assert all(sum(t.values()) > 0 for t in figures["memory_gib"]["activation_checkpointing"].values())
    assert json.dumps(figures)
