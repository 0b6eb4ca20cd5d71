import json
from pathlib import Path

import pytest

import vico_pl.cli
from tests.helpers import tiny_spec
from vico_pl.config import load_config
from vico_pl.model.families.folder import save_model
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.planning import report
from vico_pl.planning.memory import GIB, RunMemory
from vico_pl.planning.plan import GPUS, USABLE, Gpu, Layout, build_plan, smallest_layout
from vico_pl.planning.report import advice, format_plan, plan_as_json

RECIPES = sorted(Path(__file__).parents[2].joinpath("recipes").rglob("*.yaml"))
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
def vico(monkeypatch, capsys):
    """Run the command; returns (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["vico", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            vico_pl.cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


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


@pytest.fixture
def tiny_plan(recipe):
    return build_plan(load_config(recipe, []))


@pytest.mark.parametrize(("gib", "world"), [(40, 1), (100, 2), (200, 4), (800, 16)])
def test_the_fewest_gpus_that_fit_are_found(gib, world):
    assert smallest_layout(memory_of(gib), 80 / USABLE) == Layout(world=world, sharded=world > 1)


def test_a_micro_batch_that_is_too_large_fits_nowhere():
    assert smallest_layout(memory_of(1, micro_batch=100), 80 / USABLE) is None


def test_hours_follow_from_operations_and_speed(recipe):
    plan = build_plan(load_config(recipe, ["trainer.precision=bf16-mixed"]), mfu=0.5)
    expected = 10 * 4 * plan.sample_flops / (0.5 * GPUS["H100-80"].half_tflops * 1e12) / 3600
    assert plan.hours("H100-80", 1) == pytest.approx(expected)
    assert plan.hours("H100-80", 8) == pytest.approx(expected / 8)


def test_the_recipes_own_gpus_are_shown(recipe):
    plan = build_plan(load_config(recipe, ["trainer.devices='3'", "trainer.num_nodes=2"]))
    assert Layout(world=6, sharded=True) in plan.layouts()


def test_what_does_not_fit_comes_with_what_would(tiny_plan, monkeypatch):
    held = tiny_plan.gib(Layout(world=1, sharded=False), checkpointing=False)
    sizes = {"Small": held / 100, "Medium": held * 0.99 / USABLE, "Large": held * 2}
    gpus = {name: Gpu(memory_gib=gib, half_tflops=1.0, full_tflops=1.0) for name, gib in sizes.items()}
    monkeypatch.setattr(report, "GPUS", gpus)
    lines = "\n".join(advice(tiny_plan))
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


def test_the_command_prints_and_writes_the_same(vico, recipe, tmp_path):
    code, out, err = vico("plan", recipe, "trainer.max_steps=20", "--json", tmp_path / "out" / "plan.json")
    assert (code, err) == (0, "")
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert written["samples"] == 80
    assert written["memory_gib"]["no_activation_checkpointing"]["1 GPU"]["policy weights"] > 0
    assert all(line in out for line in written["advice"])
    assert "20 steps of 4 samples" in out


def test_the_command_fails_on_an_unknown_shape(vico, recipe):
    code, out, err = vico("plan", recipe, "model.path=someone/something")
    assert (code, out) == (2, "")
    assert err.startswith("vico: someone/something: its shape is not known here")


def test_columns_are_aligned(tiny_plan):
    text = format_plan(tiny_plan)
    table = next(block for block in text.split("\n\n") if "FSDP x2" in block).splitlines()
    assert len({len(line) for line in table}) == 1


# Hundreds of layers with every call type-checked take a while.
@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_can_be_planned(path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    config = load_config(path, ["data.micro_batch.max_tiles=6"])
    if f"{path.parent.name}/{path.name}" in WITHOUT_SHAPE:
        with pytest.raises(ValueError, match="its shape is not known here"):
            build_plan(config)
        return
    content = plan_as_json(build_plan(config))
    assert content["flops"] > 0
    assert all(sum(t.values()) > 0 for t in content["memory_gib"]["activation_checkpointing"].values())
    assert json.dumps(content)
