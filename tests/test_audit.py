"""Sample logs as the callback writes them, whole and tampered with, held against the order."""

import json
from dataclasses import replace
from unittest import mock

import lightning as L
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import batch_of, mixed_samples, record
from vico_pl.audit import SampleNames, audit_run, format_table, format_verdict
from vico_pl.callbacks.records import SampleLog
from vico_pl.data.module import DataConfig, SourceConfig, build_order, open_sources
from vico_pl.data.shards.reader import RecordReader, read_index, write_index, write_shard
from vico_pl.types import BadRecord, RankBatch

BATCH, SEED = 4, 5
MODULE = mock.Mock(spec=L.LightningModule)
ANY_BATCH = batch_of(*mixed_samples())


def config_of(*sources):
    return DataConfig(sources=list(sources), batch_size=BATCH)


@pytest.fixture(scope="module")
def config(shards):
    """One source of 18 samples."""
    return config_of(SourceConfig(path=str(shards)))


@pytest.fixture(scope="module")
def mixture(shards, tmp_path_factory):
    """Two sources of 18 and 5 samples, whose first ones have the same names."""
    folder = tmp_path_factory.mktemp("other")
    names = [RecordReader(read_index(shards))(sample).key for sample in range(5)]
    write_shard(folder / "train-000000.tar", [(name, record(text=f"{name}?").files) for name in names])
    write_index(folder)
    return config_of(SourceConfig(path=str(shards), weight=3.0), SourceConfig(path=str(folder), weight=1.0))


def expected_ids(config):
    """Name what stands at a position, read as training reads it."""
    indexes = [read_index(source.path) for source in config.sources]
    order = build_order(config, indexes, seed=SEED)
    readers = [RecordReader(index) for index in indexes]

    def name(position):
        place = order(position)
        return readers[place.source](place.sample).id

    return name


def train(run_dir, config, *, steps, world=1, bad=()):
    """Leave the logs of an attempt that took these steps; records named in `bad` are unusable."""
    name, share = expected_ids(config), BATCH // world
    number = SampleLog(run_dir)._num_attempts()
    for rank in range(world):
        trainer = mock.Mock(spec=L.Trainer, global_step=steps.start, global_rank=rank, world_size=world)
        trainer.strategy.broadcast = lambda _: number
        log = SampleLog(run_dir)
        log.on_train_start(trainer, MODULE)
        for step in steps:
            start = step * BATCH + rank * share
            names = [name(position) for position in range(start, start + share)]
            bad_records = [BadRecord(id=each, reason="JSON") for each in names if each in bad]
            batch = replace(ANY_BATCH, ids=[*(each for each in names if each not in bad), ""])  # and a dummy
            taken = RankBatch(micro_batches=[batch], bad_records=bad_records, dummy=ANY_BATCH)
            log.on_train_batch_end(trainer, MODULE, None, taken, step)
        log.on_save_checkpoint(trainer, MODULE, {})


def audit(run_dir, config, *, completed_steps=0):
    return audit_run(run_dir, config, seed=SEED, completed_steps=completed_steps)


def totals(found):
    return {key: sum(count[key] for count in found.counts.values()) for key in ("used", "missing", "twice")}


def log_of(run_dir, rank=0):
    return run_dir / f"samples-rank-{rank}.jsonl"


def edit(run_dir, change, *, rank=0):
    """Change a log, given as a list of lines."""
    path = log_of(run_dir, rank)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_clean_run_has_no_faults_and_a_row_per_epoch(config, tmp_path):
    train(tmp_path, config, steps=range(10))
    found = audit(tmp_path, config, completed_steps=10)
    assert found.faults == []
    rows = [line.split()[1:] for line in format_table(found).splitlines()]
    assert rows == [
        ["epoch", "samples", "used", "bad", "missing", "twice"],
        ["0-1", "18", "18", "0", "0", "0"],
        ["2", "18", "4", "0", "0", "0"],
    ]
    sentence = "10 steps in 1 attempt: every sample of each source and epoch was used once, as the order says"
    assert format_verdict(found) == sentence


