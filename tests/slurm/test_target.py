"""`make slurm` submits the template; DRY=1 prints the command that it would run."""

import shlex
import subprocess

import pytest

from tests.test_makefile import ROOT, make


def submitted(*settings):
    """The words after sbatch."""
    program, *words = shlex.split(make("slurm", "DRY=1", *settings))
    assert program == "sbatch"
    return words


def test_the_recipe_is_submitted_with_a_task_per_gpu():
    words = submitted("RECIPE=mine.yaml", "NODES=2", "GPUS=4")
    assert words[:3] == ["--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"]
    assert words[3:] == ["recipes/slurm/train.sbatch", "mine.yaml"]


def test_without_gpus_a_node_has_one_task():
    words = submitted("RECIPE=mine.yaml", "GPUS=0")
    assert words[:2] == ["--nodes=1", "--ntasks-per-node=1"]
    assert not any("gpu" in word for word in words)


def test_settings_of_the_run_follow_the_recipe_and_those_of_the_job_precede_the_template():
    given = ["RECIPE=mine.yaml", "ARGS=seed=1 optim.lr=2", "RUN=runs/mine", "OPTIONS=--partition=a --time=9"]
    words = submitted(*given)
    template = words.index("recipes/slurm/train.sbatch")
    assert words[template - 2 : template] == ["--partition=a", "--time=9"]
    assert words[template + 1 :] == ["mine.yaml", "run_dir=runs/mine", "seed=1", "optim.lr=2"]


def test_without_a_recipe_nothing_is_submitted():
    done = subprocess.run(["make", "slurm", "RECIPE="], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "expected make slurm RECIPE=FILE.yaml" in done.stderr


@pytest.mark.parametrize("setting", ["NODES", "GPUS", "OPTIONS", "ARGS"])
def test_help_names_what_can_be_set(setting):
    (line,) = [line for line in make("help").splitlines() if line.split()[:1] == ["slurm"]]
    assert f"{setting}=" in line
