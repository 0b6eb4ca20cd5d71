"""Speed and memory of a real run; the arithmetic is in the doctest of `speed`."""

import pytest

from tests.support.runs import metrics, run
from tests.support.tiny import tiny_model


@pytest.mark.parametrize("stage", ["pretrain", "router"])
def test_a_run_logs_its_speed_and_memory(runs, shards, tmp_path, stage):
    run(runs / f"{stage}.yaml", f"run_dir={tmp_path / 'run'}", "data.num_workers=0")
    per_tile = tiny_model().tokens_per_full_tile  # neither stage draws other ratios
    points = metrics(tmp_path / "run", timed=True)
    for point in points:
        assert point["speed/samples_per_s"] == pytest.approx(4 / point["speed/step_s"])  # batches of four
        assert point["speed/vision_tokens_per_s"] == pytest.approx(per_tile * point["speed/tiles_per_s"])
        assert 0 <= point["speed/data_wait_fraction"] < 1
        assert 0.05 < point["memory/host_gib"] < 20
        assert "speed/mfu" not in point  # the peak of a CPU is unknown
    assert points[-1]["speed/eta_h"] == 0 < points[0]["speed/eta_h"]
