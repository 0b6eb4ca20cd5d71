"""Reading a record from its bytes: the short way gives what tarfile gives, whatever a tar holds."""

import io
import re
import tarfile

import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from vico_pl.data.shards import tars
from vico_pl.errors import RecordError

NAMES = [
    "000017.jpg",
    "000017.json",
    "000017.0.PNG",
    "a/b.txt",
    "README",
    "__meta__/x.json",
    "ü.json",
    "x" * 120 + ".jpg",
]
KINDS = [
    tarfile.REGTYPE,
    tarfile.AREGTYPE,
    tarfile.DIRTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
]
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]

members = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(0, 1500), st.sampled_from([KINDS[0]] * 6 + KINDS)),
    max_size=4,
)


def tar_of(members, *, tar_format, mtime=0):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, size, kind in members:
            member = tarfile.TarInfo(name)
            member.type, member.mtime = kind, mtime
            member.size = size if kind in (tarfile.REGTYPE, tarfile.AREGTYPE) else 0
            tar.addfile(member, io.BytesIO(bytes(size)))
    return buffer.getvalue()


def outcome(content):
    try:
        return tars.read_members(content)
    except RecordError as error:
        return str(error), error.kind


def by_tarfile(content, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tars, "_plain_members", lambda _: None)
        return outcome(content)


@pytest.fixture(scope="module")
def patches():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@settings(max_examples=600)
@given(
    members=members,
    tar_format=st.sampled_from(FORMATS),
    mtime=st.sampled_from([0, 1.5]),
    damage=st.one_of(st.none(), st.tuples(st.integers(0, 4000), st.integers(0, 255))),
    cut=st.one_of(st.none(), st.integers(0, 6000)),
)
def test_the_short_way_gives_what_tarfile_gives(patches, members, tar_format, mtime, damage, cut):
    try:
        content = bytearray(tar_of(members, tar_format=tar_format, mtime=mtime))
    except ValueError:  # a name that this format cannot hold
        return
    if damage is not None and damage[0] < len(content):
        content[damage[0]] = damage[1]
    content = bytes(content[:cut])
    assert outcome(content) == by_tarfile(content, patches)


def test_usual_records_take_the_short_way():
    content = tar_of(
        [("7.jpg", 900, tarfile.REGTYPE), ("7.json", 30, tarfile.REGTYPE)], tar_format=tarfile.PAX_FORMAT
    )
    assert tars._plain_members(content) == [("7.jpg", bytes(900)), ("7.json", bytes(30))]
    assert tars.read_members(content) == ("7", {"jpg": bytes(900), "json": bytes(30)})


@settings(max_examples=600)
@given(st.text(alphabet="ab./_\n", max_size=12))
def test_names_are_split_as_webdataset_splits_them(name):
    is_metadata = re.match(r"__[^/]*__($|/)", name) is not None
    expected = None if is_metadata else wds.tariterators.base_plus_ext(name)[0]
    assert tars.member_key(name) == expected
