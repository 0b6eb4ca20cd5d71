"""Sets that are fetched or unpacked before they are read: the same samples as from plain tars of a folder."""

import gzip
import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest

from tests.data.test_module import data_module, global_batches
from tests.support.hostile import keys_or_kinds, serving
from vico_pl.audit import SampleNames
from vico_pl.data.module import SourceConfig
from vico_pl.data.shards import cache as cache_module
from vico_pl.data.shards import reader as reader_module
from vico_pl.data.shards import shard as shard_module
from vico_pl.data.shards.cache import StreamingConfig
from vico_pl.data.shards.reader import RecordReader, read_index, write_index, write_shard
from vico_pl.data.shards.shard import MAX_OPEN, ShardIndex
from vico_pl.data.shards.tars import UNKNOWN_SIZE

NUM_SHARDS = 4


def records(shard):
    texts = [f"{shard}-{place}" for place in range(shard + 1)]
    return [(text, {"json": b'{"conversations": [{"value": "%s"}]}' % text.encode()}) for text in texts]


KEYS = [key for shard in range(NUM_SHARDS) for key, _ in records(shard)]


@pytest.fixture
def folder(tmp_path):
    """Four shards of 1, 2, 3 and 4 records."""
    path = tmp_path / "set"
    for shard in range(NUM_SHARDS):
        write_shard(path / f"s-{shard}.tar", records(shard))
    write_index(path)
    return path


@pytest.fixture
def packed(folder, tmp_path):
    """The same, compressed, without an index."""
    path = tmp_path / "packed"
    path.mkdir()
    for tar in folder.glob("*.tar"):
        (path / f"{tar.name}.gz").write_bytes(gzip.compress(tar.read_bytes()))
    return path


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(cache_module, "BACKOFF_S", 0.0)
    with serving(folder) as found:
        yield found


@pytest.fixture
def streaming(tmp_path):
    return StreamingConfig(cache_dir=str(tmp_path / "cache"), allow_pipe=True)


def keys(index):
    return [record.key for record in map(RecordReader(index), range(index.num_samples))]


def sizes(index):
    return [index.size_of(sample) for sample in range(index.num_samples)]


COUNTS = pytest.mark.filterwarnings("ignore:.*are in no index.json, so each is fetched once:UserWarning")


def test_a_set_at_a_url_is_that_of_its_folder_and_each_shard_is_fetched_once(folder, server, streaming):
    index, local = read_index(server.url, streaming=streaming), read_index(folder)
    assert (index.is_streamed, index.names, index.shard_sizes) == (True, local.names, local.shard_sizes)
    assert server.requests == ["index.json"], "a start needs nothing else"
    assert keys(index) == keys(local) == KEYS
    assert sizes(index) == sizes(local)
    assert [SampleNames(index)(s) for s in range(3)] == [SampleNames(local)(s) for s in range(3)]
    again = read_index(server.url, streaming=streaming)
    assert (keys(again), sizes(again)) == (KEYS, sizes(local))
    assert sorted(server.requests) == sorted(
        ["index.json"] * 2 + [f"s-{i}.{ending}" for i in range(NUM_SHARDS) for ending in ("tar", "idx")]
    )


@pytest.mark.parametrize("name", ["s-2.tar", "s-{0..3}.tar", "s-{1,0}.tar"])
def test_shards_are_named_one_by_one(folder, server, streaming, name):
    index = read_index(f"{server.url}/{name}", streaming=streaming)
    local = read_index(f"{folder}/{name}")
    assert (keys(index), index.names) == (keys(local), local.names)
    assert sizes(index) == sizes(local)
    assert not local.is_streamed


def test_shards_that_nobody_counted_are_fetched_once_to_count_them(folder, server, streaming):
    (folder / "index.json").unlink()
    url, local = f"{server.url}/s-{{3..0}}.tar?hush", read_index(f"{folder}/s-{{3..0}}.tar")
    with pytest.warns(UserWarning, match="4 of its shards are in no index.json, so each is fetched once"):
        first = read_index(url, streaming=streaming)
    asked = len(server.requests)
    second = read_index(url, streaming=streaming)
    assert first.shard_sizes == second.shard_sizes == local.shard_sizes == [4, 3, 2, 1]
    assert (keys(second), sizes(second)) == (keys(local), sizes(local))
    assert server.requests[asked:] == ["index.json"], "all else is in the cache"


