import json
import sys

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from tests.callbacks.steps import StageLog, TrainerAt, rank_batch
from vico_pl.callbacks import records
from vico_pl.callbacks.loggers import JsonlLogger
from vico_pl.callbacks.records import BadRecordLog, StepProgressBar
from vico_pl.types import BadRecord


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_appended_as_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonlLogger(path).log_metrics({"consistency/loss": 0.5}, step=10)
    JsonlLogger(path).log_metrics({"consistency/loss": 0.25, "optim/lr": 1e-3}, step=20)
    assert lines(path) == [
        {"step": 10, "consistency/loss": 0.5},
        {"step": 20, "consistency/loss": 0.25, "optim/lr": 0.001},
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_a_few_lines_in_a_log(monkeypatch, capsys, is_terminal):
    written: list[str] = []
    monkeypatch.setattr(records, "rank_zero_info", written.append)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    settings = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    bar = StepProgressBar("demo")
    L.Trainer(max_steps=9, accelerator="cpu", devices=1, callbacks=[bar], **settings).fit(BoringModel())
    assert ("demo: " in capsys.readouterr().out) == is_terminal
    assert written == ([] if is_terminal else ["demo: step 1 of 9", "demo: step 9 of 9"])


def feed(log, *, num_bad, num_good, everywhere=None, step=0):
    """Give the log a step; `everywhere` is (bad, samples) of all ranks, if there are several."""
    bad = [BadRecord(id=f"a-1.tar/{i}", reason="JSON: broken", kind="json") for i in range(num_bad)]
    return give(log, bad, everywhere or (num_bad, num_bad + num_good), step=step)


def give(log, bad, everywhere, *, step=0):
    stage, outputs = StageLog(), dict(zip(("num_bad", "num_samples"), everywhere, strict=True))
    log.on_train_batch_end(TrainerAt(step), stage, outputs, rank_batch(bad=bad), step)
    return stage.logged


def test_bad_records_are_written_and_counted_by_source_and_kind(tmp_path):
    path = tmp_path / "bad.jsonl"
    log = BadRecordLog(path)
    feed(log, num_bad=0, num_good=1)
    assert not path.exists()
    bad = [
        BadRecord(id=f"a-07.tar/{i}", reason=f"reason {i}", kind=kind, source="s")
        for i, kind in enumerate(["json", "image", "json"])
    ]
    steps = [bad[:2], [], bad[2:]]
    logged = [give(log, records, (len(records), 8), step=step) for step, records in enumerate(steps)]
    assert lines(path) == [
        {"step": 0, "source": "s", "kind": "json", "id": "a-07.tar/0", "reason": "reason 0"},
        {"step": 0, "source": "s", "kind": "image", "id": "a-07.tar/1", "reason": "reason 1"},
        {"step": 2, "source": "s", "kind": "json", "id": "a-07.tar/2", "reason": "reason 2"},
    ]
    names = ("data/bad_records", "data/bad_records/s/json", "data/bad_records/s/image")
    assert logged == [list(zip(names, counts, strict=True)) for counts in ((2, 1, 1), (2, 1, 1), (3, 2, 1))]


def test_a_run_stops_when_more_than_the_allowed_fraction_of_a_window_is_bad(tmp_path):
    log = BadRecordLog(tmp_path / "bad.jsonl", max_bad_fraction=0.25, window=20)
    feed(log, num_bad=4, num_good=1)  # the start may be bad: five of twenty are allowed
    feed(log, num_bad=1, num_good=4)
    expected = (
        r"6 of the last 15 samples are bad; data\.max_bad_fraction 0\.25 allows 5 of 20; "
        r"most frequent: json \(6, such as 'a-1\.tar/0': JSON: broken\); all are in .*/bad\.jsonl"
    )
    with pytest.raises(ValueError, match=expected):
        feed(log, num_bad=1, num_good=4)


def test_bad_records_are_forgotten_when_the_window_has_passed_them(tmp_path):
    log = BadRecordLog(tmp_path / "bad.jsonl", max_bad_fraction=0.25, window=20)
    for _ in range(20):
        feed(log, num_bad=5, num_good=5)
        feed(log, num_bad=0, num_good=20)


def test_no_bad_record_at_all_may_be_allowed_or_every_one(tmp_path):
    none = BadRecordLog(tmp_path / "a.jsonl", max_bad_fraction=0.0)
    feed(none, num_bad=0, num_good=3)
    with pytest.raises(ValueError, match="1 of the last 5 samples are bad"):
        feed(none, num_bad=1, num_good=1)
    anything = BadRecordLog(tmp_path / "a.jsonl", max_bad_fraction=1.0, window=20)
    for _ in range(10):
        feed(anything, num_bad=9, num_good=1)


def test_all_ranks_stop_together_for_what_one_of_them_saw(tmp_path):
    log = BadRecordLog(tmp_path / "bad.jsonl", max_bad_fraction=0.1, window=10)
    with pytest.raises(ValueError, match="2 of the last 8 samples are bad"):
        feed(log, num_bad=0, num_good=4, everywhere=(2, 8))


def test_bad_records_are_reported_once_a_minute(tmp_path, monkeypatch):
    message, now = [], iter([0, 0, 30, 61, 61])
    monkeypatch.setattr("vico_pl.callbacks.records.rank_zero_info", message.append)
    monkeypatch.setattr("vico_pl.callbacks.records.time.monotonic", lambda: next(now))
    log = BadRecordLog(tmp_path / "bad.jsonl")
    for _ in range(3):
        feed(log, num_bad=2, num_good=1)
    assert [line.partition(",")[0] for line in message] == ["2 bad records so far", "6 bad records so far"]
