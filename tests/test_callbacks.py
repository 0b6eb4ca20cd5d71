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
    return mock.Mock(spec=L.Trainer, global_step=step, global_rank=rank)


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
    bad = [BadRecord(id=f"a.tar/{i}", reason=f"reason {i}") for i in range(3)]
    for step, items in enumerate([[good, *bad[:2]], [good], [bad[2], good]]):
        log.on_train_batch_end(trainer_at(step), module, None, collate(items), step)
    assert lines(tmp_path / "bad.jsonl") == [
        {"step": 0, "id": "a.tar/0", "reason": "reason 0"},
        {"step": 0, "id": "a.tar/1", "reason": "reason 1"},
        {"step": 2, "id": "a.tar/2", "reason": "reason 2"},
    ]
    assert [call.args for call in module.log.call_args_list] == [
        ("data/bad_records", 2.0),
        ("data/bad_records", 3.0),
    ]


def test_no_file_appears_without_bad_records(tmp_path):
    module, batch = mock.Mock(spec=L.LightningModule), collate([encoded_sample(1)])
    BadRecordLog(tmp_path / "bad.jsonl").on_train_batch_end(trainer_at(0), module, None, batch, 0)
    assert not (tmp_path / "bad.jsonl").exists()


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
