"""Whole runs on the CPU: pretrain -> consistency -> router on real shards, records, refusals and resuming."""

import json
import resource
import shutil
import signal
from importlib.metadata import version

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.runs import STEPS, break_run, differing, metrics, run, watch_steps
from tests.support.tiny import record
from vico_pl.callbacks.checkpoints import newest_checkpoint
from vico_pl.callbacks.guards import StopSignals
from vico_pl.config import load_config
from vico_pl.data.shards.reader import write_index, write_shard
from vico_pl.files import read_json
from vico_pl.model.families.base import CALIBRATION_NAME
from vico_pl.model.families.folder import load_model
from vico_pl.prepare import FolderModels, is_finished, prepare_run
from vico_pl.tokens import load_tokenizer
from vico_pl.trainer import MAX_FILES


def test_each_stage_hands_a_model_folder_to_the_next(runs):
    for stage in ("pretrain", "consistency", "router"):
        assert is_finished(runs / stage)
        assert len(load_tokenizer(runs / stage / "model")) <= 384
    models = [load_model(runs / stage / "model") for stage in ("pretrain", "consistency", "router")]
    assert [model.ratios for model in models] == [[4], [4, 16], [4, 16]]
    assert [model.router is not None for model in models] == [False, False, True]


def test_consistency_trains_everything_and_the_router_stage_the_router_alone(runs):
    changed = differing(runs / "consistency", runs / "pretrain")
    assert {name.split(".")[0] for name in changed} == {"vision", "connectors", "language"}
    assert any(name.startswith("connectors.by_ratio.16.") for name in changed)
    changed = differing(runs / "router", runs / "consistency")
    assert {name.split(".")[0] for name in changed} == {"router"}


def test_stage_three_trains_the_policy_at_the_routers_choice_and_hands_both_on(runs, tmp_path):
    stage3 = runs / "routed" / "consistency.yaml"
    with pytest.raises(ValueError, match="needs a calibrated router"):
        run(stage3, f"run_dir={tmp_path}/refused", f"model.path={runs}/router/model")
    run(stage3, f"run_dir={tmp_path}/routed")
    fractions = [line["vision_tokens/fraction"] for line in metrics(tmp_path / "routed")]
    assert max(fractions) < 1
    assert any(fraction > 0.25 for fraction in fractions), "some tiles are compressed, some are not"
    changed = {name.split(".")[0] for name in differing(tmp_path / "routed", runs / "router")}
    assert changed == {"vision", "connectors", "language"}
    assert FolderModels(load_config(tmp_path / "routed" / "config.yaml", [])).rule().threshold == 0.48
    kept = read_json(tmp_path / "routed" / "model" / CALIBRATION_NAME)
    assert kept == {"threshold": 0.48, "relative_threshold": None}  # the curve was that of other weights


def test_pretraining_learns(runs):
    losses = [line["pretrain/loss"] for line in metrics(runs / "pretrain")]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("stage", "quantities"),
    [
        ("pretrain", ("pretrain/loss", "pretrain/token_accuracy")),
        ("consistency", ("consistency/loss", "vision_tokens/fraction")),
        ("router", tuple(f"router/{n}" for n in ("loss", "accuracy", "compressed_fraction", "threshold"))),
    ],
)
def test_a_run_records_its_scalars(runs, stage, quantities):
    names, lines = {*quantities, "optim/lr"}, metrics(runs / stage)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert names <= lines[-1].keys()
    events = EventAccumulator(str(runs / stage / "tensorboard"))
    events.Reload()
    for name in names:
        recorded = {event.step: event.value for event in events.Scalars(name)}
        assert recorded == pytest.approx({line["step"]: line[name] for line in lines if name in line})


def test_a_run_folder_holds_the_newest_checkpoints(runs):
    checkpoints = runs / "consistency" / "checkpoints"
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"step-00000004.ckpt", "step-00000006.ckpt", "last.ckpt"}
    assert newest_checkpoint(runs / "consistency").name == "step-00000006.ckpt"
    assert (checkpoints / "last.ckpt").resolve().name == "step-00000006.ckpt"


