"""What the Makefile would run, as `make -n` prints it."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Makefile").read_text()
PHONY = {name for line in re.findall(r"^\.PHONY: (.*)", TEXT, re.MULTILINE) for name in line.split()}
ALIASES = {"data": "shards", "tests": "test"}  # of folders' names; not listed by `make help`
STEPS = [
    "shards glyphs --output SHARDS/train",
    "shards glyphs --output SHARDS/calibration",
    "shards glyphs --output SHARDS/val",
    "train recipes/demo/consistency.yaml run_dir=RUN/consistency",
    "train recipes/demo/router.yaml run_dir=RUN/router model.path=RUN/consistency/model",
    "calibrate RUN/router/model --data SHARDS/calibration",
    "eval RUN/router/model --data SHARDS/val --output RUN/report",
]


def run_make(*arguments):
    """Run make without the settings of a surrounding `make test`."""
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS", "RECIPE", "RUN", "SHARDS")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    command = ["make", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def make(*arguments):
    """Return the output of make."""
    done = run_make(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def vico_commands(printed):
    return re.findall(r"^\S*/bin/vico (.*?)\s*$", printed, re.MULTILINE)


@pytest.fixture
def folders(tmp_path):
    """Settings that point make at a temporary folder."""
    return [f"RUN={tmp_path}/run", f"SHARDS={tmp_path}/shards"]


def planned(tmp_path, folders, *arguments):
    """Return the planned `vico` commands, with folders shown as RUN and SHARDS."""
    lines = vico_commands(make("-n", *folders, *arguments))
    return [line.replace(f"{tmp_path}/run", "RUN").replace(f"{tmp_path}/shards", "SHARDS") for line in lines]


def finish(tmp_path):
    """Write the outputs of a whole demo, one minute apart."""
    names = [f"shards/{part}/index.json" for part in ("train", "calibration", "val")]
    names += ["run/consistency/config.yaml", "run/consistency/model/config.json", "run/router/config.yaml"]
    names += ["run/router/model/config.json", "run/router/model/calibration.json", "run/report/report.json"]
    for minute, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        os.utime(path, (1e9 + 60 * minute,) * 2)


def steps_of(plan):
    return [next((step for step in STEPS if line.startswith(step)), line) for line in plan]


def test_the_demo_runs_its_steps_in_order_on_sets_of_different_seeds(tmp_path, folders):
    plan = planned(tmp_path, folders, "demo")
    assert steps_of(plan) == STEPS
    assert len({re.search(r"--seed (\d+)", line).group(1) for line in plan[:3]}) == 3


def test_a_finished_demo_repeats_nothing_even_with_newer_shards(tmp_path, folders):
    finish(tmp_path)
    assert planned(tmp_path, folders, "demo") == []
    os.utime(tmp_path / "shards" / "train" / "index.json", (2e9, 2e9))
    assert planned(tmp_path, folders, "demo") == []


@pytest.mark.parametrize(
    ("lost", "first_step"),
    [
        ("run/report/report.json", 6),
        ("run/router/model/calibration.json", 5),
        ("run/router/model/config.json", 4),
        ("run/consistency/model/config.json", 3),
    ],
)
def test_an_interrupted_demo_resumes_at_the_missing_step(tmp_path, folders, lost, first_step):
    finish(tmp_path)
    (tmp_path / lost).unlink()
    assert steps_of(planned(tmp_path, folders, "demo")) == STEPS[first_step:]


@pytest.mark.parametrize(
    ("change", "is_refused"),
    [
        (lambda run: os.utime(run / "router" / "config.yaml", (0, 0)), False),
        (lambda run: (run / "consistency" / "model" / "model.safetensors").write_text("others"), True),
        (lambda run: (run / "router.begun_with").unlink(), False),
    ],
)
def test_a_begun_run_is_resumed_by_the_content_of_its_first_model_and_never_removed(
    tmp_path, change, is_refused
):
    """The clock may have jumped, or the model of stage 1 been trained again."""
    run, shards = tmp_path / "run", [tmp_path / "shards" / part for part in ("train", "calibration")]
    for folder in (tmp_path / "bin", run / "consistency" / "model", *shards):
        folder.mkdir(parents=True)
    vico = tmp_path / "bin" / "vico"
    vico.write_text(f"#!/bin/sh\nmkdir -p {run}/router\ntouch {run}/router/config.yaml\n")
    vico.chmod(0o755)
    for file in (tmp_path / ".installed", *(folder / "index.json" for folder in shards)):
        file.touch()
    (run / "consistency" / "model" / "model.safetensors").write_text("weights")
    (run / "consistency" / "model" / "config.json").write_text("{}")
    settings = [f"RUN={run}", f"SHARDS={tmp_path}/shards", f"VENV={tmp_path}", "train-router"]
    assert "is not finished; the same command resumes it" in run_make(*settings).stderr
    (run / "router" / "last.ckpt").touch()
    change(run)
    done = run_make(*settings)
    assert ("was begun with another model" in done.stderr) == is_refused
    assert ("the same command resumes it" in done.stderr) != is_refused
    assert (run / "router" / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("settings", "run"),
    [
        ("", "runs/demo"),
        ("seed=1", "runs/demo-seed=1"),
        ("seed=1 optim.lr=1e-3", "runs/demo-seed=1-optim.lr=1e-3"),
        ("model.path=a/b", "runs/demo-model.path=a_b"),
        ("x='; echo no'", "runs/demo-x=-echo-no-"),
    ],
)
def test_settings_go_to_training_and_name_the_run(settings, run):
    plan = vico_commands(make("-n", "-B", "demo", f"ARGS={settings}"))  # -B: even where the demo is done
    for stage in ("consistency", "router"):
        (line,) = [line for line in plan if line.startswith(f"train recipes/demo/{stage}.yaml ")]
        plan.remove(line)
        assert f" run_dir={run}/{stage} " in f"{line} "
        assert line.endswith(settings)
    assert not any(set(settings.split()) & set(line.split()) for line in plan)


@pytest.mark.parametrize(("target", "last"), [("train-stage1", 3), ("train-router", 4)])
def test_a_stage_is_trained_after_what_it_needs_in_the_given_run_folder(tmp_path, folders, target, last):
    plan = planned(tmp_path, folders, target, "ARGS=seed=1")
    assert plan[-1].split() == [*STEPS[last].split(), "seed=1"]
    assert plan[0].startswith(STEPS[0])


def test_stage_three_follows_calibration_and_is_no_part_of_the_demo(tmp_path, folders):
    plan = planned(tmp_path, folders, "train-routed", "ARGS=seed=1")
    settings = "run_dir=RUN/routed model.path=RUN/router/model seed=1"
    assert plan[-2:] == [STEPS[5], f"train recipes/demo/routed.yaml {settings}"]
    assert not any("routed" in line for line in planned(tmp_path, folders, "demo"))


@pytest.mark.parametrize("target", ["train-stage1", "train-router", "train-routed"])
def test_your_own_recipe_is_trained_alone(target):
    plan = vico_commands(make("-n", target, "RECIPE=mine.yaml", "ARGS=seed=1 optim.lr=2"))
    assert [line.split() for line in plan] == [["train", "mine.yaml", "seed=1", "optim.lr=2"]]
    assert "run_dir=runs/mine" in make("-n", target, "RECIPE=mine.yaml", "RUN=runs/mine")


def test_help_lists_every_target_and_stands_alone_for_make():
    printed = make("help")
    assert make() == printed
    listed = set(re.findall(r"^  ([a-z0-9-]+) {2,}\S", printed, re.MULTILINE))
    assert listed == PHONY - set(ALIASES)


def test_aliases_do_what_their_targets_do(folders):
    for alias, target in ALIASES.items():
        assert make("-n", *folders, alias) == make("-n", *folders, target) != ""


@pytest.mark.parametrize("target", sorted(PHONY - {"demo", *ALIASES, *ALIASES.values()}))
def test_every_other_target_can_be_planned(target, folders):
    assert make("-n", "-B", *folders, target).strip()


def test_cleaning_leaves_other_runs_and_the_base_model_alone():
    removed = re.findall(r"^rm -rf (.*)", make("-n", "clean"), re.MULTILINE)
    words = {word for line in removed for word in line.split()}
    assert "runs/demo" in words
    assert not words & {"runs", "data", "data/base", "data/shards", ".", "/"}
    assert make("-n", "clean", "RUN=/precious", "SHARDS=/precious", "ARGS=/precious").count("precious") == 0
