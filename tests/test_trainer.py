"""Whole runs on the CPU: pretrain -> consistency -> router on real shards, records, faults and resuming."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vico_pl.trainer
from tests.helpers import PLACEHOLDER_ID, TILE, batch_of, mixed_samples, record, tiny_spec
from vico_pl.config import open_run
from vico_pl.data.shards import write_index, write_shard
from vico_pl.data.tokenizer import load_tokenizer
from vico_pl.model.checkpoint.folder import load_model
from vico_pl.trainer import build_stage, is_finished, newest_checkpoint, train

STEPS = 6
LORA = ("model.trainable=[connectors,lora]", "model.lora={rank: 4, dropout: 0.2}")


def recipe(folder, stage, shards, **sections):
    """Write a recipe of a tiny run that checkpoints every other step."""
    settings = {
        "stage": stage,
        "run_dir": str(folder / stage),
        "data": {
            "sources": [{"path": str(shards)}],
            "batch_size": 4,
            "num_workers": 0,
            "tiling": {"tile_size": TILE, "max_tiles": 2},
        },
        "optim": {"lr": 3e-3},
        "trainer": {"max_steps": STEPS, "checkpoint_every": 2, "log_every": 1, "accelerator": "cpu"},
        **sections,
    }
    path = folder / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(recipe_path, *overrides):
    return train(open_run(recipe_path, overrides))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards):
    """A finished run of each stage, one from the other, and their recipes."""
    folder = tmp_path_factory.mktemp("runs")
    spec = tiny_spec()
    fresh = {"ratios": [4], "vision": spec.vision, "language": spec.language, "vocab_size": 384}
    run(recipe(folder, "pretrain", shards, model=fresh))
    base, policy = (str(folder / stage / "model") for stage in ("pretrain", "consistency"))
    run(recipe(folder, "consistency", shards, model={"path": base, "ratios": [4, 16]}))
    run(
        recipe(
            folder,
            "router",
            shards,
            model={"path": policy, "reference": base, "router_heads": 4},
            router={"window": 20, "min_history": 8},
        )
    )
    return folder


def weights(run_dir):
    return load_file(run_dir / "model" / "model.safetensors")


def differing(run_dir, other):
    ours, theirs = weights(run_dir), weights(other)
    return {name for name in ours.keys() | theirs.keys() if not same(ours.get(name), theirs.get(name))}


def same(a, b):
    return a is not None and b is not None and torch.equal(a, b)


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def watch_steps(monkeypatch, before_step):
    """Call `before_step(stage)` before each step of a run."""

    def build(*args):
        stage = build_stage(*args)
        step = stage.step

        def watched(batch):
            before_step(stage)
            return step(batch)

        stage.step = watched
        return stage

    monkeypatch.setattr(vico_pl.trainer, "build_stage", build)


def test_each_stage_hands_a_model_folder_to_the_next(runs):
    for stage in ("pretrain", "consistency", "router"):
        assert is_finished(runs / stage)
        assert len(load_tokenizer(runs / stage / "model")) <= 384
    models = [load_model(runs / stage / "model") for stage in ("pretrain", "consistency", "router")]
    assert [model.ratios for model in models] == [[4], [4, 16], [4, 16]]
    assert [model.router is not None for model in models] == [False, False, True]


def test_consistency_trains_everything_and_adds_a_connector(runs):
    changed = differing(runs / "consistency", runs / "pretrain")
    assert {name.split(".")[0] for name in changed} == {"vision", "connectors", "language"}
    assert any(name.startswith("connectors.by_ratio.16.") for name in changed)


def test_the_router_stage_adds_a_router_and_leaves_the_rest_bit_for_bit(runs):
    changed = differing(runs / "router", runs / "consistency")
    assert changed
    assert all(name.startswith("router.") for name in changed)


def test_pretraining_learns(runs):
    losses = [line["pretrain/loss"] for line in metrics(runs / "pretrain")]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("pretrain", {"pretrain/loss", "pretrain/token_accuracy", "optim/lr"}),
        ("consistency", {"consistency/loss", "vision_tokens/fraction", "optim/lr"}),
        (
            "router",
            {"router/loss", "router/accuracy", "router/compressed_fraction", "router/threshold", "optim/lr"},
        ),
    ],
)
def test_a_run_records_its_scalars(runs, stage, names):
    lines = metrics(runs / stage)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert names <= lines[-1].keys()
    events = EventAccumulator(str(runs / stage / "tensorboard"))
    events.Reload()
    assert names <= set(events.Tags()["scalars"])
    for name in names:
        recorded = {event.step: event.value for event in events.Scalars(name)}
        assert recorded == pytest.approx({line["step"]: line[name] for line in lines if name in line})


def test_a_run_folder_holds_its_settings_and_the_newest_checkpoints(runs):
    checkpoints = runs / "consistency" / "checkpoints"
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"step-00000004.ckpt", "step-00000006.ckpt", "last.ckpt"}
    assert newest_checkpoint(runs / "consistency").name == "step-00000006.ckpt"
    assert (checkpoints / "last.ckpt").resolve().name == "step-00000006.ckpt"
    settings = yaml.safe_load((runs / "consistency" / "config.yaml").read_text())
    assert settings["optim"]["lr"] == 3e-3
    assert settings["consistency"]["ratio_draw"] == "mixed"


@pytest.mark.parametrize(("stage", "parts"), [("consistency", {"model"}), ("router", {"router", "window"})])
def test_checkpoints_hold_what_is_trained_and_no_frozen_model(runs, stage, parts):
    checkpoint = torch.load(newest_checkpoint(runs / stage), weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == parts


def test_what_is_trained_is_in_training_mode_and_what_is_frozen_is_not(runs, tmp_path, monkeypatch):
    seen = []

    def before_step(stage):
        seen.append(all(module.training for module in stage.modules()))
        seen.append(not any(module.training for module in stage.reference.model.modules()))

    watch_steps(monkeypatch, before_step)
    run(runs / "consistency.yaml", f"run_dir={tmp_path}", "trainer.max_steps=1")
    assert seen == [True, True]


def break_run(monkeypatch, path, *overrides):
    """Start a run whose power is cut at step five."""

    def break_at_step_five(stage):
        if stage.trainer.global_step == 5:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        watch_steps(patch, break_at_step_five)
        with pytest.raises(RuntimeError, match="power cut"):
            run(path, *overrides)


@pytest.mark.parametrize("stage", ["pretrain", "consistency", "router"])
def test_a_run_that_broke_ends_with_the_weights_of_an_unbroken_one(runs, tmp_path, monkeypatch, stage):
    path, override = runs / f"{stage}.yaml", f"run_dir={tmp_path}"
    break_run(monkeypatch, path, override)
    assert newest_checkpoint(tmp_path).name == "step-00000004.ckpt"
    assert not is_finished(tmp_path)
    run(path, override)
    assert differing(tmp_path, runs / stage) == set()
    unbroken = {line["step"]: line for line in metrics(runs / stage)}
    resumed = {line["step"]: line for line in metrics(tmp_path)}
    assert resumed == unbroken


def test_a_run_killed_by_the_system_ends_with_the_weights_of_an_unbroken_one(runs, tmp_path):
    recipe, length = str(runs / "consistency.yaml"), ["trainer.max_steps=25", "trainer.checkpoint_every=1"]
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    command = [sys.executable, "-m", "vico_pl", "train", recipe, f"run_dir={killed}", *length]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while newest_checkpoint(killed) is None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert newest_checkpoint(killed) is not None, (tmp_path / "log").read_text()
    assert not is_finished(killed)
    for run_dir in (killed, unbroken):
        run(runs / "consistency.yaml", f"run_dir={run_dir}", *length)
    assert differing(killed, unbroken) == set()


def test_worker_processes_change_no_weight(runs, tmp_path):
    run(runs / "pretrain.yaml", f"run_dir={tmp_path}", "data.num_workers=2")
    assert differing(tmp_path, runs / "pretrain") == set()


def test_another_seed_gives_other_weights(runs, tmp_path):
    run(runs / "consistency.yaml", f"run_dir={tmp_path}", "trainer.max_steps=1", "seed=1")
    run(runs / "consistency.yaml", f"run_dir={tmp_path}/again", "trainer.max_steps=1", "seed=2")
    assert differing(tmp_path, tmp_path / "again")


def test_parts_that_are_not_trainable_stay_bit_for_bit(runs, tmp_path):
    run(
        runs / "consistency.yaml",
        f"run_dir={tmp_path}",
        "trainer.max_steps=2",
        "model.trainable=[connectors]",
    )
    changed = differing(tmp_path, runs / "pretrain")
    assert changed
    assert all(name.startswith("connectors.") for name in changed)


def test_bad_records_are_logged_and_training_goes_on(runs, tmp_path):
    records = [(str(i), record(text=f"<image>\n{i}?").files) for i in range(7)]
    write_shard(tmp_path / "shards" / "a.tar", [*records, ("bad", {"json": b"{"})])
    write_index(tmp_path / "shards")
    sources = f"data.sources=[{{path: {tmp_path}/shards}}]"
    run(runs / "pretrain.yaml", f"run_dir={tmp_path}/run", "trainer.max_steps=2", sources)
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert line["id"] == "a.tar/bad"
    assert line["reason"].startswith("JSON: ")
    assert metrics(tmp_path / "run")[-1]["data/bad_records"] == 1


def test_tiles_of_another_size_than_the_models_are_refused(runs, tmp_path):
    with pytest.raises(
        ValueError, match=r"data\.tiling\.tile_size is 64 but the model sees tiles of 32 pixels"
    ):
        run(runs / "consistency.yaml", f"run_dir={tmp_path}", "data.tiling.tile_size=64")


def test_a_model_folder_that_is_absent_is_named(runs, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/absent: no config.json"):
        run(runs / "consistency.yaml", f"run_dir={tmp_path}", f"model.path={tmp_path}/absent")


def test_a_run_is_trained_by_one_process_at_a_time(runs, tmp_path, monkeypatch):
    path, override = runs / "pretrain.yaml", f"run_dir={tmp_path}"

    def second_process(_):
        with pytest.raises(ValueError, match="is being trained by another process"):
            run(path, override)
        raise RuntimeError("seen")

    watch_steps(monkeypatch, second_process)
    with pytest.raises(RuntimeError, match="seen"):
        run(path, override)


@pytest.fixture(scope="module")
def lora_run(runs, tmp_path_factory):
    """The folder of a finished run that trained connectors and adapters, and its stage."""
    run_dir, stages = tmp_path_factory.mktemp("lora"), []
    with pytest.MonkeyPatch.context() as patch:
        watch_steps(patch, stages.append)
        run(runs / "consistency.yaml", f"run_dir={run_dir}", *LORA)
    return run_dir, stages[-1]


@torch.no_grad()
def states(model):
    """What a model makes of a batch whose placeholders are its own."""
    batch = batch_of(*mixed_samples())
    ids = torch.where(batch.input_ids == PLACEHOLDER_ID, model.spec.placeholder_id, batch.input_ids)
    batch = replace(batch, input_ids=ids)
    return model.response_states(batch, model.encode_tiles(batch.tiles), model.full_ratios(batch))


def test_a_run_with_adapters_writes_a_model_like_any_other(runs, lora_run):
    run_dir, stage = lora_run
    assert weights(run_dir).keys() == weights(runs / "consistency").keys()
    trained = stage.model.eval()
    torch.testing.assert_close(states(load_model(run_dir / "model")), states(trained), rtol=0, atol=1e-5)
    changed = {name.split(".")[0] for name in differing(run_dir, runs / "pretrain")}
    assert changed == {"connectors", "language"}


def test_a_run_with_adapters_holds_one_copy_of_what_is_frozen(lora_run):
    _, stage = lora_run
    assert stage.reference.model.language is stage.model.language
    assert stage.reference.model.vision is stage.model.vision
    assert {name.split(".")[0] for name, _ in stage.named_parameters()} == {"model"}


def test_checkpoints_of_a_run_with_adapters_hold_no_weights_of_the_model_folder(lora_run):
    run_dir, stage = lora_run
    checkpoint = torch.load(newest_checkpoint(run_dir), weights_only=True)
    assert checkpoint["state_dict"].keys() == {n for n, p in stage.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("trained", [LORA, ("model.trainable=[vision]",)], ids=["adapters", "a part"])
def test_a_partly_frozen_run_that_broke_ends_with_the_weights_of_an_unbroken_one(
    runs, tmp_path, monkeypatch, trained
):
    path, broken, unbroken = runs / "consistency.yaml", tmp_path / "broken", tmp_path / "unbroken"
    run(path, f"run_dir={unbroken}", *trained)
    break_run(monkeypatch, path, f"run_dir={broken}", *trained)
    run(path, f"run_dir={broken}", *trained)
    assert differing(broken, unbroken) == set()
    assert differing(broken, runs / "pretrain")


def test_a_finished_run_with_adapters_can_write_its_model_again(runs, lora_run):
    run_dir, _ = lora_run
    before = weights(run_dir)
    (run_dir / "model" / "config.json").unlink()
    run(runs / "consistency.yaml", f"run_dir={run_dir}", *LORA)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run_dir).items())


@pytest.mark.parametrize("trained", [(), LORA], ids=["parts", "adapters"])
def test_recomputing_activations_changes_no_weight(runs, tmp_path, trained):
    plain, recomputed = tmp_path / "plain", tmp_path / "recomputed"
    for folder, override in ((plain, "false"), (recomputed, "true")):
        switch = f"trainer.activation_checkpointing={override}"
        run(runs / "consistency.yaml", f"run_dir={folder}", "trainer.max_steps=2", switch, *trained)
    assert differing(plain, recomputed) == set()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # see test_blocks.py
def test_a_run_goes_on_compiled_where_it_began_uncompiled(runs, tmp_path, monkeypatch):
    programs = []

    def backend(graph, _):
        programs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    path, overrides = runs / "consistency.yaml", (f"run_dir={tmp_path}", *LORA)
    break_run(monkeypatch, path, *overrides)
    assert not programs
    (tmp_path / "config.yaml").unlink()  # which holds a run to its settings
    run(path, *overrides, "trainer.compile=true")
    assert programs
    assert is_finished(tmp_path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["model.trainable=[]"], r"model\.trainable is \[\]; stage consistency has nothing to train"),
        (["model.trainable=[router]"], "stage consistency has nothing to train"),
        (["model.trainable=[language,lora]"], "model.trainable names both language .* and lora"),
        (["model.attention=flash"], "model.attention is 'flash' but trainer.precision is '32-true'"),
        (["model.attention=ring"], "model.attention is 'ring'; expected one of sdpa, flash"),
    ],
)
def test_settings_that_contradict_each_other_are_told(runs, tmp_path, settings, told):
    with pytest.raises(ValueError, match=told):
        run(runs / "consistency.yaml", f"run_dir={tmp_path}", *settings)


def test_flash_attention_on_a_cpu_is_told_before_training(runs, tmp_path):
    with pytest.raises(ValueError, match="but this run is on cpu"):
        run(
            runs / "consistency.yaml",
            f"run_dir={tmp_path}",
            "model.attention=flash",
            "trainer.precision=bf16-mixed",
        )


@pytest.mark.parametrize(
    ("stage", "setting", "told"),
    [
        ("consistency", "model.lora={rank: 4}", "model.lora has no effect"),
        ("router", "trainer.activation_checkpointing=true", "trainer.activation_checkpointing has no effect"),
    ],
)
def test_a_setting_without_effect_warns(runs, tmp_path, stage, setting, told):
    with pytest.warns(UserWarning, match=told):
        run(runs / f"{stage}.yaml", f"run_dir={tmp_path}", "trainer.max_steps=1", setting)


def test_stage_router_labels_by_one_copy_where_policy_and_reference_are_the_same(runs, tmp_path, monkeypatch):
    stages = []
    watch_steps(monkeypatch, stages.append)
    run(runs / "router.yaml", f"run_dir={tmp_path}", "trainer.max_steps=1", "model.reference=null")
    assert stages[0].reference.model.language is stages[0].policy.model.language
