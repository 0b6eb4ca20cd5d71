from types import SimpleNamespace

import pytest
import yaml

from tests.released import write_official
from vico_pl.config import config_differences, load_config, save_config
from vico_pl.model.families import hub
from vico_pl.prepare import prepare_run

RECIPE = {
    "stage": "consistency",
    "run_dir": "runs/x",
    "model": {"path": "data/base"},
    "data": {"sources": [{"path": "shards"}], "batch_size": 4},
    "trainer": {"max_steps": 20},
}


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe: `recipe(optim={...})` adds to the one above."""

    def write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**RECIPE, **changes}))
        return path

    return write


def problems(path, overrides=()):
    with pytest.raises(ValueError, match=r".+") as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_overrides_win_over_the_recipe_and_the_recipe_over_the_defaults(recipe):
    config = load_config(recipe(optim={"lr": 0.5, "beta1": 0.8}), ["optim.lr=0.25", "seed=7"])
    assert (config.optim.lr, config.optim.beta1, config.optim.beta2) == (0.25, 0.8, 0.95)
    assert (config.seed, config.data.batch_size, config.data.num_workers) == (7, 4, 1)
    assert config.data.sources[0].path == "shards"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimizer": {"lr": 1}}, "unknown key optimizer (did you mean optim?)"),
        ({"optim": {"learning_rate": 1}}, "unknown key optim.learning_rate"),
        ({"optim": {"warmup_step": 1}}, "unknown key optim.warmup_step (did you mean optim.warmup_steps?)"),
        (
            {"data": {"tiling": {"max_tile": 3}}},
            "unknown key data.tiling.max_tile (did you mean data.tiling.max_tiles?)",
        ),
        (
            {"data": {"sources": [{"path": "a", "steps": 5}, {"paht": "b"}]}},
            "unknown key data.sources.1.paht (did you mean data.sources.1.path?)",
        ),
    ],
)
def test_an_unknown_key_is_told_with_what_was_probably_meant(recipe, changes, told):
    assert told in problems(recipe(**changes))


def test_an_unknown_override_is_told_too(recipe):
    told = problems(recipe(), ["trainer.max_step=5"])
    assert "unknown key trainer.max_step (did you mean trainer.max_steps?)" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": "abc"}, "seed: "),
        ({"optim": {"lr": "fast"}}, "optim.lr: "),
        ({"trainer": {"max_steps": 1.5}}, "trainer.max_steps: "),
        ({"model": {"path": "x", "ratios": [4, "many"]}}, "model.ratios"),
        ({"data": {"sources": "shards"}}, "sources"),
    ],
)
def test_values_of_the_wrong_type_are_told_by_their_key(recipe, changes, told):
    assert told in problems(recipe(**changes))


def test_all_unknown_keys_are_told_at_once(recipe):
    told = problems(recipe(oprim={}, optim={"lrr": 1}, trainer={"max_stepz": 1}))
    assert told.count("unknown key") == 3


def test_all_wrong_values_are_told_at_once(recipe):
    told = problems(
        recipe(seed="abc", optim={"lr": "fast"}, consistency={"temperature": 0}, router={"epsilon": 0})
    )
    for part in ("seed: ", "optim.lr: ", "consistency.temperature is 0", "router.epsilon is 0"):
        assert part in told


def test_all_contradictions_between_sections_are_told_at_once(recipe):
    told = problems(recipe(model={"ratios": [4], "trainable": ["vision", "brain"]}, data={"batch_size": 2}))
    assert "model.trainable names 'brain'; expected some of vision, connectors, language" in told
    assert "model.path is not set; this stage starts from a model folder" in told
    assert "model.ratios is [4]; stage consistency needs at least two" in told
    assert "data.sources is empty" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stage": "stage1"}, "stage is 'stage1'; expected one of pretrain, consistency, router"),
        ({"stage": None}, "stage is not set"),
        ({"run_dir": None}, "run_dir is not set"),
        (
            {"data": {"sources": [{"path": "a", "steps": 20}, {"path": "b"}]}},
            "data.sources: the last one is never reached, the others last 20 steps",
        ),
    ],
)
def test_what_no_run_can_be_made_from_is_told(recipe, changes, told):
    assert told in problems(recipe(**changes))


def test_stage_pretrain_needs_no_model_to_start_from(recipe):
    config = load_config(
        recipe(stage="pretrain", model={"ratios": [4], "language": {"model_type": "qwen3"}}), []
    )
    assert config.model.language == {"model_type": "qwen3"}


def test_files_and_overrides_that_cannot_be_read_are_named(tmp_path, recipe):
    assert "absent.yaml: no such recipe" in problems(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    for content in ("- a list", "word", "stage", "3"):
        broken.write_text(content)
        assert f"{broken}: " in problems(broken)
    assert "expected key=value, got seed, x" in problems(recipe(), ["seed", "run_dir=a", "x"])


def test_a_recipe_that_is_no_yaml_is_named(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("stage: [unclosed")
    with pytest.raises(ValueError, match=r"broken\.yaml: "):
        load_config(path, [])


def test_a_saved_configuration_loads_as_the_same(recipe, tmp_path):
    config = load_config(
        recipe(
            optim={"lr": 3e-5},
            data={"sources": [{"path": "a", "steps": 3}, {"path": "b"}], "tiling": {"max_tiles": 3}},
            model={"path": "m", "vision": {"width": 8, "image_mean": [0.5, 0.5, 0.5]}},
        ),
        ["consistency.reverse_kl=true"],
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", []) == config


def test_a_run_keeps_its_settings_and_refuses_others(recipe, tmp_path):
    run_dir = f"run_dir={tmp_path}/run"
    config = prepare_run(recipe(), [run_dir])
    assert load_config(tmp_path / "run" / "config.yaml", []) == config
    assert prepare_run(recipe(), [run_dir]) == config
    with pytest.raises(ValueError, match="holds a run with other settings") as caught:
        prepare_run(recipe(), [run_dir, "optim.lr=0.5", "data.batch_size=8"])
    assert "(data.batch_size: 4 -> 8; optim.lr: 1e-05 -> 0.5); set run_dir" in str(caught.value)
    assert load_config(tmp_path / "run" / "config.yaml", []) == config


def test_settings_that_change_no_result_may_change(recipe, tmp_path):
    run_dir = f"run_dir={tmp_path}/run"
    prepare_run(recipe(), [run_dir])
    harmless = [
        "data.num_workers=3",
        "trainer.checkpoint_every=7",
        "trainer.keep_checkpoints=9",
        "trainer.log_every=1",
    ]
    assert prepare_run(recipe(), [run_dir, *harmless]).data.num_workers == 3


def test_differences_are_listed_down_to_the_key(recipe):
    old = load_config(recipe(), [])
    new = load_config(recipe(model={"path": "other"}), ["seed=1", "router.window=9000"])
    assert config_differences(old, old) == []
    assert config_differences(old, new) == [
        "model.path: data/base -> other",
        "router.window: 4096 -> 9000",
        "seed: 0 -> 1",
    ]


@pytest.fixture
def released(tmp_path):
    """A model folder that sees tiles of 56 px, 4 per image at most, and answers under a system message."""
    write_official(tmp_path / "released")
    return tmp_path / "released"


def test_a_run_takes_from_the_model_what_the_recipe_leaves_open(recipe, released, tmp_path):
    data = {**RECIPE["data"], "tiling": {"max_tiles": 2}, "chat": {"max_tokens": 99}}
    config = prepare_run(recipe(model={"path": str(released)}, data=data), [f"run_dir={tmp_path}/run"])
    assert (config.data.tiling.tile_size, config.data.tiling.max_tiles) == (56, 2)
    assert (config.data.chat.system is not None, config.data.chat.max_tokens) == (True, 99)
    assert load_config(tmp_path / "run" / "config.yaml", []) == config


def test_a_model_that_is_absent_leaves_no_run_folder(recipe, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/absent: no config.json"):
        prepare_run(recipe(model={"path": f"{tmp_path}/absent"}), [f"run_dir={tmp_path}/run"])
    assert not (tmp_path / "run").exists()


def test_names_on_the_hub_are_pinned_for_the_life_of_a_run(recipe, released, tmp_path, monkeypatch):
    commits = iter(letter * 40 for letter in "abcd")

    def newest(_, name, *, revision):
        return SimpleNamespace(sha=next(commits))

    monkeypatch.setattr(hub.HfApi, "model_info", newest)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: str(released))
    path = recipe(model={"path": "owner/policy", "reference": "owner/base@v1"})
    config = prepare_run(path, [f"run_dir={tmp_path}/run"])
    assert config.model.path == f"owner/policy@{'a' * 40}"
    assert config.model.reference == f"owner/base@{'b' * 40}"
    stored = (tmp_path / "run" / "config.yaml").read_text()
    assert "a" * 40 in stored
    # The Hub has moved on: the run has not, but a tag that was asked for is a question of today.
    with pytest.raises(ValueError, match=r"other settings \(model.reference: "):
        prepare_run(path, [f"run_dir={tmp_path}/run"])
    again = prepare_run(recipe(model={"path": "owner/policy"}), [f"run_dir={tmp_path}/other"])
    assert again.model.reference is None


def test_a_run_of_an_earlier_version_is_still_read(recipe, tmp_path):
    """Its config.yaml has keys that were renamed or removed since."""
    config, path = prepare_run(recipe(), [f"run_dir={tmp_path}/run"]), tmp_path / "run" / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    stored["data"]["packs"] = stored["data"].pop("micro_batch")
    stored["consistency"] |= {"reference_cache": None, "reference_cache_gib": 100.0}
    path.write_text(yaml.safe_dump(stored))
    assert load_config(path, []) == config
    assert prepare_run(recipe(), [f"run_dir={tmp_path}/run"]) == config


def test_tiles_of_another_size_are_refused_before_there_is_a_run(recipe, released, tmp_path):
    model, data = {"path": str(released)}, {**RECIPE["data"], "tiling": {"tile_size": 28}}
    with pytest.raises(ValueError, match="tile_size is 28 but the model sees tiles of 56 pixels"):
        prepare_run(recipe(model=model, data=data), [f"run_dir={tmp_path}/run"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "setting",
    ["devices=-1", "devices=0", "strategy=deepspeed", "log_every=0", "checkpoint_every=0", "watchdog_s=0"],
)
def test_trainer_settings_that_no_run_can_have_are_refused(recipe, setting):
    with pytest.raises(ValueError, match=rf"trainer\.{setting.partition('=')[0]} is .*expected"):
        load_config(recipe(), [f"trainer.{setting}"])
