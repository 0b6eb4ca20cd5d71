"""Runs that validate: their figures, their weights, their best checkpoint."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.runs import STEPS, audit, break_run, differing, finish, metrics, run, start
from vico_pl.callbacks.checkpoints import newest_checkpoint
from vico_pl.callbacks.sharded import read_checkpoint
from vico_pl.prepare import is_finished
from vico_pl.stages.base import Stage
from vico_pl.stages.validation import Validation
from vico_pl.trainer import export_checkpoint

FIGURES = {
    "pretrain": {"loss", "token_accuracy", "score_full"},
    "consistency": {"kl", "kl_ratio_4", "kl_ratio_16", "vision_token_fraction"}
    | {"score_full", "score_ratio_16"},
    "router": {"auroc", "accuracy", "calibration_error", "brier", "compressed_fraction"}
    | {"score_full", "score_routed"}
    | {f"{name}_at_{t}" for name in ("kl", "token_fraction") for t in (0.3, 0.5, 0.7)},
}
STAGES = pytest.mark.parametrize("stage", list(FIGURES))
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def validating(shards, *, every=4, names=("held",)):
    """Settings that validate on 11 of 18 records, in steps of 4."""
    sets = [{"name": name, "path": str(shards), "max_samples": 11} for name in names]
    return [
        f"data.validation={yaml.safe_dump(sets, default_flow_style=True)}",
        f"trainer.validate_every={every}",
    ]


def validations(run_dir):
    """The figures of each validation: {step: {name: value}}; a repeated one must be the same."""
    found = {}
    for line in metrics(run_dir):
        values = {name: value for name, value in line.items() if name.startswith("val/")}
        if values:
            assert found.setdefault(line["step"] + 1, values) == values
    return found


@FORKS
@STAGES
def test_a_run_that_validates_has_the_weights_and_metrics_of_one_that_does_not(
    runs, shards, tmp_path, stage, caplog
):
    plain, validated = tmp_path / "plain", tmp_path / "validated"
    settings = ["seed=3", "model.dropout=0.3", "data.num_workers=1"]
    run(runs / f"{stage}.yaml", f"run_dir={plain}", *settings)
    run(runs / f"{stage}.yaml", f"run_dir={validated}", *settings, *validating(shards, names=("a", "b")))
    assert differing(validated, plain) == set()
    lines = [line for line in metrics(validated) if not any(name.startswith("val/") for name in line)]
    assert lines == metrics(plain)
    assert (validated / "samples-rank-0.jsonl").read_bytes() == (plain / "samples-rank-0.jsonl").read_bytes()
    assert audit(validated).faults == []
    assert multiprocessing.active_children() == []
    found = validations(validated)
    assert list(found) == [4, STEPS]  # every fourth step, and the last
    names = {f"val/{name}/{figure}" for name in ("a", "b") for figure in FIGURES[stage]}
    assert found[STEPS].keys() == names
    last_lines = caplog.messages[-len(names) :]
    assert [line.split()[0] for line in last_lines] == sorted(names)
    for figure in FIGURES[stage]:
        assert found[4][f"val/a/{figure}"] == found[4][f"val/b/{figure}"]
    assert found[4] != found[STEPS]
    events = EventAccumulator(str(validated / "tensorboard"))
    events.Reload()
    for name in names:
        assert [event.value for event in events.Scalars(name)] == pytest.approx(
            [s[name] for s in found.values()]
        )


@STAGES
def test_a_broken_run_goes_on_with_the_validation_of_its_checkpoint(
    runs, shards, tmp_path, monkeypatch, stage
):
    settings, unbroken, broken = validating(shards, every=2), tmp_path / "unbroken", tmp_path / "broken"
    run(runs / f"{stage}.yaml", f"run_dir={unbroken}", *settings)
    with monkeypatch.context() as patch:
        patch.setattr(
            Validation, "on_validation_epoch_end", lambda *_: None
        )  # the validations of the first attempt leave nothing
        break_run(patch, runs / f"{stage}.yaml", f"run_dir={broken}", *settings)
    assert newest_checkpoint(broken).name == "step-00000004.ckpt"
    monkeypatch.undo()
    run(runs / f"{stage}.yaml", f"run_dir={broken}", *settings)
    assert differing(broken, unbroken) == set()
    expected = validations(unbroken)
    assert list(expected) == [2, 4, 6]
    del expected[2]
    assert {step: values for step, values in validations(broken).items() if step > 2} == expected


@pytest.mark.parametrize(
    ("stage", "strategy", "ranks"),
    [("consistency", "ddp", 3), ("pretrain", "fsdp", 2), ("consistency", "fsdp", 2), ("router", "fsdp", 2)],
)
def test_any_number_of_ranks_gives_the_same_figures(runs, shards, tmp_path, stage, strategy, ranks):
    one, several = tmp_path / "one", tmp_path / "several"
    settings = [*validating(shards, every=1), "optim.lr=1e-12", "data.micro_batch.max_tiles=5"]
    settings += ["trainer.max_steps=2"]
    run(runs / f"{stage}.yaml", f"run_dir={one}", *settings)
    settings += [f"trainer.strategy={strategy}", "router.min_history=1"]
    finish(runs / f"{stage}.yaml", several, *settings, ranks=ranks)
    expected, found = validations(one), validations(several)
    assert list(found) == [1, 2]
    if strategy == "fsdp":  # asks no questions
        expected = {s: {n: v for n, v in of.items() if "score_" not in n} for s, of in expected.items()}
    for step, values in found.items():
        assert values == pytest.approx(expected[step], rel=1e-5, abs=1e-7)


def slow_validation(_):
    """Slow down validation, so that a signal can arrive within one, and say when it runs."""
    step = Stage.validation_step

    def slowly(stage, *args):
        os.write(1, b"validating\n")
        time.sleep(0.5)
        return step(stage, *args)

    Stage.validation_step = slowly


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_during_validation_ends_it_and_loses_nothing(runs, shards, tmp_path, ranks):
    recipe, stopped, unbroken = runs / "consistency.yaml", tmp_path / "stopped", tmp_path / "unbroken"
    settings = validating(shards)
    finish(recipe, unbroken, *settings, ranks=ranks)
    running = start(recipe, stopped, *settings, ranks=ranks, before=slow_validation)
    running.wait_for(lambda: running.log.exists() and "validating" in running.said())
    running.signal(signal.SIGTERM, ranks=[ranks - 1])
    assert set(running.wait()) == {0}, running.said()
    assert "step 5 is saved" in running.said()
    assert running.said().count("validating") < 3 * ranks
    assert validations(stopped) == {}
    finish(recipe, stopped, *settings, ranks=ranks)
    assert differing(stopped, unbroken) == set()
    assert validations(stopped)[STEPS] == validations(unbroken)[STEPS]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_checkpoint_is_kept_and_survives_a_resume(runs, shards, tmp_path, monkeypatch, mode):
    recipe, best = runs / "consistency.yaml", tmp_path / "checkpoints" / "best.ckpt"
    settings = [f"run_dir={tmp_path}", *validating(shards, every=1)]
    settings += ["trainer.best_metric=val/held/kl_ratio_16", f"trainer.best_mode={mode}"]
    break_run(monkeypatch, recipe, *settings)
    assert best.is_file()
    run(recipe, *settings)
    values = {step: figures["val/held/kl_ratio_16"] for step, figures in validations(tmp_path).items()}
    assert list(values) == [1, 2, 3, 4, 5, 6]
    state = torch.load(best, weights_only=True)
    assert state["global_step"] == {"min": min, "max": max}[mode](values, key=values.get)
    assert "optimizer_states" not in state
    assert newest_checkpoint(tmp_path).name == "step-00000006.ckpt"
    export_checkpoint(best, tmp_path / "best")
    assert is_finished(tmp_path)
    assert (tmp_path / "best" / "config.json").read_bytes() == (
        tmp_path / "model" / "config.json"
    ).read_bytes()


def test_the_best_checkpoint_of_sharded_weights_is_replaced_and_exported(runs, shards, tmp_path):
    best = tmp_path / "checkpoints" / "best.ckpt"
    settings = [*validating(shards, every=1), "trainer.max_steps=3", "trainer.strategy=fsdp"]
    settings += ["trainer.best_metric=val/held/kl_ratio_16", "trainer.best_mode=min"]
    finish(runs / "consistency.yaml", tmp_path, *settings, ranks=2)
    assert best.is_dir()
    values = {step: figures["val/held/kl_ratio_16"] for step, figures in validations(tmp_path).items()}
    state = read_checkpoint(best)
    assert state["global_step"] == min(values, key=values.get) > 1  # so it has been replaced
    assert "optimizer_states" not in state
    export_checkpoint(best, tmp_path / "best")
    assert is_finished(tmp_path)
    assert not list(best.parent.glob(".*"))


def test_an_unknown_metric_ends_the_run_at_the_first_validation_with_the_known_ones(runs, shards, tmp_path):
    settings = [f"run_dir={tmp_path}", *validating(shards, every=2), "trainer.best_metric=val/held/loss"]
    known = ", ".join(f"val/held/{figure}" for figure in sorted(FIGURES["consistency"]))
    with pytest.raises(ValueError, match=rf"best_metric is 'val/held/loss'; expected one of {known}$"):
        run(runs / "consistency.yaml", *settings)


@STAGES
def test_a_checkpoint_is_exported_as_the_run_writes_its_model(runs, tmp_path, stage):
    checkpoint = newest_checkpoint(runs / stage)
    os.makedirs(tmp_path / "run" / "checkpoints")
    for path in (runs / stage / "config.yaml", checkpoint):
        os.link(path, tmp_path / "run" / path.relative_to(runs / stage))
    export_checkpoint(tmp_path / "run" / "checkpoints" / checkpoint.name, tmp_path / "run" / "model")
    assert differing(tmp_path / "run", runs / stage) == set()
    names = {path.name for path in (runs / stage / "model").iterdir()}
    assert {path.name for path in (tmp_path / "run" / "model").iterdir()} == names


def test_what_is_no_checkpoint_of_a_run_is_not_exported(runs, tmp_path):
    checkpoint = newest_checkpoint(runs / "consistency")
    damaged = tmp_path / "checkpoints" / "best.ckpt"
    damaged.parent.mkdir()
    damaged.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"expected a checkpoint in RUN/checkpoints"):
        export_checkpoint(damaged, tmp_path / "new")
    os.link(runs / "consistency" / "config.yaml", tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"best\.ckpt: it cannot be read \("):
        export_checkpoint(damaged, tmp_path / "new")
    with pytest.raises(ValueError, match="not empty; name a new folder"):
        export_checkpoint(checkpoint, runs / "consistency" / "model")
