"""Members of a record, and sample keys: as tarfile and webdataset read them."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vico_pl.data.shards import tars
from vico_pl.errors import RecordError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
sizes = st.dictionaries(st.sampled_from(["jpg", "json", "0.PNG", "ü.json"]), st.integers(0, 1500), min_size=1)


def tar_of(sizes, *, tar_format):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, size in {**{f"7.{ending}": size for ending, size in sizes.items()}, "README": 3}.items():
            member = tarfile.TarInfo(name)
            member.mtime, member.size = 1.5, size
            tar.addfile(member, io.BytesIO(bytes(size)))
    return buffer.getvalue()


@settings(max_examples=100)
@given(sizes=sizes, tar_format=st.sampled_from(FORMATS))
def test_members_of_a_record_are_read(sizes, tar_format):
    files = {ending.lower(): bytes(size) for ending, size in sizes.items()}
    assert tars.read_members(tar_of(sizes, tar_format=tar_format)) == ("7", files)


@settings(max_examples=200)
@given(sizes=sizes, tar_format=st.sampled_from(FORMATS), place=st.integers(0, 511), cut=st.integers(1, 9))
def test_a_damaged_header_or_a_cut_makes_a_bad_record(sizes, tar_format, place, cut):
    content = tar_of(sizes, tar_format=tar_format)
    with pytest.raises(RecordError):
        tars.read_members(b"\xff" * (place + 1) + content[place + 1 :])
    with pytest.raises(RecordError):
        tars.read_members(content[: 512 - cut])


@pytest.mark.parametrize("lost", ["the end", "all after the first member", "a part of a block"])
def test_a_tar_without_its_end_is_refused_even_if_it_is_cut_between_two_records(tmp_path, lost):
    content = tar_of({"jpg": 600, "json": 100}, tar_format=tarfile.USTAR_FORMAT)
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    boundaries = tars.scan_boundaries(path).tolist()
    assert boundaries == [0, 512 + 1024 + 512 + 512 + 512 + 512]  # three members, padded to whole blocks
    kept = {
        "the end": boundaries[1],
        "all after the first member": 1536,
        "a part of a block": len(content) - 100,
    }
    path.write_bytes(content[: kept[lost]])
    with pytest.raises(ValueError, match=r"not a readable tar \(its end is missing after byte \d+"):
        tars.scan_boundaries(path)