def test_a_line_is_what_the_documentation_shows(config, tmp_path):
    train(tmp_path, config, steps=range(2), bad=[expected_ids(config)(5)])
    lines = [json.loads(line) for line in log_of(tmp_path).read_text().splitlines()]
    ids = [expected_ids(config)(position) for position in range(8)]
    assert lines == [
        {"attempt": 0, "from_step": 0, "world": 1},
        {"step": 0, "ids": ids[:4]},
        {"step": 1, "ids": [ids[4], *ids[6:]], "bad": [ids[5]]},
    ]


def test_steps_of_a_killed_attempt_are_superseded_by_those_of_the_next(config, tmp_path):
    train(tmp_path, config, steps=range(6))
    edit(tmp_path, lambda lines: lines[-1].update(ids=["of a step that was taken again"]))
    train(tmp_path, config, steps=range(4, 4))
    train(tmp_path, config, steps=range(4, 9))
    found = audit(tmp_path, config, completed_steps=9)
    assert (found.faults, found.num_steps, found.num_attempts) == ([], 9, 3)
    assert totals(found) == {"used": 36, "missing": 0, "twice": 0}


@settings(max_examples=40)
@given(
    attempts=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 4), st.sampled_from([1, 2, 4])), min_size=1, max_size=4
    )
)
def test_restarts_and_changes_of_world_size_leave_nothing_to_find(tmp_path_factory, config, attempts):
    run_dir, reached = tmp_path_factory.mktemp("run"), 0
    for lost, taken, world in attempts:
        first = max(reached - lost, 0)
        reached = first + taken
        train(run_dir, config, steps=range(first, reached), world=world)
    found = audit(run_dir, config, completed_steps=reached)
    assert (found.faults, found.num_steps) == ([], reached)
    assert totals(found) == {"used": BATCH * reached, "missing": 0, "twice": 0}


def test_a_mixture_tells_sources_of_the_same_names_apart(mixture, tmp_path):
    train(tmp_path, mixture, steps=range(8), world=2)
    found = audit(tmp_path, mixture, completed_steps=8)
    assert found.faults == []
    used = {source: sum(c["used"] for (s, _), c in found.counts.items() if s == source) for source in (0, 1)}
    place = build_order(mixture, open_sources(mixture), seed=SEED)
    assert used == {source: sum(place(p).source == source for p in range(32)) for source in (0, 1)}
    assert all(count["used"] <= (18, 5)[source] for (source, _), count in found.counts.items())


def test_a_curriculum_is_followed_from_source_to_source(shards, tmp_path):
    config = config_of(SourceConfig(path=str(shards), steps=3), SourceConfig(path=str(shards)))
    train(tmp_path, config, steps=range(8))
    found = audit(tmp_path, config, completed_steps=8)
    assert found.faults == []
    assert {place: count["used"] for place, count in found.counts.items()} == {
        (0, 0): 12,
        (1, 0): 18,
        (1, 1): 2,
    }


def test_the_filler_of_a_batch_of_bad_records_alone_is_no_sample(config, tmp_path):
    train(tmp_path, config, steps=range(2), bad=[expected_ids(config)(position) for position in range(4)])
    found = audit(tmp_path, config)
    assert (found.faults, found.counts[0, 0]) == ([], {"used": 4, "bad": 4})


def test_bad_records_keep_their_place(config, tmp_path):
    name = expected_ids(config)
    train(tmp_path, config, steps=range(9), world=2, bad=[name(7)])
    found = audit(tmp_path, config, completed_steps=9)
    assert found.faults == []
    assert [(c["used"], c["bad"]) for _, c in sorted(found.counts.items())] == [(17, 1), (17, 1)]