def test_a_url_without_an_index_that_names_no_shard_is_refused(folder, server, streaming):
    (folder / "index.json").unlink()
    with pytest.raises(
        ValueError, match=r"no index\.json there; write it where the shards are stored"
    ) as caught:
        read_index(f"{server.url.replace('//', '//me:hush@')}?hush", streaming=streaming)
    assert "hush" not in str(caught.value)


@COUNTS
@pytest.mark.parametrize("is_indexed", [True, False])
def test_packed_shards_of_a_folder_are_unpacked_and_then_as_any(packed, streaming, folder, is_indexed):
    if is_indexed:
        write_index(packed, streaming=streaming)
        assert {path.suffix for path in packed.iterdir()} == {".gz", ".idx", ".json"}
    index = read_index(packed, streaming=streaming)
    assert (keys(index), index.is_streamed, index.names[0]) == (KEYS, True, "s-0.tar.gz")
    assert sizes(index) == sizes(read_index(folder))
    shutil.copy(packed / "s-1.tar.gz", folder)  # next to plain ones
    (folder / "s-1.tar").unlink()
    (folder / "index.json").unlink()
    assert keys(read_index(folder, streaming=streaming)) == KEYS
    assert len(list(Path(streaming.cache_dir).rglob("*.tar"))) == NUM_SHARDS + 1


@COUNTS
def test_the_output_of_a_command_is_read_and_one_that_fails_is_a_fault(folder, streaming, monkeypatch):
    index = read_index(f"pipe:cat {folder}/s-{{0..3}}.tar", streaming=streaming)
    assert (keys(index), index.names[0]) == (KEYS, "s-0.tar")
    monkeypatch.setattr(cache_module, "BACKOFF_S", 0.0)
    with pytest.raises(ValueError, match=r"s-0\.tar; exit 3: the command ended with exit code 3"):
        read_index(f"pipe:cat {folder}/s-0.tar; exit 3", streaming=streaming)


@COUNTS
@pytest.mark.parametrize("lacks", ["has_sizes", "a shard"])
def test_costs_are_unknown_of_all_shards_unless_the_index_promises_all(folder, server, streaming, lacks):
    """They decide which rank reads what: ranks on machines that see different things must still agree."""
    index = json.loads((folder / "index.json").read_text())
    assert index.pop("has_sizes") if lacks == "has_sizes" else index["shards"].pop(1)
    (folder / "index.json").write_text(json.dumps(index))
    index = read_index(f"{server.url}/s-{{0..3}}.tar", streaming=streaming)
    assert set(sizes(index)) == {UNKNOWN_SIZE}
    assert keys(index) == KEYS
    assert set(sizes(index)) == {UNKNOWN_SIZE}
    assert not [name for name in server.requests if name.endswith(".idx")]


@pytest.mark.parametrize("lost", [404, 500, b"", b"garbage", "other"])
def test_costs_that_the_index_promises_stop_the_run_if_they_cannot_be_had(folder, server, streaming, lost):
    status, content = (lost, b"") if isinstance(lost, int) else (200, lost)
    if lost == "other":
        content = (folder / "s-1.idx").read_bytes()
    server.answers["s-2.idx"] = [(status, len(content), content)]
    index = read_index(server.url, streaming=streaming)
    assert index.size_of(0) == read_index(folder).size_of(0)
    with pytest.raises(ValueError, match=r"s-2\.idx: .*; index\.json says that it is there; restore"):
        index.size_of(3)
    assert keys(index) == KEYS
    del server.answers["s-2.idx"]
    assert sizes(index) == sizes(read_index(folder))


@pytest.mark.parametrize("is_listed", [True, False])
@COUNTS
def test_costs_that_are_gone_from_the_cache_are_had_again(folder, server, streaming, is_listed):
    if not is_listed:
        (folder / "index.json").unlink()
    index = read_index(f"{server.url}/s-{{0..3}}.tar", streaming=streaming)
    before = sizes(index)
    shutil.rmtree(streaming.cache_dir)
    assert sizes(pickle.loads(pickle.dumps(index))) == before
    assert UNKNOWN_SIZE not in before


def test_a_sidecar_of_another_tool_is_no_promise_of_costs(folder, streaming):
    (folder / "s-1.idx").write_bytes(b"v1.2 1")
    write_index(folder, streaming=streaming)
    assert json.loads((folder / "index.json").read_text())["has_sizes"] is False


