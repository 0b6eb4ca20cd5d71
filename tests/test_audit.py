"""Audits of sample logs that the callback wrote and the test then changed."""

import json
import os
import zlib
from dataclasses import replace
from unittest import mock

import lightning as L
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tiny import batch_of, mixed_samples, record
from vico_pl.audit import SampleNames, audit_run, format_table, format_verdict
from vico_pl.callbacks import records
from vico_pl.callbacks.records import SampleLog, pack_positions, unpack_positions
from vico_pl.data.module import DataConfig, SourceConfig, build_order, open_sources
from vico_pl.data.shards.reader import RecordReader, read_index, write_index, write_shard
from vico_pl.files import append_json
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
    """Return a function from position to sample name, read as training reads it."""
    indexes = [read_index(source.path) for source in config.sources]
    order = build_order(config, indexes, seed=SEED)
    readers = [RecordReader(index) for index in indexes]

    def name(position):
        place = order(position)
        return readers[place.source](place.sample).id

    return name


def train(run_dir, config, *, steps, world=1, bad=(), with_names=False):
    """Write the logs of an attempt that took these steps; records named in `bad` are unusable.

    With names, lines are as versions before positions were logged wrote them.
    """
    name, size = expected_ids(config), BATCH // world
    number = SampleLog(run_dir)._num_attempts()
    for rank in range(world):
        trainer = mock.Mock(spec=L.Trainer, global_step=steps.start, global_rank=rank, world_size=world)
        trainer.strategy.broadcast = lambda _: number
        log = SampleLog(run_dir)
        log.on_train_start(trainer, MODULE)
        for step in steps:
            start = step * BATCH + rank * size
            names = {position: name(position) for position in range(start, start + size)}
            good = {position: each for position, each in names.items() if each not in bad}
            bad_records = [BadRecord(id=each, reason="JSON") for each in names.values() if each in bad]
            if with_names:
                also = {"bad": [each.id for each in bad_records]} if bad_records else {}
                append_json(log_of(run_dir, rank), {"step": step, "ids": list(good.values()), **also})
                continue
            batch = replace(ANY_BATCH, ids=[*good.values(), ""], positions=[*good, -1])  # and a dummy
            taken = RankBatch(micro_batches=[batch], bad_records=bad_records, dummy=ANY_BATCH)
            log.on_train_batch_end(trainer, MODULE, None, taken, step)
        log.on_save_checkpoint(trainer, MODULE, {})


def audit(run_dir, config, *, completed_steps=0):
    return audit_run(run_dir, config, seed=SEED, completed_steps=completed_steps)


def totals(found):
    """Return how many samples were used, missing and used twice."""
    return tuple(sum(count[key] for count in found.counts.values()) for key in ("used", "missing", "twice"))


def log_of(run_dir, rank=0):
    return run_dir / f"samples-rank-{rank}.jsonl"


def read_log(run_dir, rank=0):
    return [json.loads(line) for line in log_of(run_dir, rank).read_text().splitlines()]


def edit(run_dir, change, *, rank=0):
    """Change a log, given as a list of lines."""
    lines = read_log(run_dir, rank)
    change(lines)
    log_of(run_dir, rank).write_text("".join(json.dumps(line) + "\n" for line in lines))


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


def test_a_run_without_a_step_proves_nothing(config, tmp_path):
    train(tmp_path, config, steps=range(0))
    assert format_verdict(audit(tmp_path, config)).startswith("0 steps in 1 attempt: nothing to check yet")


def test_a_line_is_what_the_documentation_shows(config, tmp_path):
    train(tmp_path, config, steps=range(2), bad=[expected_ids(config)(5)])
    ids = [expected_ids(config)(position) for position in range(8)]
    sums = [zlib.crc32("\n".join(names).encode()) for names in (ids[:4], [ids[4], *ids[6:]])]
    assert read_log(tmp_path) == [
        {"attempt": 0, "from_step": 0, "world": 1},
        {"step": 0, "used": pack_positions([0, 1, 2, 3]), "crc32": sums[0]},
        {"step": 1, "used": pack_positions([4, 6, 7]), "crc32": sums[1], "bad": [ids[5]]},
    ]


@pytest.mark.parametrize("used", ["eN", "", "eJzTNQIAAI4AYA==", 3])
def test_a_line_with_damaged_positions_is_unreadable(config, tmp_path, used):
    train(tmp_path, config, steps=range(3))
    edit(tmp_path, lambda lines: lines[1].update(used=used))
    assert audit(tmp_path, config).faults[0].reason == "unreadable"


@given(positions=st.lists(st.integers(0, 2**40), max_size=20).map(sorted))
def test_positions_come_back_from_a_line(positions):
    assert unpack_positions(pack_positions(positions)) == positions


def test_steps_of_a_killed_attempt_are_superseded_by_those_of_the_next(config, tmp_path):
    train(tmp_path, config, steps=range(6))
    edit(tmp_path, lambda lines: lines[-1].update(used=pack_positions([99])))
    train(tmp_path, config, steps=range(4, 4))
    train(tmp_path, config, steps=range(4, 9))
    found = audit(tmp_path, config, completed_steps=9)
    assert (found.faults, found.num_steps, found.num_attempts) == ([], 9, 3)
    assert totals(found) == (36, 0, 0)


