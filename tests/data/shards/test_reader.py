import errno
import hashlib
import json
import os
import pickle
import shutil
import tarfile
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.hostile import keys_or_kinds, member
from tests.support.tiny import record
from vico_pl.data.shards import shard as shard_module
from vico_pl.data.shards.cache import StreamingConfig
from vico_pl.data.shards.index import INDEX_NAME, ShardEntry, side_index_path, write_entries
from vico_pl.data.shards.reader import RecordReader, find_faults, read_index, write_index, write_shard
from vico_pl.data.shards.tars import UNKNOWN_SIZE
from vico_pl.errors import RecordError
from vico_pl.files import atomic_path

RECORDS = [
    ("000000", {"json": b"{}", "jpg": b"x" * 700}),
    ("000001", {"json": b"text alone"}),
    ("sub/000002", {"json": b"{}", "0.png": b"a", "1.png": b"b" * 512, "10.png": b""}),
]


def write_tar(path, members):
    """A tar as a foreign tool writes it: `members` are (name, content); a content of None is a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {True: tarfile.DIRTYPE, False: tarfile.REGTYPE}
    packed = [member(name, content or b"", type=kinds[content is None]) for name, content in members]
    path.write_bytes(b"".join(packed) + bytes(1024))


def read_all(folder):
    index = read_index(folder)
    reader = RecordReader(index)
    return [reader(i) for i in range(index.num_samples)]


def test_records_read_by_number_equal_what_was_written(tmp_path):
    write_shard(tmp_path / "a-000000.tar", RECORDS[:2])
    write_shard(tmp_path / "a-000001.tar", RECORDS[2:])
    found = read_all(tmp_path)
    assert [(r.key, r.files) for r in found] == RECORDS
    assert [r.id for r in found] == ["a-000000.tar/000000", "a-000000.tar/000001", "a-000001.tar/sub/000002"]


def test_records_read_by_number_equal_what_plain_webdataset_reads(shards):
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    plain = list(wds.WebDataset(urls, shardshuffle=False))
    ours = read_all(shards)
    assert len(ours) == len(plain) == 18
    for sample, mine in zip(plain, ours, strict=True):
        assert mine.key == sample["__key__"]
        assert mine.files == {k: v for k, v in sample.items() if not k.startswith("__")}


def test_a_start_opens_neither_tars_nor_sidecars(shards, monkeypatch):
    monkeypatch.setattr(shard_module.Shard, "open", None)
    monkeypatch.setattr(shard_module, "open_sidecar", None)
    assert read_index(shards).num_samples == 18


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_places_equal_counting_whatever_the_sizes_of_shards(sizes):
    with tempfile.TemporaryDirectory() as folder:
        for shard, size in enumerate(sizes):
            names = [f"{shard}-{place}" for place in range(size)]
            write_shard(Path(folder, f"{shard}.tar"), [(name, {"json": name.encode()}) for name in names])
        index = write_index(folder)
        assert (index.shard_sizes, index.num_samples) == (sizes, sum(sizes))
        places = [(shard, place) for shard, size in enumerate(sizes) for place in range(size)]
        assert [index.place(sample) for sample in range(sum(sizes))] == places
        reader = RecordReader(index)
        assert [reader(sample).key for sample in range(sum(sizes))] == [f"{s}-{p}" for s, p in places]
        for outside in (-1, sum(sizes)):
            with pytest.raises(IndexError, match=f"has {sum(sizes)} samples, no sample {outside}"):
                index.place(outside)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_shard_is_written_whole_or_not_at_all(tmp_path, is_there):
    def failing():
        yield RECORDS[0]
        raise RuntimeError("disk full")

    if is_there:
        write_shard(tmp_path / "a.tar", RECORDS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="disk full"):
        write_shard(tmp_path / "a.tar", failing())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert before.keys() == ({"a.idx", "a.tar"} if is_there else set())


def test_foreign_tars_are_read_as_webdataset_reads_them_and_indexed(tmp_path):
    members = [
        ("photos", None),
        ("__meta__/x.json", b"{}"),
        ("README", b"no dot"),
        ("photos/0.json", b"0"),
        ("photos/0.extra", None),
        ("photos/0.jpg", b"x"),
        ("LICENSE", b"no dot"),
        ("photos/1.json", b"1"),
        ("photos/0.json", b"its key is back: another record"),
        ("more", None),
    ]
    write_tar(tmp_path / "a.tar", members)
    plain = list(wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    ours = read_all(tmp_path)
    assert [r.key for r in ours] == [s["__key__"] for s in plain] == ["photos/0", "photos/1", "photos/0"]
    assert [r.files for r in ours] == [{"json": b"0", "jpg": b"x"}, {"json": b"1"}, {"json": members[-2][1]}]
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "a.idx", INDEX_NAME}


def test_a_folder_that_is_absent_or_empty_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/x: no such folder of shards"):
        read_index(tmp_path / "x")
    with pytest.raises(ValueError, match=f"{tmp_path}: no shard found; expected names such as"):
        read_index(tmp_path)


def ruin(path):
    """Damage a tar whose sidecar is gone, too."""
    path.write_bytes(b"x" * path.stat().st_size)
    side_index_path(path).unlink()


def miscount(path):
    """Let index.json count more than there is."""
    index = path.with_name(INDEX_NAME)
    content = json.loads(index.read_text())
    content["shards"][1]["num_samples"] = 7
    index.write_text(json.dumps(content))


DAMAGES = {
    "absent": (Path.unlink, 2, "absent; restore it or run 'vico shards index"),
    "of another size": (
        lambda path: path.write_bytes(b""),
        2,
        r"its size differs from index.json \(0 bytes, not 10240\); restore it",
    ),
    "damaged": (ruin, 2, "not a readable tar"),
    "of another count": (miscount, 7, r"holds 2 samples, index\.json says 7; run 'vico shards index'"),
}


@pytest.mark.filterwarnings("ignore:.*b.tar. named in index.json but absent:UserWarning")
@pytest.mark.parametrize("name", DAMAGES)
def test_a_shard_that_cannot_be_opened_gives_bad_records(tmp_path, name):
    damage, count, message = DAMAGES[name]
    for shard in "abc":
        write_shard(tmp_path / f"{shard}.tar", RECORDS[:2])
    before = costs(write_index(tmp_path))
    damage(tmp_path / "b.tar")
    index = read_index(tmp_path)
    found = keys_or_kinds(RecordReader(index), range(index.num_samples))
    assert found == ["000000", "000001", *["shard"] * count, "000000", "000001"]
    with pytest.raises(RecordError, match=rf"b\.tar: {message}"):
        RecordReader(index)(2)
    if name in ("absent", "of another size"):  # with their sidecars
        assert costs(index) == before, "the assignment must not depend on which ranks see the damage"
    else:
        assert set(costs(index)[2 : 2 + count]) == {UNKNOWN_SIZE}


def test_absent_shards_are_named_once_before_they_are_read_and_then_each_once(tmp_path):
    for shard in "abc":
        write_shard(tmp_path / f"{shard}.tar", [(str(i), record().files) for i in range(3)])
    write_index(tmp_path)
    for shard in "bc":
        (tmp_path / f"{shard}.tar").unlink()
    message = r"b\.tar: named in index\.json but absent; restore it .* \(and 1 more shards\); its records"
    with pytest.warns(UserWarning, match=message) as caught:
        index = read_index(tmp_path)
    assert len(caught) == 1
    assert [(f.kind, f.reason.partition(":")[0][-5:]) for f in find_faults(index)] == [
        ("shard", "b.tar"),
        ("shard", "c.tar"),
    ]


def test_the_index_describes_each_shard_and_is_renewed(tmp_path):
    write_shard(tmp_path / "a.tar", RECORDS)
    write_index(tmp_path)
    before = json.loads((tmp_path / INDEX_NAME).read_text())
    content = (tmp_path / "a.tar").read_bytes()
    checksum = hashlib.sha256(content).hexdigest()
    entry = {"name": "a.tar", "num_samples": 3, "num_bytes": len(content), "sha256": checksum}
    assert before == {"version": 1, "has_sizes": True, "shards": [entry]}
    write_tar(tmp_path / "a.tar", [(f"{i}.json", b"new") for i in range(40)])
    write_index(tmp_path)  # what `vico shards index` does
    assert [r.files["json"] for r in read_all(tmp_path)] == [b"new"] * 40
    assert json.loads((tmp_path / INDEX_NAME).read_text())["shards"][0]["sha256"] != checksum


def test_a_check_finds_shards_that_lost_their_end_before_they_were_indexed(tmp_path):
    """As earlier versions indexed them: number of samples and bytes fit what is left."""
    path = tmp_path / "a.tar"
    write_shard(path, RECORDS)
    with path.open("rb+") as file:
        file.truncate(read_index(tmp_path).open(0).sidecar.end)
    entry = ShardEntry(name="a.tar", num_samples=3, num_bytes=path.stat().st_size)
    write_entries([entry], tmp_path / INDEX_NAME)
    assert len(read_all(tmp_path)) == 3
    (fault,) = [fault for fault in find_faults(read_index(tmp_path)) if "its end is missing" in fault.reason]
    assert (fault.id, fault.kind) == ("a.tar", "tar")


OLD = Path(__file__).parents[2] / "fixtures" / "shards-2026-11"  # with a.idx of positions alone and a.sizes


@pytest.mark.parametrize("is_read_only", [False, True])
def test_a_set_of_an_older_version_is_read_and_its_sidecars_are_rebuilt(tmp_path, monkeypatch, is_read_only):
    folder = shutil.copytree(OLD, tmp_path / "set")
    tars = sorted(folder.glob("*.tar"))
    bounds = [np.load(side_index_path(tar)).tolist() for tar in tars]
    sizes = [tuple(row) for tar in tars for row in np.load(tar.with_suffix(".sizes")).tolist()]
    if is_read_only:
        make_read_only(folder, monkeypatch)
    index = read_index(folder, streaming=StreamingConfig(cache_dir=str(tmp_path / "cache")))
    assert [RecordReader(index)(sample).id for sample in range(3)] == [
        "shards-2026-11-000000.tar/00000000",
        "shards-2026-11-000000.tar/00000001",
        "shards-2026-11-000001.tar/00000002",
    ]
    assert costs(index) == sizes
    for number, known in enumerate(bounds):
        assert list(map(index.open(number).sidecar.span, range(len(known) - 1))) == list(pairwise(known))
    assert [np.load(side_index_path(tar)).ndim for tar in tars] == [1 if is_read_only else 2] * 2


def test_a_sidecar_has_the_byte_ranges_and_sizes_of_the_specification(tmp_path):
    write_shard(tmp_path / "a.tar", [("0", record().files), *RECORDS[1:]])
    table = np.load(side_index_path(tmp_path / "a.tar"))
    text = 9  # < image > What is it ? a cat
    assert (table.dtype, table.shape) == (np.int64, (4, 5))
    assert table[:, 1:].tolist() == [[text, 1, 40, 30], [0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 0]]
    write_shard(tmp_path / "b.tar", [("0", {"jpg": b"j" * 5320, "json": b"{" * 388}), ("1", {"json": b""})])
    # 512 header + 5320 padded to 5632, 512 header + 388 padded to 512; an empty member is a header alone
    assert np.load(side_index_path(tmp_path / "b.tar"))[:, 0].tolist() == [0, 7168, 7680]


def make_read_only(folder, monkeypatch):
    """Refuse writes into a folder as the system would: root may write anywhere."""

    def refusing(path):
        if path.parent == folder:
            raise OSError(errno.EROFS, "Read-only file system")
        return atomic_path(path)

    monkeypatch.setattr("vico_pl.data.shards.index.atomic_path", refusing)
    monkeypatch.setattr(os, "access", lambda *_: False)


COSTS = [(0, 1, 0, 0), (0, 0, 0, 0), (0, 3, 0, 0)]  # of `RECORDS`, whose images are unreadable


def costs(index):
    return [tuple(index.size_of(sample)) for sample in range(index.num_samples)]


@pytest.mark.parametrize("is_counted", [True, False])
def test_sidecars_of_a_folder_that_is_read_only_are_kept_in_the_cache(tmp_path, monkeypatch, is_counted):
    folder = tmp_path / "set"
    for name in "ab":
        write_tar(folder / f"{name}.tar", [(f"{k}.{n}", c) for k, fs in RECORDS for n, c in fs.items()])
    if is_counted:
        shards = [{"name": f"{name}.tar", "num_samples": 3} for name in "ab"]
        (folder / INDEX_NAME).write_text(json.dumps({"shards": shards}))
    before = sorted(folder.iterdir())
    make_read_only(folder, monkeypatch)
    index = read_index(folder, streaming=StreamingConfig(cache_dir=str(tmp_path / "cache")))
    assert costs(index) == COSTS * 2
    reader = pickle.loads(pickle.dumps(RecordReader(index)))
    assert [reader(sample).key for sample in range(6)] == [key for key, _ in RECORDS] * 2
    assert sorted(folder.iterdir()) == before
    assert len(list((tmp_path / "cache").rglob("*.idx"))) == 2


def test_a_sidecar_of_another_tool_is_left_alone(tmp_path):
    folder, foreign = tmp_path / "set", b"v1.2 1\njson 512 2 a.json\n"  # as DALI writes it
    write_tar(folder / "a.tar", [("0.json", b"{}"), ("1.json", b"{}")])
    (folder / "a.idx").write_bytes(foreign)
    streaming = StreamingConfig(cache_dir=str(tmp_path / "cache"))
    for index in (read_index(folder, streaming=streaming), write_index(folder, streaming=streaming)):
        assert [RecordReader(index)(sample).key for sample in range(2)] == ["0", "1"]
        assert (folder / "a.idx").read_bytes() == foreign
