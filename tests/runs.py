"""Tiny CPU runs: recipes, results, and ways to observe and interrupt them."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

import vico_pl.trainer
from tests.helpers import TILE
from vico_pl.prepare import prepare_run
from vico_pl.stages import build_stage
from vico_pl.trainer import train

STEPS = 6


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
    return train(prepare_run(recipe_path, overrides))


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
        results = stage.results

        def watched(micro_batches):
            before_step(stage)
            return results(micro_batches)

        stage.results = watched
        return stage

    monkeypatch.setattr(vico_pl.trainer, "build_stage", build)


def break_run(monkeypatch, path, *overrides):
    """Start a run that fails at step five."""

    def break_at_step_five(stage):
        if stage.trainer.global_step == 5:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        watch_steps(patch, break_at_step_five)
        with pytest.raises(RuntimeError, match="power cut"):
            run(path, *overrides)
