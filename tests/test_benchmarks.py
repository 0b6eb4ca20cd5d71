"""The benchmarks run and write what their page promises; nothing here depends on how fast they are."""

import json
import re
import shutil
import sys
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")


def load():
    spec = util.spec_from_file_location("benchmarks_kl", ROOT / "benchmarks" / "kl.py")
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


kl = load()
TINY = {"tokens": 7, "vocab": 512, "width": 32, "chunk": 3}


def check_summary(summary):
    assert set(summary) == {"machine", "date", "command", "versions", "figures"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", summary["date"])
    assert {"python", "torch", "vico-pl"} <= set(summary["versions"])
    expected = {"kl_time_over_floor", "kl_memory_over_naive", "kl_memory_over_bound", "kl_error_bf16"}
    assert expected <= set(summary["figures"]) <= set(kl.GOALS)
    for name, figure in summary["figures"].items():
        assert set(figure) == {"measured", "goal"}
        assert figure["measured"] >= 0
        assert figure["goal"] == kl.GOALS[name]


def test_a_tiny_run_writes_figures_measurements_and_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(kl, "available", lambda: ["floor", "ours", "naive"])
    page = tmp_path / "README.md"
    shutil.copy(ROOT / "benchmarks" / "README.md", page)
    settings = [f"--{key}={value}" for key, value in TINY.items()]
    kl.main([*settings, "--rounds=1", f"--output={tmp_path / 'results'}", f"--page={page}"])
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    check_summary(summary)
    assert all(f"--{key}={value}" in summary["command"] for key, value in TINY.items())
    details = json.loads((tmp_path / "results" / "kl.json").read_text())
    assert details["shape"] == TINY
    assert [set(round_) for round_ in details["rounds"]] == [{"floor", "ours", "naive"}]
    assert details["errors"]["ours_value"] < 0.01
    assert kl.tables(details) in page.read_text()
    assert page.read_text().startswith("# Benchmarks"), "what stands around the tables stays"


@pytest.mark.parametrize(
    "name", ["floor", "ours", "ours_frozen_head", "ours_no_gradient", "naive", "naive_freed"]
)
def test_every_implementation_runs(name):
    shape = kl.Shape(**TINY)
    kl.RUNS[name](kl.draw_inputs(shape), shape)


def test_a_measurement_that_fails_says_which_and_why(monkeypatch):
    monkeypatch.setattr(kl, "__file__", "/nowhere/kl.py")
    with pytest.raises(RuntimeError, match=r"measuring ours failed:\n.*nowhere"):
        kl.measure_apart("ours", kl.Shape(**TINY))


def test_the_page_shows_the_recorded_figures():
    check_summary(json.loads((RESULTS / "summary.json").read_text()))
    details = json.loads((RESULTS / "kl.json").read_text())
    assert kl.tables(details) in (ROOT / "benchmarks" / "README.md").read_text()


def test_recorded_figures_follow_from_the_recorded_measurements():
    details = json.loads((RESULTS / "kl.json").read_text())
    shape = kl.Shape(**details["shape"])
    assert shape == kl.Shape(), "recorded at the full shape"
    assert kl.figures(details["rounds"], details["errors"], shape) == details["figures"]
    assert json.loads((RESULTS / "summary.json").read_text())["figures"] == details["figures"]
