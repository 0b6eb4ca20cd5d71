import pytest
import yaml
from huggingface_hub import ModelInfo

from tests.support.released import write_official
from vico_pl.config import load_config, save_config
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


def test_an_override_reaches_into_a_list_and_a_described_tower_replaces_another(recipe):
    model = {"path": "a", "vision": {"open_clip": "ViT-B-16", "pretrained": "openai"}, "dropout": 0.2}
    changes = ["data.sources.0.path=b", "model.vision={width: 8}", "model={path: c}"]
    config = load_config(recipe(model=model), changes)
    assert config.data.sources[0].path == "b"
    assert (config.model.path, config.model.vision, config.model.dropout) == ("c", {"width": 8}, 0.2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # Validation.
        (["trainer.validate_every=5"], ["data.validation is empty; name a set of held-out shards"]),
        (["trainer.best_metric=val/a/kl"], ["trainer.best_metric is set but trainer.validate_every is 0"]),
        (
            ["trainer.best_metric=kl", "trainer.validate_every=5", "data.validation=[{name: a, path: x}]"],
            ["trainer.best_metric is 'kl'; expected val/NAME/... of a set in data.validation"],
        ),
        (["trainer.best_mode=lowest"], ["trainer.best_mode is 'lowest'; expected min or max"]),
        (
            ["data.validation=[{name: a, pth: x}]"],
            ["data.validation.0.pth (did you mean data.validation.0.path?)"],
        ),
        # Unknown keys, with what was probably meant.
        (["optimizer.lr=1"], ["unknown key optimizer (did you mean optim?)"]),
        (["optim.learning_rate=1"], ["unknown key optim.learning_rate"]),
        (["trainer.max_step=5"], ["unknown key trainer.max_step (did you mean trainer.max_steps?)"]),
        (["data.tiling.max_tile=3"], ["data.tiling.max_tile (did you mean data.tiling.max_tiles?)"]),
        (
            ["data.sources=[{path: a, steps: 5}, {paht: b}]"],
            ["unknown key data.sources.1.paht (did you mean data.sources.1.path?)"],
        ),
        (["oprim={}", "optim.lrr=1", "trainer.max_stepz=1"], ["oprim", "optim.lrr", "trainer.max_stepz"]),
        # Values of the wrong type or out of range.
        (["trainer.max_steps=1.5"], ["trainer.max_steps: "]),
        (["model.ratios=[4, many]"], ["model.ratios"]),
        (["data.sources=shards"], ["sources"]),
        (
            ["seed=abc", "optim.lr=fast", "consistency.temperature=0", "router.epsilon=0"],
            ["seed: ", "optim.lr: ", "consistency.temperature is 0", "router.epsilon is 0"],
        ),
        (["optim.parts.visoin.lr=1"], ["unknown key optim.parts.visoin (did you mean optim.parts.vision?)"]),
        (["optim.parts.vision.lr=-1"], ["optim.parts.PART.lr is -1.0; expected 0 or more"]),
        # Contradictions.
        (["optim.parts.router.lr=1"], ["optim.parts names router, but this run trains connectors, language"]),
        (["optim.schedule_args.power=2"], ["names power; schedule 'cosine' takes num_cycles"]),
        (["stage=stage1"], ["stage is 'stage1'; expected one of pretrain, consistency, router"]),
        (["stage=null", "run_dir=null"], ["stage is not set", "run_dir is not set"]),
        (["model.trainable=[]"], ["model.trainable is []; stage consistency has nothing to train"]),
        (["model.trainable=[router]"], ["stage consistency has nothing to train"]),
        (["model.trainable=[language, lora]"], ["names both language (all its weights) and lora"]),
        (["model.attention=flash"], ["model.attention is 'flash' but trainer.precision is '32-true'"]),
        (
            ["data.sources=[{path: a, steps: 20}, {path: b}]"],
            ["data.sources: the last one is never reached, the others last 20 steps"],
        ),
        (
            ["model={ratios: [4], path: null, trainable: [vision, brain]}", "data.sources=[]"],
            [
                "model.trainable names 'brain'; expected some of vision, connectors, language",
                "model.path is not set; this stage starts from a model folder",
                "model.ratios is [4]; stage consistency needs at least two",
                "data.sources is empty",
            ],
        ),
        (["seed", "run_dir=a", "x"], ["expected key=value, got seed, x"]),
        (["data.sources.7.path=a"], ["data.sources[7]"]),
        (["model.vision={width"], ["expected ',' or '}'"]),
    ],
    ids=lambda value: value[0],
)
def test_all_problems_of_a_recipe_are_reported_at_once(recipe, overrides, message):
    found = problems(recipe(), overrides)
    for part in message:
        assert part in found


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("trainer.devices='-1'", "auto or a number, 1 or more"),
        ("trainer.devices='0'", "auto or a number, 1 or more"),
        ("trainer.strategy='deepspeed'", "auto, ddp or fsdp"),
        ("trainer.log_every=0", "1 or more"),
        ("trainer.checkpoint_every=0", "1 or more"),
        ("trainer.watchdog_s=0.0", "more than 0 seconds"),
        ("trainer.precision='bf16-true'", "32-true or bf16-mixed"),
        ("model.attention='ring'", "one of sdpa, flash"),
        ("model.lora.rank=0", "1 or more"),
        ("model.lora.alpha=0", "more than 0"),
        ("model.lora.dropout=1.0", "0 to less than 1"),
        ("model.lora.targets='q_proj'", "all-linear or a list"),
        ("model.lora.targets=[]", "all-linear or a list"),
        ("optim.max_grad_norm=0.0", "more than 0"),
        ("optim.max_grad_norm=-1.0", "more than 0"),
        ("optim.max_grad_norm=nan", "more than 0"),
        ("optim.lr=-1e-05", "0 or more"),
        ("optim.lr=inf", "0 or more"),
        ("optim.beta2=1.0", "0 to below 1"),
        ("optim.warmup_steps=-1", "0 or more"),
        ("optim.schedule='cosin'", "one of linear, cosine"),
        ("optim.schedule='greedy'", "one of linear, cosine"),  # it looks at the loss
        ("consistency.ratio_draw='patch'", "one of image, tile, mixed, full"),
        ("consistency.temperature=0.0", "more than 0"),
        ("consistency.kernel='triton'", "native or liger"),
        ("consistency.chunk_size=0", "1 or more"),
        ("router.label_mode='patch'", "image or tile"),
        ("router.percentile=0.0", "between 0 and 100"),
        ("router.percentile=100.0", "between 0 and 100"),
        ("router.epsilon=0.0", "more than 0"),
        ("router.min_history=0", "1 to router.window (4096)"),
        ("router.min_history=4097", "1 to router.window (4096)"),
        ("data.batch_size=0", "1 or more"),
        ("data.max_bad_fraction=1.5", "0 to 1"),
        ("data.micro_batch.max_tiles=0", "1 or more"),
        ("data.micro_batch.max_tokens=0", "1 or more"),
        ("data.tiling.min_tiles=0", "1 to data.tiling.max_tiles (12)"),
        ("data.tiling.min_tiles=13", "1 to data.tiling.max_tiles (12)"),
        ("data.tiling.max_tiles=1000000", "at most 1024"),
        ("data.images.max_pixels=0", "1 to 178956970"),
        ("data.images.max_pixels=1073741824", "1 to 178956970"),
        ("data.images.max_bytes=0", "1 or more"),
        ("data.images.min_side=0", "1 or more"),
        ("data.streaming.window=0", "at least 1"),
    ],
)
def test_a_value_out_of_range_is_refused(recipe, setting, expected):
    name, _, value = setting.partition("=")
    given = f"{name}={f'.{value}' if value in ('inf', 'nan') else value}"
    assert f"{name} is {value}; expected {expected}" in problems(recipe(), [given])


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ("{path: a}, {path: b}", "a needs 'steps', as another source follows it"),
        ("{path: a, weight: 1}, {path: b}", "b needs a 'weight'"),
        ("{path: a, weight: 1, steps: 5}", "a has 'steps' where"),
        ("{path: a, weight: 0}", "a has weight 0.0; expected a number"),
        ("{path: a, weight: .inf}", "a has weight inf; expected a number"),
    ],
)
def test_sources_that_neither_follow_each_other_nor_mix_are_refused(recipe, sources, expected):
    assert expected in problems(recipe(), [f"data.sources=[{sources}]"])