def test_a_record_without_a_readable_name_is_known_by_its_number(tmp_path):
    write_shard(tmp_path / "set" / "a.tar", [(str(i), record(text=f"{i}?").files) for i in range(4)])
    index = write_index(tmp_path / "set")
    config = config_of(SourceConfig(path=str(tmp_path / "set")))
    train(tmp_path, config, steps=range(1))
    with (tmp_path / "set" / "a.tar").open("r+b") as file:
        file.seek(index.locate(2)[1])
        file.write(b"no header" * 60)
    lost = {"ids": ["a.tar/2"], "bad": ["source 0, sample 2"]}
    edit(tmp_path, lambda lines: lines[1]["ids"].remove(*lost["ids"]))
    edit(tmp_path, lambda lines: lines[1].update(bad=lost["bad"]))
    found = audit(tmp_path, config)
    assert found.faults == []
    assert found.counts[0, 0] == {"used": 3, "bad": 1}


def test_a_lost_step_is_named_sample_by_sample(config, tmp_path):
    train(tmp_path, config, steps=range(6), world=2)
    edit(tmp_path, lambda lines: lines.pop(3), rank=1)
    found = audit(tmp_path, config)
    assert [fault.id for fault in found.faults] == [expected_ids(config)(position) for position in (10, 11)]
    assert all(fault.reason.startswith("step 2: due but not used") for fault in found.faults)
    assert totals(found) == {"used": 22, "missing": 2, "twice": 0}
    assert format_verdict(found) == "6 steps in 1 attempt: 2 faults"


def test_a_sample_in_the_place_of_another_is_twice_and_the_other_missing(config, tmp_path):
    train(tmp_path, config, steps=range(3))
    name = expected_ids(config)
    edit(tmp_path, lambda lines: lines[2]["ids"].__setitem__(1, name(0)))
    found = audit(tmp_path, config)
    assert [fault.id for fault in found.faults] == [name(5), name(0)]
    assert "step 1: used but not due" in found.faults[1].reason
    assert totals(found) == {"used": 11, "missing": 1, "twice": 1}


def test_a_step_written_twice_by_one_attempt_is_used_twice(config, tmp_path):
    train(tmp_path, config, steps=range(3))
    edit(tmp_path, lambda lines: lines.append(lines[1]))
    assert totals(audit(tmp_path, config)) == {"used": 12, "missing": 0, "twice": 4}


def test_a_foreign_sample_is_a_fault_of_its_own(config, tmp_path):
    train(tmp_path, config, steps=range(3))
    edit(tmp_path, lambda lines: lines[3]["ids"].append("elsewhere.tar/1"))
    edit(tmp_path, lambda lines: lines[3]["ids"].append("train-000000.tar/none"))
    found = audit(tmp_path, config)
    assert [fault.id for fault in found.faults] == ["elsewhere.tar/1", "train-000000.tar/none"]
    assert {fault.reason for fault in found.faults} == {"step 2: used but in no source of the run"}
    assert totals(found) == {"used": 12, "missing": 0, "twice": 0}


def test_which_rank_takes_a_sample_and_in_which_pack_is_free(config, tmp_path):
    train(tmp_path, config, steps=range(2), world=2)
    ids = [json.loads(log_of(tmp_path, rank).read_text().splitlines()[1])["ids"] for rank in range(2)]
    for rank, own in enumerate([[ids[1][1]], [ids[0][1], *ids[0][:1], ids[1][0]]]):
        edit(tmp_path, lambda lines, own=own: lines[1].update(ids=own), rank=rank)
    assert audit(tmp_path, config, completed_steps=2).faults == []


def test_a_sample_that_two_ranks_take_is_used_twice(config, tmp_path):
    train(tmp_path, config, steps=range(2), world=2)
    log_of(tmp_path, 1).write_text(log_of(tmp_path, 0).read_text())
    assert totals(audit(tmp_path, config)) == {"used": 4, "missing": 4, "twice": 4}