@settings(max_examples=20)
@given(
    attempts=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 4), st.sampled_from([1, 2, 4]), st.booleans()),
        min_size=1,
        max_size=4,
    )
)
def test_restarts_and_changes_of_world_size_and_version_leave_nothing_to_find(
    tmp_path_factory, config, attempts
):
    run_dir, reached = tmp_path_factory.mktemp("run"), 0
    for lost, taken, world, with_names in attempts:
        first = max(reached - lost, 0)
        reached = first + taken
        train(run_dir, config, steps=range(first, reached), world=world, with_names=with_names)
    found = audit(run_dir, config, completed_steps=reached)
    assert (found.faults, found.num_steps) == ([], reached)
    assert totals(found) == (BATCH * reached, 0, 0)


def test_sources_with_equal_names_are_counted_apart(mixture, tmp_path):
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
    used = {place: count["used"] for place, count in found.counts.items()}
    assert used == {(0, 0): 12, (1, 0): 18, (1, 1): 2}


def test_the_filler_of_a_batch_of_bad_records_alone_is_no_sample(config, tmp_path):
    train(tmp_path, config, steps=range(2), bad=[expected_ids(config)(position) for position in range(4)])
    found = audit(tmp_path, config)
    assert (found.faults, found.counts[0, 0]) == ([], {"used": 4, "bad": 4})


def test_a_record_without_a_readable_name_is_known_by_its_number(tmp_path):
    write_shard(tmp_path / "set" / "a.tar", [(str(i), record(text=f"{i}?").files) for i in range(4)])
    index = write_index(tmp_path / "set")
    config = config_of(SourceConfig(path=str(tmp_path / "set")))
    train(tmp_path, config, steps=range(1), bad=["a.tar/2"])
    with (tmp_path / "set" / "a.tar").open("r+b") as file:
        file.seek(index.open(0).sidecar.span(2)[0])
        file.write(b"no header" * 60)
    edit(tmp_path, lambda lines: lines[1].update(bad=["source 0, sample 2"]))
    found = audit(tmp_path, config)
    assert found.faults == []
    assert found.counts[0, 0] == {"used": 3, "bad": 1}


@pytest.mark.parametrize(
    ("rank", "change", "expected", "samples", "reason"),
    [
        (1, lambda lines: lines.pop(2), (10, 2, 0), [6, 7], "step 1: due but not used"),
        (1, lambda lines: lines.pop(), (10, 2, 0), [10, 11], "step 2: due but not used"),
        (0, lambda lines: lines[2].update(ids=lines[1]["ids"]), (10, 2, 2), [4, 5, 0, 1], "step 1: "),
        (
            0,
            lambda lines: lines.insert(1, lines[1]),
            (12, 0, 2),
            [0, 1],
            "step 0: used but not due (source 0)",
        ),
        (
            0,
            lambda lines: lines[3]["ids"].extend(["elsewhere.tar/1", "train-000000.tar/none"]),
            (12, 0, 0),
            ["elsewhere.tar/1", "train-000000.tar/none"],
            "step 2: used but in no source of the run",
        ),
    ],
)
def test_deviations_are_counted_and_named(config, tmp_path, rank, change, expected, samples, reason):
    train(tmp_path, config, steps=range(3), world=2, with_names=True)
    edit(tmp_path, change, rank=rank)
    found, name = audit(tmp_path, config, completed_steps=3), expected_ids(config)
    assert totals(found) == expected
    assert [fault.id for fault in found.faults] == [name(s) if isinstance(s, int) else s for s in samples]
    assert all(fault.reason.startswith(reason) for fault in found.faults)
    assert format_verdict(found) == f"3 steps in 1 attempt: {len(samples)} faults"


OTHERS = ["other samples than those at its positions", "due but not used", "due but not used"]


@pytest.mark.parametrize(
    ("change", "expected", "reasons"),
    [
        (lambda lines: lines[2].update(crc32=1), (10, 2, 0), OTHERS),
        (lambda lines: lines[2].update(used=pack_positions([5, 6])), (10, 2, 0), OTHERS),
        (
            lambda lines: lines.insert(2, {**lines[2], "step": 0}),
            (12, 0, 2),
            ["used but not due (source 0)"] * 2,
        ),
        (lambda lines: lines.append(lines[1]), (12, 0, 0), ["is logged after step 2"]),
    ],
)
def test_positions_and_names_are_compared_with_the_order(config, tmp_path, change, expected, reasons):
    train(tmp_path, config, steps=range(3), world=2)
    edit(tmp_path, change)
    found = audit(tmp_path, config, completed_steps=3)
    assert totals(found) == expected
    pairs = zip(found.faults, reasons, strict=True)
    assert all(reason in fault.reason for fault, reason in pairs)


