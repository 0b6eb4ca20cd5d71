"""All sides of the benchmark train on the same samples, and its figures compare their times."""

import sys

import pytest

from tests.scripts import load_benchmark

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")

scaling = load_benchmark("scaling")


@pytest.mark.parametrize("ranks", [1, 2])
def test_any_number_of_ranks_takes_the_same_samples(tmp_path, ranks):
    given = dict(
        part.split("=") for part in scaling.command(tmp_path, tmp_path / "run", ranks) if "=" in part
    )
    samples = int(given["data.batch_size"]) * int(given["trainer.max_steps"])
    assert samples == 2 * scaling.SAMPLES * (scaling.WARM_UP + scaling.TIMED)
    assert int(given["trainer.devices"]) == ranks


def test_figures_compare_the_times_of_the_same_samples():
    # The machine itself slows two runs side by side down by 1.2, and two ranks by no more.
    rounds = [{"one rank": 10.0, "two ranks": 6.0, "two runs": 12.0}]
    found = {name: figure["measured"] for name, figure in scaling.figures(rounds).items()}
    assert found["weak_scaling_2_ranks"] == pytest.approx(10 / 6, abs=1e-4)
    assert scaling.over_ceiling(rounds) == pytest.approx(1.0)


def test_a_run_that_failed_is_told_with_what_it_said():
    failing = [sys.executable, "-c", "print('no such recipe'); raise SystemExit(2)"]
    with pytest.raises(RuntimeError, match=r"failed:\nno such recipe"):
        scaling.finish([[sys.executable, "-c", ""], failing])