BROKEN = {
    "absent": ([(404, 0, b"")], "io"),
    "broken": ([(500, 0, b"")], "io"),
    "another": ([(200, 1024, bytes(1024))], "shard"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_shard_that_cannot_be_fetched_makes_its_records_bad_and_is_not_asked_for_each(
    server, streaming, name, monkeypatch
):
    answers, kind = BROKEN[name]
    index = read_index(server.url, streaming=streaming)
    server.answers["s-3.tar"] = list(answers)
    reader = RecordReader(index)
    assert keys_or_kinds(reader, range(index.num_samples)) == [*KEYS[:6], *[kind] * 4]
    asked = server.requests.count("s-3.tar")
    assert asked <= cache_module.TRIES
    monkeypatch.setattr(shard_module, "FAILURE_S", 0.0)  # a minute later it is there again
    del server.answers["s-3.tar"]
    assert reader(9).key == KEYS[9]
    assert server.requests.count("s-3.tar") == asked + 1


def test_shards_that_come_next_are_fetched_ahead(server, streaming, monkeypatch):
    started = []

    class AtOnce:
        def __init__(self, *, target, args, daemon):
            started.append(target)
            target(*args)

        def start(self):
            pass

    monkeypatch.setattr(reader_module, "Thread", AtOnce)
    server.answers["s-0.tar"] = [(404, 0, b"")]  # left to whoever reads it
    reader = RecordReader(read_index(server.url, streaming=streaming))
    for expected in ((), (0, 1, 3), (0, 1, 3)):
        reader.expect(expected)
    assert [n for n in server.requests if n.endswith(".tar")] == ["s-0.tar", "s-1.tar", "s-3.tar"]
    assert len(started) == 1
    assert reader(KEYS.index("1-0")).key == "1-0"
    assert server.requests.count("s-1.tar") == 1


def test_expecting_shards_of_a_folder_starts_nothing(folder, monkeypatch):
    monkeypatch.setattr(reader_module, "Thread", None)
    RecordReader(read_index(folder)).expect((0, 1))


def test_a_reader_travels_to_other_processes_after_it_was_used(folder, server, streaming):
    for source in (folder, server.url):
        reader = RecordReader(read_index(source, streaming=streaming))
        reader(5)
        assert pickle.loads(pickle.dumps(reader))(6).key == KEYS[6]


def test_no_more_than_so_many_shards_are_open(folder, monkeypatch):
    closed = []
    monkeypatch.setattr(shard_module.OpenFile, "__del__", lambda file: closed.append(file))
    index = read_index(folder, max_open=2)
    closed.clear()
    assert keys(index) == KEYS
    assert len(closed) == 4  # a tar and its sidecar each


def test_many_sources_share_the_files_that_a_process_may_open(folder, tokenizer):
    module = data_module([SourceConfig(path=str(folder), weight=1.0)] * 40, tokenizer)
    assert [index.max_open for index in module.indexes] == [MAX_OPEN // 40] * 40
    assert pickle.loads(pickle.dumps(module.indexes[0])).max_open == MAX_OPEN // 40


@pytest.mark.parametrize(
    ("use", "num_free"),
    [(ShardIndex.open, 0), (ShardIndex.open, 1), (ShardIndex.size_of, 0)],  # 1: for the tar, not its sidecar
)
@pytest.mark.parametrize("is_remote", [False, True])
def test_a_process_that_may_open_no_more_files_says_so_and_blames_no_shard(
    folder, server, streaming, use, num_free, is_remote
):
    index = read_index(server.url if is_remote else folder, streaming=streaming)
    if is_remote:
        assert keys(index) == KEYS  # all are in the cache
        index = pickle.loads(pickle.dumps(index))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(folder, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + num_free, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            use(index, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert keys(index) == KEYS


def test_training_reads_the_same_global_batches_from_a_url_on_any_number_of_ranks(
    shards, tmp_path, tokenizer
):
    batches = []
    for world in (1, 2):
        with serving(shards) as server:
            config = StreamingConfig(window=2, cache_dir=str(tmp_path / f"{world}"))
            module = data_module([SourceConfig(path=server.url)], tokenizer, streaming=config)
            batches.append(global_batches(module, world=world, first_step=0, num_steps=3))
            assert max(map(server.requests.count, server.requests)) == 1
    assert batches[0] == batches[1]
    ids = [name for batch in batches[0] for name, _, _ in batch.values()]
    assert sorted(ids) == sorted(2 * list(set(ids)))
    assert len(ids) == 36


def test_what_a_set_may_cost_is_kept_in_the_cache_under_its_content(folder, server, streaming):
    index = read_index(server.url, streaming=streaming)
    before = keys(index)
    write_shard(folder / "s-0.tar", [("new", {"json": b"{}"})])
    write_index(folder)
    assert keys(read_index(server.url, streaming=streaming)) == ["new", *before[1:]]
