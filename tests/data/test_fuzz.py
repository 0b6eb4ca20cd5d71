"""Damage by chance, to images, JSON and tars: it makes bad records and nothing worse."""

import random
import signal
from contextlib import suppress

import pytest

from tests.support.hostile import GOOD, mutated, whole
from tests.support.tiny import encoded_image, record
from vico_pl.data.decode import decode_record
from vico_pl.data.shards.reader import RecordReader, read_index
from vico_pl.errors import RecordError

JPEG, PNG, WEBP = (encoded_image(image_format, size=(120, 90)) for image_format in ("JPEG", "PNG", "WEBP"))


@pytest.fixture(autouse=True)
def _no_hang():
    """End a test that hangs."""

    def ring(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(600)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fuzz_records(rng):
    for name, content in (("jpg", JPEG), ("png", PNG), ("webp", WEBP), ("json", GOOD["json"])):
        image = JPEG if name == "json" else None
        files = {"jpg": image, name: mutated(content, rng)}
        with suppress(RecordError):
            decode_record(record(files=files))


def fuzz_tar(folder, tar, index, rng):
    """Damage a shard before it is indexed, and after."""
    content = mutated(tar, rng)
    (folder / "a.tar").write_bytes(content)
    for path in (folder / "a.idx", folder / "index.json"):
        path.unlink(missing_ok=True)
    with suppress(ValueError):
        index_of_damaged = read_index(folder)
        read_all(index_of_damaged)
    read_all(index)


def read_all(index):
    reader = RecordReader(index)
    for sample in range(index.num_samples):
        with suppress(RecordError):
            decode_record(reader(sample))


@pytest.mark.parametrize("num_mutations", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_damage_does_more_than_make_a_bad_record(tmp_path, num_mutations):
    rng = random.Random(0)
    tar = whole("0") + whole("deep/" * 30 + "1") + whole("2") + bytes(1024)
    (tmp_path / "a.tar").write_bytes(tar)
    index = read_index(tmp_path)
    read_all(index)  # so that the shard is open: to what follows, the damage comes during a run
    for _ in range(num_mutations // 5):
        fuzz_records(rng)
        fuzz_tar(tmp_path, tar, index, rng)
