"""With the reference's states on disk a run goes as without, and later epochs do without the reference."""

import random

import pytest

from tests.processes import finish, kill_at_random
from tests.runs import break_run, differing, metrics, run, watch_steps
from vico_pl.model.reference import FrozenReference

EPOCH = 5  # steps in which each of the 18 samples is met at least once
STEPS = 9  # two epochs


@pytest.fixture
def computed(monkeypatch):
    """In which steps the reference computed states."""
    steps, now = [], [0]
    compute = FrozenReference._compute_states

    def counted(*args):
        steps.append(now[-1])
        return compute(*args)

    watch_steps(monkeypatch, lambda stage: now.append(stage.trainer.global_step))
    monkeypatch.setattr(FrozenReference, "_compute_states", counted)
    return steps


def cached(folder, name, *settings):
    return f"run_dir={folder / name}", f"consistency.reference_cache={folder / 'cache'}", *settings


def losses(run_dir):
    return [line["consistency/loss"] for line in metrics(run_dir)]


def hits(run_dir):
    return [line["reference_cache/hit"] for line in metrics(run_dir)]


@pytest.mark.parametrize("trained", ["[vision,connectors,language]", "[connectors]", "[connectors,lora]"])
def test_a_run_of_two_epochs_goes_as_without_and_computes_each_sample_once(runs, tmp_path, computed, trained):
    settings = f"trainer.max_steps={STEPS}", f"model.trainable={trained}", "data.micro_batch.max_tiles=3"
    run(runs / "consistency.yaml", f"run_dir={tmp_path / 'without'}", *settings)
    assert max(computed) == STEPS - 1
    computed.clear()
    run(runs / "consistency.yaml", *cached(tmp_path, "with", *settings))
    assert set(computed) == set(range(EPOCH))
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), abs=1e-5, rel=1e-5)
    assert hits(tmp_path / "with")[0] == 0
    assert hits(tmp_path / "with")[EPOCH:] == [1] * (STEPS - EPOCH)
    assert len(list((tmp_path / "cache").glob("*/*"))) == 2


def test_a_run_that_goes_on_finds_its_cache(runs, tmp_path, monkeypatch, computed):
    settings = cached(tmp_path, "broken", f"trainer.max_steps={STEPS}")
    with monkeypatch.context() as patch:
        break_run(patch, runs / "consistency.yaml", *settings)
    computed.clear()
    run(runs / "consistency.yaml", *settings)
    assert computed == []


def test_another_run_of_the_same_reference_finds_it_and_one_of_another_does_not(runs, tmp_path, computed):
    run(runs / "consistency.yaml", *cached(tmp_path, "one"))
    computed.clear()
    run(runs / "consistency.yaml", *cached(tmp_path, "other", "seed=0", "optim.lr=1e-3"))
    assert computed == []
    policy = runs / "consistency" / "model"
    run(runs / "consistency.yaml", *cached(tmp_path, "third", f"model.reference={policy}"))
    assert computed


def test_what_the_cache_holds_may_change_in_the_middle_of_a_run(runs, tmp_path, monkeypatch):
    break_run(monkeypatch, runs / "consistency.yaml", f"run_dir={tmp_path / 'run'}")
    run(runs / "consistency.yaml", *cached(tmp_path, "run", "consistency.reference_cache_gib=1"))


def test_samples_that_are_tiled_otherwise_are_computed(runs, tmp_path, computed):
    run(runs / "consistency.yaml", *cached(tmp_path, "one"))
    computed.clear()
    run(runs / "consistency.yaml", *cached(tmp_path, "other", "data.tiling.max_tiles=1"))
    assert computed


@pytest.mark.slow
def test_ranks_that_are_killed_at_any_moment_leave_a_cache_for_those_that_go_on(runs, tmp_path):
    recipe, rng = runs / "consistency.yaml", random.Random(3)
    settings = [f"trainer.max_steps={2 * STEPS}", "trainer.checkpoint_every=2", "trainer.strategy=ddp"]
    finish(recipe, tmp_path / "without", *settings, ranks=2)
    settings.append(f"consistency.reference_cache={tmp_path / 'cache'}")
    for _ in range(4):
        kill_at_random(recipe, tmp_path / "with", *settings, rng=rng, ranks=2).wait(supervised=True)
    finish(recipe, tmp_path / "with", *settings, ranks=2)
    assert hits(tmp_path / "with")[-STEPS:] == [1] * STEPS
    # Micro-batches are the same here, and so is every state of the reference.
    assert differing(tmp_path / "with", tmp_path / "without") == set()
