"""Every recipe means what it says and accepts the settings that make adds."""

from pathlib import Path

import pytest
import yaml

from vico_pl.config import load_config

RECIPES = sorted(Path(__file__).parents[1].joinpath("recipes").rglob("*.yaml"))


def test_the_demo_has_a_recipe_for_every_stage():
    stages = {load_config(path, []).stage for path in RECIPES if path.parent.name == "demo"}
    assert stages == {"pretrain", "consistency", "router"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_recipe_loads_and_accepts_the_settings_that_make_adds(recipe):
    written, config = yaml.safe_load(recipe.read_text()), load_config(recipe, [])
    assert (config.stage, config.optim.lr) == (written["stage"], pytest.approx(float(written["optim"]["lr"])))
    assert config.trainer.max_steps == written["trainer"]["max_steps"]
    changed = load_config(recipe, ["run_dir=runs/x", "seed=5", "trainer.max_steps=9999"])
    assert (changed.run_dir, changed.seed, changed.trainer.max_steps) == ("runs/x", 5, 9999)
    assert (changed.data, changed.optim) == (config.data, config.optim)
