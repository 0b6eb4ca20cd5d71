import json
import sys

import pytest
import torch

import vico_pl.cli
from tests.support.runs import run, weights
from tests.support.tiny import record
from vico_pl.callbacks.checkpoints import newest_checkpoint
from vico_pl.callbacks.records import checksum
from vico_pl.data.shards.reader import write_index, write_shard


def faulty_set(folder, *, num_good, num_bad):
    good = [(f"good-{i}", record(text=f"<image>\n{i}?").files) for i in range(num_good)]
    write_shard(folder / "a-0.tar", [*good, *((f"bad-{i}", {"json": b"{"}) for i in range(num_bad))])
    write_index(folder)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("stage", ["pretrain", "consistency", "router"])
def test_batches_of_bad_records_alone_do_not_end_a_run(runs, tmp_path, stage):
    shards, run_dir = faulty_set(tmp_path / "shards", num_good=1, num_bad=7), tmp_path / "run"
    changes = [f"run_dir={run_dir}", f"data.sources=[{{path: {shards}}}]", "data.batch_size=2"]
    run(runs / f"{stage}.yaml", *changes, "data.max_bad_fraction=1.0", "router.min_history=1")
    found = lines(run_dir / "bad_records.jsonl")
    assert {(line["kind"], line["id"].partition("-")[0]) for line in found} == {("json", "a")}
    assert all(line["reason"].startswith("JSON: ") for line in found)
    by_step = [line["step"] for line in found]
    assert any(by_step.count(step) == 2 for step in by_step)  # a batch of nothing else
    assert all(torch.isfinite(tensor).all() for tensor in weights(run_dir).values())
    logged = lines(run_dir / "metrics.jsonl")
    assert max(line.get(f"data/bad_records/{shards}/json", 0) for line in logged) == len(found)
    sums = {line.get("crc32") for line in lines(run_dir / "samples-rank-0.jsonl")}
    assert sums == {None, checksum([]), checksum(["a-0.tar/good-0"])}  # dummies are not in there


def test_too_many_bad_records_stop_a_run_in_a_sentence_with_the_last_checkpoint_intact(
    runs, shards, tmp_path, monkeypatch, capsys
):
    faulty, run_dir = faulty_set(tmp_path / "shards", num_good=0, num_bad=4), tmp_path / "run"
    sources = f"data.sources=[{{path: {shards}, steps: 3}}, {{path: {faulty}}}]"
    command = ["vico", "train", str(runs / "pretrain.yaml"), f"run_dir={run_dir}", sources]
    monkeypatch.setattr(sys, "argv", [*command, "data.max_bad_fraction=0.001"])
    with pytest.raises(SystemExit) as stop:
        vico_pl.cli.main()
    assert stop.value.code == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vico:")]
    assert "4 of the last 16 samples are bad; data.max_bad_fraction 0.001 allows 2 of 2000" in said
    assert "most frequent: json (4, such as 'a-0.tar/bad-" in said
    assert said.endswith(f"all are in {run_dir}/bad_records.jsonl")
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint.name == "step-00000002.ckpt"
    assert torch.load(checkpoint, weights_only=False)["global_step"] == 2


def test_a_run_of_bad_records_alone_writes_no_model_however_often_it_is_started(runs, tmp_path):
    shards, run_dir = faulty_set(tmp_path / "shards", num_good=0, num_bad=4), tmp_path / "run"
    changes = [f"run_dir={run_dir}", f"data.sources=[{{path: {shards}}}]", "trainer.max_steps=2"]
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"none of the 2 steps had anything to train on.*set another run_dir"
        ):
            run(runs / "consistency.yaml", *changes)
    assert not (run_dir / "model").exists()