def test_another_seed_is_another_order(config, tmp_path):
    train(tmp_path, config, steps=range(3))
    assert audit_run(tmp_path, config, seed=SEED + 1, completed_steps=3).faults


@pytest.mark.parametrize("lost", [1, 9, 40])
def test_a_torn_last_line_is_a_step_not_taken(config, tmp_path, lost):
    train(tmp_path, config, steps=range(4))
    path = log_of(tmp_path)
    path.write_bytes(path.read_bytes()[: -1 - lost])
    found = audit(tmp_path, config, completed_steps=2)
    assert (found.faults, found.num_steps) == ([], 3)
    train(tmp_path, config, steps=range(2, 5))
    found = audit(tmp_path, config, completed_steps=5)
    assert (found.faults, found.num_steps, found.num_attempts) == ([], 5, 2)


def test_a_line_torn_in_the_middle_is_a_fault_and_so_are_its_samples(config, tmp_path):
    train(tmp_path, config, steps=range(4))
    lines = log_of(tmp_path).read_text().splitlines(keepends=True)
    log_of(tmp_path).write_text("".join([*lines[:2], lines[2][:20] + "\n", *lines[3:]]))
    found = audit(tmp_path, config)
    assert found.faults[0].id == "samples-rank-0.jsonl, line 3"
    assert [fault.id for fault in found.faults[1:]] == [expected_ids(config)(p) for p in range(4, 8)]


def test_a_last_step_that_only_some_ranks_wrote_is_one_not_taken(config, tmp_path):
    train(tmp_path, config, steps=range(4), world=2)
    edit(tmp_path, lambda lines: lines.pop(), rank=1)
    assert (audit(tmp_path, config).faults, audit(tmp_path, config).num_steps) == ([], 3)
    assert totals(audit(tmp_path, config, completed_steps=4)) == {"used": 14, "missing": 2, "twice": 0}


def test_a_rank_without_a_log_misses_all_its_samples(config, tmp_path):
    train(tmp_path, config, steps=range(4), world=2)
    log_of(tmp_path, 1).unlink()
    assert totals(audit(tmp_path, config, completed_steps=4)) == {"used": 8, "missing": 8, "twice": 0}


@pytest.mark.parametrize("content", ["", "{", '{"attempt": 0}\n'])
def test_a_log_of_nothing_proves_nothing(config, tmp_path, content):
    log_of(tmp_path).write_text(content)
    assert totals(audit(tmp_path, config, completed_steps=2)) == {"used": 0, "missing": 8, "twice": 0}


def test_steps_before_the_first_log_are_missing(config, tmp_path):
    train(tmp_path, config, steps=range(2, 4))
    assert totals(audit(tmp_path, config)) == {"used": 8, "missing": 8, "twice": 0}


def test_a_line_of_no_attempt_is_a_fault(config, tmp_path):
    train(tmp_path, config, steps=range(2))
    edit(tmp_path, lambda lines: lines.insert(0, {"step": 9, "ids": []}))
    edit(tmp_path, lambda lines: lines.append({"step": 7, "ids": 3}))
    (fault,) = audit(tmp_path, config).faults
    assert (fault.id, fault.reason) == (
        "samples-rank-0.jsonl, line 1",
        "step 9 belongs to no attempt of rank 0",
    )


def test_a_run_without_a_log_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no samples-rank-0.jsonl"):
        audit(tmp_path, config)


def test_names_are_those_of_the_records(shards):
    index = read_index(shards)
    reader, names = RecordReader(index), SampleNames(index)
    assert [names(sample) for sample in range(18)] == [reader(sample).id for sample in range(18)]


def test_long_names_are_read_too(tmp_path):
    key = "/".join(["folder" * 15] * 4)
    write_shard(tmp_path / "a.tar", [("0", record().files), (key, record().files)])
    names = SampleNames(write_index(tmp_path))
    assert (names(0), names(1)) == ("a.tar/0", f"a.tar/{key}")
    assert f"a.tar/{key}" in names
    assert "a.tar/1" not in names
