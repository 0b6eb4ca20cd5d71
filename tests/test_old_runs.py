"""A run folder that version 0.1 wrote in November 2026, interrupted and resumed once, is still understood."""

import shutil
from pathlib import Path

import pytest

from vico_pl.audit import audit_run, format_verdict
from vico_pl.config import load_config
from vico_pl.prepare import prepare_run

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Copies of the run folder and of its shards, where its settings name them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / "shards-2026-11", Path("tests/fixtures/shards-2026-11"))
    return shutil.copytree(FIXTURES / "run-2026-11", Path("run-2026-11"))


def audit(folder):
    config = load_config(folder / "config.yaml", [])
    return audit_run(folder, config.data, seed=config.seed, completed_steps=config.trainer.max_steps)


def test_its_settings_are_read(folder):
    config = load_config(folder / "config.yaml", [])
    assert (config.stage, config.run_dir, config.model.ratios) == ("pretrain", "run-2026-11", [4])
    assert (config.data.batch_size, config.data.tiling.max_tiles, config.optim.lr) == (2, 2, 0.003)
    assert (config.trainer.max_steps, config.trainer.checkpoint_every) == (6, 2)


def test_the_same_settings_may_resume_it_and_others_may_not(folder):
    before = load_config(folder / "config.yaml", [])
    assert prepare_run(folder / "config.yaml", []) == before
    assert load_config(folder / "config.yaml", []) == before
    with pytest.raises(ValueError, match="other settings"):
        prepare_run(folder / "config.yaml", ["seed=1"])


def test_its_sample_logs_agree_with_the_data_order(folder):
    found = audit(folder)
    assert found.faults == []
    assert format_verdict(found).startswith("6 steps in 2 attempts: every sample")


def test_a_changed_sample_log_does_not(folder):
    log = folder / "samples-rank-0.jsonl"
    log.write_text(log.read_text().replace("00000002", "00000001", 1))
    assert len(audit(folder).faults) > 0
