"""`index.json` and sidecar files: what is refused, and what is read back."""

import json

import numpy as np
import pytest

from vico_pl.data.shards.index import open_sidecar, parse_entries, write_sidecar
from vico_pl.data.shards.tars import UNKNOWN_SIZE


def entry_of(**changes):
    return {"name": "a.tar", "num_samples": 3, "num_bytes": 10240, "sha256": "0" * 64, **changes}


HOSTILE = {
    "no JSON": b"{",
    "no object": b"[1]",
    "no shards": b"{}",
    "bottomless": b"[" * 100_000,
    "no list": {"shards": 1},
    "no entry": {"shards": [1]},
    "no name": {"shards": [{"num_samples": 1}]},
    "a number for a name": {"shards": [entry_of(name=1)]},
    "a path": {"shards": [entry_of(name="../a.tar")]},
    "a folder": {"shards": [entry_of(name="..")]},
    "another file": {"shards": [entry_of(name="index.json")]},
    "a name that ends": {"shards": [entry_of(name="a\0.tar")]},
    "a negative count": {"shards": [entry_of(num_samples=-1)]},
    "a count that is none": {"shards": [entry_of(num_samples=True)]},
    "a fraction": {"shards": [entry_of(num_samples=1.5)]},
    "too many": {"shards": [entry_of(num_samples=2**70)]},
    "text for bytes": {"shards": [entry_of(num_bytes="1")]},
    "a number for a checksum": {"shards": [entry_of(sha256=1)]},
    "a shard twice": {"shards": [entry_of(), entry_of()]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index_is_refused_in_a_sentence(name):
    content = HOSTILE[name]
    encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(ValueError, match=r"index\.json: (unreadable; 'vico shards index|names )") as caught:
        parse_entries(encoded, where="set/index.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_samples", [0, 2, 100_000])
def test_a_sidecar_gives_back_what_was_written(tmp_path, num_samples):
    table = np.arange(5 * num_samples + 5).reshape(-1, 5)
    table[:1, 2] = -1
    write_sidecar(table, tmp_path / "a.tar")
    found = open_sidecar(tmp_path / "a.idx")
    assert (found.num_samples, found.end) == (num_samples, table[-1, 0])
    for place in range(num_samples)[:: num_samples // 2 or 1]:
        assert found.span(place) == (5 * place, 5 * place + 5)
        assert found.size(place) == (tuple(table[place, 1:]) if place else UNKNOWN_SIZE)


def test_an_index_of_mosaicml_is_named_as_such():
    shard = {"raw_data": {"basename": "shard.00000.mds"}, "samples": 3, "format": "mds", "version": 2}
    with pytest.raises(ValueError, match="lists shards of MosaicML; expected WebDataset tars"):
        parse_entries(json.dumps({"version": 2, "shards": [shard]}).encode(), where="set/index.json")
