import json
from unittest import mock

import lightning as L
import pytest
import torch

from tests.helpers import encoded_sample
from vico_pl.callbacks import AtomicCheckpointIO, BadRecordLog, JsonlLogger, StepSeed
from vico_pl.data.collate import collate
from vico_pl.types import BadRecord


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def trainer_at(step, *, rank=0):
    return mock.Mock(spec=L.Trainer, global_step=step, global_rank=rank, world_size=1)


def test_metrics_are_appended_as_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonlLogger(path).log_metrics({"consistency/loss": 0.5}, step=10)
    JsonlLogger(path).log_metrics({"consistency/loss": 0.25, "optim/lr": 1e-3}, step=20)
    assert lines(path) == [
        {"step": 10, "consistency/loss": 0.5},
        {"step": 20, "consistency/loss": 0.25, "optim/lr": 0.001},
    ]


def test_bad_records_are_written_and_counted(tmp_path):
    log, module = BadRecordLog(tmp_path / "bad.jsonl"), mock.Mock(spec=L.LightningModule)
    good = encoded_sample(1)
    kinds = ["json", "image", "json"]
    bad = [BadRecord(id=f"a-07.tar/{i}", reason=f"reason {i}", kind=kind) for i, kind in enumerate(kinds)]
    for step, items in enumerate([[good, *bad[:2]], [good], [bad[2], good]]):
        log.on_train_batch_end(trainer_at(step), module, None, collate(items), step)
    assert lines(tmp_path / "bad.jsonl") == [
        {"step": 0, "kind": "json", "id": "a-07.tar/0", "reason": "reason 0"},
        {"step": 0, "kind": "image", "id": "a-07.tar/1", "reason": "reason 1"},
        {"step": 2, "kind": "json", "id": "a-07.tar/2", "reason": "reason 2"},
    ]
    assert [call.args for call in module.log.call_args_list] == [
        ("data/bad_records", 2.0),
        ("data/bad_records/a/json", 1.0),
        ("data/bad_records/a/image", 1.0),
        ("data/bad_records", 3.0),
        ("data/bad_records/a/json", 2.0),
    ]


def test_no_file_appears_without_bad_records(tmp_path):
    module, batch = mock.Mock(spec=L.LightningModule), collate([encoded_sample(1)])
    BadRecordLog(tmp_path / "bad.jsonl").on_train_batch_end(trainer_at(0), module, None, batch, 0)
    assert not (tmp_path / "bad.jsonl").exists()


def feed(log, *, num_bad, num_good, rank_sum=None):
    """Give the log a batch; `rank_sum` is what all ranks together have, if there are several."""
    trainer = trainer_at(0)
    if rank_sum:
        trainer.world_size = 2
        trainer.strategy = mock.Mock(reduce=lambda tensor, reduce_op: torch.tensor(rank_sum))
    bad = [BadRecord(id=f"a-1.tar/{i}", reason="JSON: broken", kind="json") for i in range(num_bad)]
    batch = collate([*bad, *map(encoded_sample, range(num_good))])
    module = mock.Mock(spec=L.LightningModule, device=torch.device("cpu"))
    log.on_train_batch_end(trainer, module, None, batch, 0)


def test_a_run_stops_when_more_than_the_allowed_share_of_a_window_is_bad(tmp_path):
    log = BadRecordLog(tmp_path / "bad.jsonl", max_bad_fraction=0.25, window=20)
    feed(log, num_bad=4, num_good=1)  # the start may be bad: five of twenty are allowed
    feed(log, num_bad=1, num_good=4)
    expected = (
        r"6 of the last 15 samples are bad, and data\.max_bad_fraction 0\.25 lets 5 of 20 be so; "
        r"most often json \(6, such as 'a-1\.tar/0': JSON: broken\); all are in .*/bad\.jsonl"
    )
    with pytest.raises(ValueError, match=expected):
        feed(log, num_bad=1, num_good=4)


def test_bad_records_are_forgotten_when_the_window_has_passed_them(tmp_path):
    log = BadRecordLog(tmp_path / "bad.jsonl", max_bad_fraction=0.25, window=20)
    for _ in range(20):
        feed(log, num_bad=5, num_good=5)
        feed(log, num_bad=0, num_good=20)


def test_no_bad_record_at_all_may_be_allowed_or_every_one(tmp_path):
    feed(BadRecordLog(tmp_path / "a.jsonl", max_bad_fraction=0.0), num_bad=0, num_good=3)
    with pytest.raises(ValueError, match="1 of the last 2 samples are bad"):
        feed(BadRecordLog(tmp_path / "a.jsonl", max_bad_fraction=0.0), num_bad=1, num_good=1)
    anything = BadRecordLog(tmp_path / "a.jsonl", max_bad_fraction=1.0, window=20)
    for _ in range(10):
        feed(anything, num_bad=9, num_good=1)


def test_all_ranks_stop_together_for_what_one_of_them_saw(tmp_path):
    log = BadRecordLog(tmp_path / "bad.jsonl", max_bad_fraction=0.1, window=10)
    with pytest.raises(ValueError, match="2 of the last 8 samples are bad"):
        feed(log, num_bad=0, num_good=4, rank_sum=[2, 6])


def test_bad_records_are_told_once_a_minute(tmp_path, monkeypatch):
    told, now = [], iter([0, 0, 30, 61, 61])
    monkeypatch.setattr("vico_pl.callbacks.rank_zero_info", told.append)
    monkeypatch.setattr("vico_pl.callbacks.time.monotonic", lambda: next(now))
    log = BadRecordLog(tmp_path / "bad.jsonl")
    for _ in range(3):
        feed(log, num_bad=2, num_good=1)
    assert [line.partition(",")[0] for line in told] == ["2 bad records so far", "6 bad records so far"]


def drawn(*, seed=1, step=2, rank=0):
    StepSeed(seed).on_train_batch_start(
        trainer_at(step, rank=rank), mock.Mock(spec=L.LightningModule), None, 0
    )
    return torch.rand(4).tolist()


def test_random_numbers_of_a_step_depend_on_seed_step_and_rank_alone():
    first = drawn()
    torch.rand(100)
    assert drawn() == first
    assert len({tuple(x) for x in (first, drawn(seed=2), drawn(step=3), drawn(rank=1))}) == 4


def test_a_checkpoint_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    path, io = tmp_path / "step.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)
    assert io.load_checkpoint(path, weights_only=True) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["step.ckpt"]

    def full_disk(_, target, *__):
        with open(target, "wb") as file:
            file.write(b"half a checkpoint")
        raise OSError("No space left on device")

    monkeypatch.setattr(
        "vico_pl.callbacks.TorchCheckpointIO.save_checkpoint", lambda _, c, t, __: full_disk(c, t)
    )
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"step": 2}, path)
    assert io.load_checkpoint(path, weights_only=True) == {"step": 1}