def test_logs_are_read_in_blocks_without_a_descriptor_each(config, tmp_path, monkeypatch):
    train(tmp_path, config, steps=range(6), world=4)
    monkeypatch.setattr(records, "BLOCK_BYTES", 100)
    before = len(os.listdir("/dev/fd"))
    readers = [records.read_lines(log_of(tmp_path, rank)) for rank in range(4)]
    started = [next(reader) for reader in readers]
    assert len(os.listdir("/dev/fd")) == before
    whole = [b"".join([first, *reader]) for first, reader in zip(started, readers, strict=True)]
    assert whole == [log_of(tmp_path, rank).read_bytes() for rank in range(4)]


def test_an_audit_ends_at_too_many_faults(config, tmp_path, monkeypatch):
    train(tmp_path, config, steps=range(2))
    monkeypatch.setattr("vico_pl.audit.MAX_FAULTS", 9)
    found = audit(tmp_path, config, completed_steps=1000)
    assert (found.num_steps, len(found.faults)) == (5, 12)


def test_a_last_step_that_only_some_ranks_wrote_is_one_not_taken(config, tmp_path):
    train(tmp_path, config, steps=range(4), world=2)
    edit(tmp_path, lambda lines: lines.pop(), rank=1)
    assert (audit(tmp_path, config).faults, audit(tmp_path, config).num_steps) == ([], 3)


def test_it_does_not_matter_which_rank_uses_a_sample(config, tmp_path):
    train(tmp_path, config, steps=range(2), world=2)
    first, second = (read_log(tmp_path, rank)[1] for rank in range(2))
    edit(tmp_path, lambda lines: lines[1].update(second), rank=0)
    edit(tmp_path, lambda lines: lines[1].update(first), rank=1)
    assert audit(tmp_path, config, completed_steps=2).faults == []


def test_a_rank_needs_a_log_of_its_own(config, tmp_path):
    train(tmp_path, config, steps=range(2), world=2)
    log_of(tmp_path, 1).write_text(log_of(tmp_path, 0).read_text())
    assert totals(audit(tmp_path, config, completed_steps=2)) == (4, 4, 4)
    log_of(tmp_path, 1).unlink()
    assert totals(audit(tmp_path, config, completed_steps=2)) == (4, 4, 0)


def test_another_seed_is_another_order(config, tmp_path):
    train(tmp_path, config, steps=range(3))
    assert audit_run(tmp_path, config, seed=SEED + 1, completed_steps=3).faults


@pytest.mark.parametrize("lost", [1, 9, 40])
def test_a_truncated_last_line_is_a_step_not_taken(config, tmp_path, lost):
    train(tmp_path, config, steps=range(4))
    path = log_of(tmp_path)
    path.write_bytes(path.read_bytes()[: -1 - lost])
    found = audit(tmp_path, config, completed_steps=2)
    assert (found.faults, found.num_steps) == ([], 3)
    train(tmp_path, config, steps=range(2, 5))
    found = audit(tmp_path, config, completed_steps=5)
    assert (found.faults, found.num_steps, found.num_attempts) == ([], 5, 2)


def test_a_truncated_line_in_the_middle_is_a_fault_and_so_are_its_samples(config, tmp_path):
    train(tmp_path, config, steps=range(4))
    lines = log_of(tmp_path).read_text().splitlines(keepends=True)
    log_of(tmp_path).write_text("".join([*lines[:2], lines[2][:20] + "\n", *lines[3:]]))
    found = audit(tmp_path, config)
    assert found.faults[0].id == "samples-rank-0.jsonl, line 3"
    assert [fault.id for fault in found.faults[1:]] == [expected_ids(config)(p) for p in range(4, 8)]


@pytest.mark.parametrize("content", ["", "{", '{"attempt": 0}\n'])
def test_a_log_of_nothing_proves_nothing(config, tmp_path, content):
    log_of(tmp_path).write_text(content)
    assert totals(audit(tmp_path, config, completed_steps=2)) == (0, 8, 0)


def test_steps_before_the_first_log_are_missing(config, tmp_path):
    train(tmp_path, config, steps=range(2, 4))
    assert totals(audit(tmp_path, config)) == (8, 8, 0)


def test_a_line_of_no_attempt_is_a_fault(config, tmp_path):
    train(tmp_path, config, steps=range(2))
    edit(tmp_path, lambda lines: lines.insert(0, {"step": 9, "ids": []}))
    edit(tmp_path, lambda lines: lines.append({"step": 7, "ids": 3}))
    faults = [(fault.id, fault.reason) for fault in audit(tmp_path, config).faults]
    assert faults == [("samples-rank-0.jsonl, line 1", "step 9 belongs to no attempt of rank 0")]


def test_long_names_are_read_too(tmp_path):
    key = "/".join(["folder" * 15] * 4)
    write_shard(tmp_path / "a.tar", [("0", record().files), (key, record().files)])
    names = SampleNames(write_index(tmp_path))
    assert (names(0), names(1)) == ("a.tar/0", f"a.tar/{key}")
    assert f"a.tar/{key}" in names
    assert "a.tar/1" not in names