def test_what_is_trained_is_in_training_mode_and_what_is_frozen_is_not(runs, tmp_path, monkeypatch):
    seen = []

    def before_step(stage):
        seen.append(all(module.training for module in stage.modules()))
        seen.append(not any(module.training for module in stage.reference.model.modules()))

    watch_steps(monkeypatch, before_step)
    run(runs / "consistency.yaml", f"run_dir={tmp_path}", "trainer.max_steps=1")
    assert seen == [True, True]


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


def test_another_seed_gives_other_weights(runs, tmp_path):
    run(runs / "consistency.yaml", f"run_dir={tmp_path}", "seed=1")
    assert differing(tmp_path, runs / "consistency")


def test_a_run_does_not_go_on_over_other_data(runs, tmp_path, monkeypatch):
    shards = tmp_path / "shards"
    changes = [f"run_dir={tmp_path}/run", f"data.sources=[{{path: {shards}}}]"]
    for sizes in ((4, 4), (5, 3)):
        shutil.rmtree(shards, ignore_errors=True)
        for number, size in enumerate(sizes):
            write_shard(shards / f"a-{number}.tar", [(f"{number}-{i}", record().files) for i in range(size)])
        write_index(shards)
        if sizes == (4, 4):
            break_run(monkeypatch, runs / "consistency.yaml", *changes)
    with pytest.raises(ValueError, match="8 samples in 2 shards, but this run began with 8 samples in 2, or"):
        run(runs / "consistency.yaml", *changes)


def test_a_policy_that_becomes_its_own_reference_is_reported(runs):
    config = load_config(runs / "router.yaml", ["model.reference=null"])
    with pytest.warns(
        UserWarning, match=r"ratios \[4, 16\]\): it becomes its own reference; set model\.reference"
    ):
        FolderModels(config).reference()


def test_connectors_that_the_recipe_does_not_name_are_reported_by_their_setting(runs, tmp_path):
    changes = [f"run_dir={tmp_path}/run", f"model.path={runs}/consistency/model", "model.ratios=[4, 64]"]
    with pytest.raises(
        ValueError, match=r"model\.ratios is \[4, 64\] but .* ratios \[4, 16\]; set model\.ratios"
    ):
        prepare_run(runs / "consistency.yaml", changes)
    assert not (tmp_path / "run").exists()


def test_a_run_tells_what_it_ran_on_and_a_short_one_its_last_step(runs, tmp_path):
    run(runs / "router.yaml", f"run_dir={tmp_path}", "trainer.log_every=100")
    (line,) = map(json.loads, (tmp_path / "environment.jsonl").read_text().splitlines())
    assert (line["torch"], line["num_ranks"]) == (version("torch"), 1)
    assert line["device"].startswith("cpu")
    assert [line["step"] for line in metrics(tmp_path) if "router/loss" in line] == [STEPS - 1]


def test_a_run_may_open_as_many_files_as_the_system_lets_it(runs, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        run(runs / "pretrain.yaml", f"run_dir={tmp_path}")
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert 256 < allowed <= MAX_FILES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_run_is_trained_by_one_process_at_a_time(runs, tmp_path, monkeypatch):
    path, override = runs / "pretrain.yaml", f"run_dir={tmp_path}"

    def second_process(_):
        with pytest.raises(ValueError, match="is being trained by another process"):
            run(path, override)
        raise RuntimeError("seen")

    watch_steps(monkeypatch, second_process)
    with pytest.raises(RuntimeError, match="seen"):
        run(path, override)


def test_a_stop_between_two_points_logs_nothing_again(runs, tmp_path, monkeypatch):
    def stop_within_step_3(callback, trainer, stage, *_):
        callback.received = signal.SIGTERM if trainer.global_step == 2 else None
        stage.stop_requested = callback.received is not None

    monkeypatch.setattr(StopSignals, "on_train_batch_start", stop_within_step_3)
    assert run(runs / "consistency.yaml", f"run_dir={tmp_path}", "trainer.log_every=2") is None
    assert newest_checkpoint(tmp_path).name == "step-00000003.ckpt"
    assert [line["step"] for line in metrics(tmp_path)] == [1]
