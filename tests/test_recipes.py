from pathlib import Path

import pytest

from vico_pl.config import load_config

RECIPES = sorted(Path(__file__).parents[1].joinpath("recipes").rglob("*.yaml"))


def test_there_are_recipes_for_every_stage_of_the_embedded_default():
    assert {path.stem for path in RECIPES if path.parent.name == "demo"} >= {
        "pretrain",
        "consistency",
        "router",
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_recipe_loads(recipe):
    assert load_config(recipe, []).stage in recipe.read_text()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_recipe_takes_the_settings_that_make_targets_give(recipe):
    config = load_config(recipe, ["run_dir=runs/x", "seed=5", "trainer.max_steps=9999", "data.num_workers=0"])
    assert (config.run_dir, config.seed, config.trainer.max_steps, config.data.num_workers) == (
        "runs/x",
        5,
        9999,
        0,
    )
