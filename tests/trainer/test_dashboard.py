"""TensorBoard beyond curves: its layout, pictures of held-out tiles, answers, the figures of a report."""

import shutil

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.runs import run
from vico_pl.callbacks.dashboard import Labelled, Tile, draw_labels, draw_tiles, label, log_report
from vico_pl.config import load_config
from vico_pl.stages.labels import RouterConfig


def shown(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    return events


@pytest.fixture(params=["consistency", "router"])
def watched(request, runs, shards, tmp_path):
    sets = [{"name": "held", "path": str(shards), "max_samples": 6}]
    text = yaml.safe_dump(sets, default_flow_style=True)
    settings = (f"data.validation={text}", "trainer.validate_every=4")
    run(runs / f"{request.param}.yaml", f"run_dir={tmp_path / 'run'}", *settings)
    return tmp_path / "run"


def test_a_run_shows_its_layout_and_its_tiles(watched):
    events = shown(watched)
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert layout.index(b"Is it working?") < layout.index(b"Is it fast?")
    assert b"by source" not in layout  # there is only one
    answers = events.Tensors("val/held/answers/text_summary")
    assert len(answers) == 2  # step 4, and the last one
    is_router = load_config(watched / "config.yaml", []).stage == "router"
    pictures = (
        [f"val/held/{name}" for name in ("disagreements", "labels", "routed_tiles")] if is_router else []
    )
    assert sorted(events.Tags()["images"]) == pictures
    for tag in pictures:
        assert [image.step for image in events.Images(tag)] == [image.step for image in answers]


def test_labels_come_from_the_sets_own_percentile_and_denied_ones_have_the_largest_error():
    # The median of the finite loss ratios is 2: tiles from there on are labelled keep.
    ratios, scores = [1.0, 3.0, 2.0, 1.0, 9.0, float("nan")], [0.9, 0.95, 0.2, 0.3, 0.8, 1.0]
    tiles = [Tile(0, i, score, [ratio]) for i, (score, ratio) in enumerate(zip(scores, ratios, strict=True))]
    thresholds = RouterConfig(percentile=50.0).thresholds
    labelled, limits = label(tiles, thresholds=thresholds)
    assert limits == [2]
    assert [(one.tile.number, one.keep) for one in labelled] == list(
        enumerate([False, True, True, False, True])
    )
    assert [one.error for one in labelled] == pytest.approx([0.1, 0.95, 0.2, 0.7, 0.8])
    assert label(tiles[-1:], thresholds=thresholds) == ([], [])


def test_of_several_ratios_a_tile_is_kept_if_each_costs_too_much():
    tiles = [Tile(0, i, 0.5, ratios) for i, ratios in enumerate([[9.0, 1.0], [1.0, 9.0], [9.0, 9.0]])]
    labelled, limits = label(tiles, thresholds=lambda _: [3.0, 2.0])
    assert [one.keep for one in labelled] == [False, False, True]
    histogram, _ = draw_labels(labelled, limits).axes
    assert [line.get_xdata()[0] for line in histogram.lines] == [3.0, 2.0]


def test_the_reliability_curve_has_a_point_for_each_bin_that_has_tiles():
    # P(keep) 0.9 and 0.95 share a bin, of which one of two is labelled keep.
    said, keep = [0.1, 0.9, 0.95], [False, True, False]
    labelled = [Labelled(Tile(0, 0, 1 - p, [1.0 + k]), k) for p, k in zip(said, keep, strict=True)]
    _, axes = draw_labels(labelled, [1.5]).axes
    assert axes.lines[1].get_xydata().tolist() == [pytest.approx([0.1, 0]), pytest.approx([0.925, 0.5])]


def test_a_sample_begins_a_row_and_a_long_one_takes_two():
    cells = [(torch.zeros(3, 4, 4, dtype=torch.uint8), str(i), True) for i in range(11)]
    starts = [i in (0, 2) for i in range(11)]
    figure = draw_tiles(cells, starts, title="")
    drawn = [bool(axes.images) for axes in figure.axes]
    assert drawn == [True] * 2 + [False] * 6 + [True] * 8 + [True] + [False] * 7


def test_the_figures_of_a_report_stand_next_to_the_settings_of_its_run(runs, tmp_path):
    arm = {"token_fraction": 0.5, "retention": {"mean": 0.9}, "accuracy": {"mean": 0.6}}
    nothing_kept = {**arm, "retention": {"mean": None}}
    report = {"arms": {"router": arm, "random": nothing_kept}}
    log_report(tmp_path, report)
    assert list(tmp_path.iterdir()) == []  # no run
    shutil.copy(runs / "router.yaml", tmp_path / "config.yaml")
    (tmp_path / "tensorboard").mkdir()
    log_report(tmp_path, report)
    events = shown(tmp_path)
    names = [name for name in events.Tags()["scalars"] if name.startswith("report/")]
    assert sorted(names) == [
        "report/random/accuracy",
        "report/random/token_fraction",
        "report/router/accuracy",
        "report/router/retention",
        "report/router/token_fraction",
    ]
    assert [event.value for event in events.Scalars("report/router/retention")] == [pytest.approx(0.9)]
