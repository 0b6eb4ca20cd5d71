import pytest
from torch import distributed

from vico_pl.stages.ranks import Ranks


def test_a_rank_alone_hears_itself():
    assert Ranks(1).gather({"a": 1}) == [{"a": 1}]


def test_a_rank_that_lost_another_says_so_in_a_sentence(monkeypatch):
    def closed(*_, **__):
        raise RuntimeError("Connection closed by peer\nand more of that")

    monkeypatch.setattr(distributed, "new_group", lambda **_: None)
    monkeypatch.setattr(distributed, "all_gather_object", closed)
    expected = r"another rank is gone \(Connection closed by peer\); its own log says why; the same command"
    with pytest.raises(ConnectionError, match=expected):
        Ranks(2).gather(1)
