"""Shards that are fetched: what servers may do to them, and what several processes may."""

import errno
import gzip
import multiprocessing
import os

import fsspec
import pytest

from tests.support.hostile import member, serving
from vico_pl.data.shards import cache as cache_module
from vico_pl.data.shards.cache import TRIES, ShardCache, StreamingConfig, fetch_bytes
from vico_pl.data.shards.index import ShardEntry
from vico_pl.errors import RecordError


def tar(content=b"x" * 3000):
    return member("0.json", content).ljust(10240, b"\0")


TAR = tar()
WHOLE = ShardEntry(name="a.tar", num_samples=1, num_bytes=len(TAR))


def cache_of(folder, **settings):
    return ShardCache(StreamingConfig(cache_dir=str(folder), max_shard_gib=100_000 / 2**30, **settings))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(cache_module, "BACKOFF_S", 0.0)
    with serving() as found:
        yield found


@pytest.fixture
def cache(tmp_path):
    return cache_of(tmp_path / "cache")


def fetched(cache, location, *, name="a", entry=None, check=lambda path: None):
    descriptor = cache.open(location, cache.folder / "set" / f"{name}.tar", entry, check=check)
    try:
        return os.pread(descriptor, 2**20, 0)
    finally:
        os.close(descriptor)


def ok(body, length=True):
    return [(200, len(body) if length else None, body)]


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_shard_is_fetched_once_and_unpacked(server, cache, pack, length):
    server.answers["a.tar"] = ok(pack(TAR), length)
    assert [fetched(cache, f"{server.url}/a.tar") for _ in range(2)] == [TAR, TAR]
    assert server.requests == ["a.tar"]


def test_a_url_of_memory_is_read(cache):
    with fsspec.open("memory://bucket/a.tar", "wb") as file:
        file.write(TAR)
    assert fetched(cache, "memory://bucket/a.tar") == TAR


FAULTS = {
    "absent": ([(404, 0, b"")], "io", "no such file", 1),
    "forbidden": ([(403, 0, b"")], "io", "answered 403", 1),
    "broken": ([(500, 0, b"")], "io", "answered 500", TRIES),
    "cut": ([(200, len(TAR), TAR[:5000])], "io", r"payload|Content|closed|Response", TRIES),
    "too large": (ok(bytes(100_001)), "shard", "a.tar: more than the limit, 100000 bytes", 1),
    "too large, unsaid": (ok(bytes(100_001), False), "shard", "a.tar: more than the limit, 100000 bytes", 1),
    "bomb": (ok(gzip.compress(bytes(10**7))), "shard", "a.tar, unpacked: more than the limit", 1),
    "packed, cut": (ok(gzip.compress(os.urandom(5000))[:-50]), "shard", "ended before", TRIES),
    "packed, damaged": (ok(gzip.compress(TAR)[:-8] + bytes(8)), "shard", "CRC", TRIES),
    "of another size": (ok(TAR[:5120], False), "shard", r"5120 bytes came, index\.json has", TRIES, WHOLE),
    "other bytes": (ok(TAR), "shard", "checksum differs", TRIES, WHOLE._replace(sha256="0" * 64)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_fetched_is_said_and_leaves_nothing(server, cache, name):
    answers, kind, message, tries, *entry = FAULTS[name]
    server.answers["a.tar"] = list(answers)
    with pytest.raises(RecordError, match=message) as caught:
        fetched(cache, f"{server.url}/a.tar", entry=next(iter(entry), None))
    assert caught.value.kind == kind
    assert len(server.requests) == tries
    assert [p.name for p in (cache.folder / "set").iterdir()] in ([], ["a.tar.lock"])


def test_a_server_that_drips_is_given_up(server, cache, monkeypatch):
    monkeypatch.setattr(cache_module, "TIMEOUT_S", 0.0)
    monkeypatch.setattr(cache_module, "MIN_BYTES_PER_S", 1e12)
    server.answers["a.tar"] = ok(TAR)
    with pytest.raises(RecordError, match=r"a\.tar: only \d+ bytes came in 0 s"):
        cache.open(f"{server.url}/a.tar", cache.folder / "set" / "a.tar", None, check=len_of)
    assert len(server.requests) == 1


def test_a_folder_without_locks_is_said_with_a_way_out(server, cache, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    server.answers["a.tar"] = ok(TAR)
    with pytest.raises(ValueError, match=r"set: its file system has no locks .*set data.streaming.cache_dir"):
        fetched(cache, f"{server.url}/a.tar")


def test_a_length_that_lies_short_makes_no_short_shard(server, cache):
    server.answers["a.tar"] = [(200, 5120, TAR)]  # what follows is no answer, for which the client gives up
    with pytest.raises(RecordError):
        fetched(cache, f"{server.url}/a.tar", entry=WHOLE)
    assert not (cache.folder / "set" / "a.tar").exists()


def test_what_passes_is_tried_again(server, cache):
    server.answers["a.tar"] = [(503, 0, b""), (200, len(TAR), TAR[:100]), *ok(TAR)]
    assert fetched(cache, f"{server.url}/a.tar") == TAR


def test_a_shard_that_fails_its_check_is_not_kept(server, cache):
    def refuse(path):
        raise RecordError("not a readable tar", kind="shard")

    server.answers["a.tar"] = ok(TAR)
    with pytest.raises(RecordError, match=r"not a readable tar") as caught:
        fetched(cache, f"{server.url}/a.tar", check=refuse)
    assert caught.value.kind == "shard"
    assert fetched(cache, f"{server.url}/a.tar") == TAR


def test_the_least_recently_opened_goes_and_who_reads_it_reads_on(server, cache, tmp_path):
    small = cache_of(cache.folder, cache_gib=2.5 * len(TAR) / 2**30)
    for name in "abc":
        server.answers[name] = ok(tar(name.encode() * 3000))
    paths = {name: cache.folder / "set" / f"{name}.tar" for name in "abc"}
    first = small.open(f"{server.url}/a", paths["a"], None, check=len_of)
    fetched(small, f"{server.url}/b", name="b")
    for name, when in (("a", 1), ("b", 2)):
        os.utime(paths[name], (when, when))
    fetched(small, f"{server.url}/c", name="c")
    assert {name for name in "abc" if paths[name].exists()} == {"b", "c"}
    assert b"aaa" in os.pread(first, 2**20, 0)
    os.close(first)


def len_of(path):
    return path.stat().st_size


def _fetch_in_child(folder, url, queue):
    queue.put(fetched(cache_of(folder), url) == TAR)


def test_several_processes_fetch_a_shard_once(server, cache):
    server.answers["a.tar"] = ok(TAR)
    context = multiprocessing.get_context("fork")  # imports of their own would take seconds
    queue = context.Queue()
    arguments = (cache.folder, f"{server.url}/a.tar", queue)
    children = [context.Process(target=_fetch_in_child, args=arguments) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [queue.get() for _ in children] == [True] * 3
    assert server.requests == ["a.tar"]


def test_a_small_file_is_fetched_or_absent(server):
    server.answers.update({"index.json": ok(b"{}"), "no": [(404, 0, b"")], "bad": [(500, 0, b"")]})
    assert fetch_bytes(f"{server.url}/index.json") == b"{}"
    assert fetch_bytes(f"{server.url}/no") is None
    with pytest.raises(RecordError, match="answered 500"):
        fetch_bytes(f"{server.url}/bad")
