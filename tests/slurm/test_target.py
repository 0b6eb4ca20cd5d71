"""`make slurm` submits the template; DRY=1 prints the command that it would run."""

import os
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


@pytest.mark.parametrize(
    ("settings", "expected"), [([], "runs/internvl3_5-1b/consistency"), (["run_dir=runs/x"], "runs/x")]
)
def test_the_template_runs_in_the_folder_of_the_recipe(tmp_path, settings, expected):
    """So that the recipe of stage 2 finds the model of stage 1."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for name, line in (("scontrol", "echo node1"), ("srun", 'echo "$@"'), ("vico", ":")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NUM_NODES": "1",
    }
    environment = {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}", "VICO": "vico"}
    command = ["bash", "recipes/slurm/train.sbatch", "recipes/internvl3_5-1b/consistency.yaml", *settings]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert [word for word in done.stdout.split() if word.startswith("run_dir=")][-1] == f"run_dir={expected}"


def test_without_a_recipe_nothing_is_submitted():
    done = subprocess.run(["make", "slurm", "RECIPE="], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "expected make slurm RECIPE=FILE.yaml" in done.stderr