@pytest.mark.parametrize(
    "content", ["- a list", "word", "stage", "3", "stage: [unclosed", "a: " + "[" * 5000 + "]" * 5000]
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, content):
    path = tmp_path / "broken.yaml"
    assert f"{path}: no such recipe" in problems(path)
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path}: "):
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


def test_references_stay_references_and_files_with_secrets_are_the_owners(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", "topsecret")
    monkeypatch.setenv("BASE", "data/base")
    path, stored = tmp_path / "run" / "config.yaml", "https://host/a-{000000..000001}.tar?sig=${oc.env:TOKEN}"
    data = {**RECIPE["data"], "sources": [{"path": stored}]}
    config = prepare_run(recipe(data=data, model={"path": "${oc.env:BASE}"}), [f"run_dir={tmp_path}/run"])
    assert (config.data.sources[0].path[-13:], config.model.path) == ("sig=topsecret", "data/base")
    assert load_config(path, []) == config
    assert stored in path.read_text()
    assert "topsecret" not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    prepare_run(recipe(), [f"run_dir={tmp_path}/other"])
    assert (tmp_path / "other" / "config.yaml").stat().st_mode & 0o044


def test_a_run_keeps_its_settings_and_refuses_others_unless_they_change_no_result(recipe, tmp_path):
    run_dir = f"run_dir={tmp_path}/run"
    config = prepare_run(recipe(), [run_dir])
    assert prepare_run(recipe(), [run_dir]) == config
    with pytest.raises(ValueError, match="holds a run with other settings") as caught:
        prepare_run(recipe(), [run_dir, "optim.lr=0.5", "data.batch_size=8", "seed=1"])
    assert "(data.batch_size: 4 -> 8; optim.lr: 1e-05 -> 0.5; seed: 0 -> 1); set" in str(caught.value)
    assert str(caught.value).endswith("model.path: a model folder that 'vico export' makes")
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "config.json").touch()
    with pytest.raises(ValueError, match=f"go on from its weights model.path: {tmp_path}/run/model$"):
        prepare_run(recipe(), [run_dir, "trainer.max_steps=2000"])
    assert load_config(tmp_path / "run" / "config.yaml", []) == config
    harmless = ["trainer.checkpoint_every=7", "trainer.keep_checkpoints=9", "trainer.log_every=1"]
    assert prepare_run(recipe(), [run_dir, "data.num_workers=3", *harmless]).data.num_workers == 3


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "absent: no config.json"),
        ("released", "tile_size is 28 but the model sees tiles of 56 pixels"),
    ],
)
def test_a_model_that_is_absent_or_sees_other_tiles_leaves_no_run_folder(
    recipe, released, tmp_path, name, message
):
    model, data = {"path": str(tmp_path / name)}, {**RECIPE["data"], "tiling": {"tile_size": 28}}
    with pytest.raises(ValueError, match=message):
        prepare_run(recipe(model=model, data=data), [f"run_dir={tmp_path}/run"])
    assert not (tmp_path / "run").exists()


def test_names_on_the_hub_are_pinned_for_the_life_of_a_run(recipe, released, tmp_path, monkeypatch):
    newest = (ModelInfo(id="x", sha=letter * 40) for letter in "abcd")
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: next(newest))
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: str(released))
    path = recipe(model={"path": "owner/policy", "reference": "owner/base@v1"})
    config = prepare_run(path, [f"run_dir={tmp_path}/run"])
    assert config.model.path == f"owner/policy@{'a' * 40}"
    assert config.model.reference == f"owner/base@{'b' * 40}"
    assert "a" * 40 in (tmp_path / "run" / "config.yaml").read_text()
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
