"""The benchmarks run and write what their page promises; nothing here depends on how fast they are."""

import json
import re
import shutil
import sys

import pytest

from tests.scripts import BENCHMARKS, load_benchmark

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")

harness, kl = load_benchmark("harness"), load_benchmark("kl")
RESULTS, PAGE = BENCHMARKS / "results", BENCHMARKS / "README.md"
RECORDED = sorted(path.stem for path in RESULTS.glob("*.json") if path.name != harness.SUMMARY)
TINY = {"tokens": 7, "vocab": 512, "width": 32, "chunk": 3}


def results_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def write_one(folder, name, **figures):
    """Write figures as a benchmark of that name would, onto a page with its marks."""
    page = folder / "README.md"
    if not page.exists():
        page.write_text("# Benchmarks\n")
    if f"{name}: begin" not in page.read_text():
        page.write_text(
            f"{page.read_text()}<!-- {name}: begin -->\nold\n<!-- {name}: end -->\nafter {name}\n"
        )
    goals = {key: harness.Goal(1.0, at_least=True) for key in figures}
    return harness.write(
        name,
        figures=harness.figures_of(figures, goals),
        details={"runs": [1, 2]},
        tables=lambda content: "\n".join(harness.figure_table(content["figures"], goals)),
        output=folder / "results",
        page=page,
    )


def test_benchmarks_share_a_summary_and_a_page(tmp_path):
    write_one(tmp_path, "one", speed=2.0, old=1.0)
    write_one(tmp_path, "two", size=0.5)
    write_one(tmp_path, "one", speed=3.0)  # measured anew; a figure that it no longer has goes
    summary = results_of(tmp_path / "results", "summary")
    assert summary["figures"] == {
        "speed": {"measured": 3.0, "goal": 1.0},
        "size": {"measured": 0.5, "goal": 1.0},
    }
    assert results_of(tmp_path / "results", "one")["runs"] == [1, 2]
    page = (tmp_path / "README.md").read_text()
    assert "| `speed` | 3.0 | >= 1.0 |" in page
    assert "| `size` | 0.5 | >= 1.0 |" in page
    assert "old" not in page
    assert page.startswith("# Benchmarks\n")
    assert page.endswith("<!-- two: end -->\nafter two\n")


def test_a_page_without_marks_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# Benchmarks\n")
    with pytest.raises(ValueError, match=r"no lines '<!-- kl: begin -->' and '<!-- kl: end -->'"):
        harness.write_table(tmp_path / "README.md", "kl", "table")


def test_a_measurement_that_fails_says_which_and_why():
    with pytest.raises(RuntimeError, match=r"measuring ours failed:\n.*nowhere"):
        harness.measure_apart("/nowhere/kl.py", "ours")


def test_two_functions_take_turns():
    calls = []
    times = harness.paired(lambda: calls.append("ours"), lambda: calls.append("other"), rounds=2)
    assert calls == ["ours", "other", "ours", "other", "other", "ours"]
    assert len(times) == 2
    assert harness.median_ratio([(1.0, 2.0), (3.0, 2.0), (1.0, 1.0)]) == 1.0


def test_memory_is_that_above_what_was_held_before():
    held = bytearray(64 * 2**20)
    measured = harness.measure(lambda: bytearray(b"x") * (128 * 2**20))
    assert len(held) == 64 * 2**20
    assert 120 < measured["peak_mib"] < 160


def test_the_summary_holds_the_recorded_figures():
    summary = results_of(RESULTS, "summary")
    assert set(summary) == {"machine", "date", "command", "versions", "figures"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", summary["date"])
    assert {"python", "torch", "vico-pl"} <= set(summary["versions"])
    assert summary == harness.summarise(RESULTS)


@pytest.mark.parametrize("name", RECORDED)
def test_the_page_shows_recorded_figures_beside_their_goals(name):
    benchmark, details = load_benchmark(name), results_of(RESULTS, name)
    assert benchmark.tables(details) in PAGE.read_text()
    assert set(details["figures"]) <= set(benchmark.GOALS)
    for figure, values in details["figures"].items():
        assert set(values) == {"measured", "goal"}
        assert values["goal"] == benchmark.GOALS[figure].value


def test_a_tiny_run_of_the_loss_writes_figures_measurements_and_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(kl, "available", lambda: ["floor", "ours", "naive"])
    page = tmp_path / "README.md"
    shutil.copy(PAGE, page)
    settings = [f"--{key}={value}" for key, value in TINY.items()]
    kl.main([*settings, "--rounds=1", f"--output={tmp_path / 'results'}", f"--page={page}"])
    summary, details = (results_of(tmp_path / "results", name) for name in ("summary", "kl"))
    expected = {"kl_time_over_floor", "kl_memory_over_naive", "kl_memory_over_bound", "kl_error_bf16"}
    assert set(summary["figures"]) == expected
    assert all(f"--{key}={value}" in summary["command"] for key, value in TINY.items())
    assert details["shape"] == TINY
    assert [set(round_) for round_ in details["rounds"]] == [{"floor", "ours", "naive"}]
    assert details["errors"]["ours_value"] < 0.01
    assert kl.tables(details) in page.read_text()
    assert page.read_text().startswith("# Benchmarks"), "what stands around the tables stays"


@pytest.mark.parametrize(
    "name", ["floor", "ours", "ours_frozen_head", "ours_no_gradient", "naive", "naive_freed"]
)
def test_every_implementation_of_the_loss_runs(name):
    shape = kl.Shape(**TINY)
    kl.RUNS[name](kl.draw_inputs(shape), shape)


def test_recorded_figures_of_the_loss_follow_from_the_recorded_measurements():
    details = results_of(RESULTS, "kl")
    shape = kl.Shape(**details["shape"])
    assert shape == kl.Shape(), "recorded at the full shape"
    assert kl.figures(details["rounds"], details["errors"], shape) == details["figures"]
