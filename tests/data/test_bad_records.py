"""A corpus of bad records and bad shards: each is counted under its kind, and none ends or hangs a run."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.support.hostile import GOOD, keys_or_kinds, member, png, whole, with_checksum
from tests.support.tiny import encoded_image
from vico_pl.data.chat import ChatConfig
from vico_pl.data.module import DataConfig, DataModule, RankBatches, SourceConfig
from vico_pl.data.shards.index import write_sidecar
from vico_pl.data.shards.reader import (
    RecordReader,
    find_faults,
    read_index,
    read_samples,
    write_index,
    write_shard,
)
from vico_pl.data.shards.tars import scan_boundaries
from vico_pl.data.tiling import TilingConfig
from vico_pl.errors import RecordError

JPEG, PNG, WEBP = (encoded_image(image_format, size=(120, 90)) for image_format in ("JPEG", "PNG", "WEBP"))
MOVING = {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]}
PAIR = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]


def with_image(content):
    return {**GOOD, "jpg": content}


def with_json(content):
    return {**GOOD, "json": content if isinstance(content, bytes) else json.dumps(content).encode()}


def with_turns(*turns):
    return with_json({"conversations": list(turns)})


def with_answer(text):
    return with_turns(PAIR[0], {"from": "gpt", "value": text})


def with_fields(**fields):
    return with_json({"conversations": PAIR, **fields})


DAMAGED_PNG = PNG[: len(PNG) // 2] + bytes(40) + PNG[len(PNG) // 2 + 40 :]
RECORDS = {  # kind: name: files, and what the reason says
    "json": {
        "no JSON": ({"jpg": JPEG}, "no .json member; found ['jpg']"),
        "empty JSON": (with_json(b""), "JSON: Expecting value"),
        "cut JSON": (with_json(GOOD["json"][:-5]), "JSON: "),
        "JSON of another encoding": (with_json(b'{"a": "\xff"}'), "JSON: 'utf-8' codec can't decode"),
        "bottomless JSON": (with_json(b"[" * 100_000), "JSON: "),
        "a number without end": (with_json(b'{"a": ' + b"9" * 5000 + b"}"), "JSON: "),
        "a pickle for JSON": (with_json(pickle.dumps({"conversations": PAIR})), "JSON: "),
    },
    "conversation": {
        "a list": (with_json([1]), "JSON has no list 'conversations'"),
        "no conversations": (with_json({"messages": PAIR}), "JSON has no list 'conversations'"),
        "no turn": (with_turns(), "must end with an answer of 'gpt'"),
        "no answer": (with_turns(PAIR[0]), "must end with an answer of 'gpt'"),
        "no answer at the end": (with_turns(*PAIR, PAIR[0]), "must end with an answer of 'gpt'"),
        "answer first": (with_turns(*PAIR[::-1]), "turn 0: expected {'from': 'human', 'value': text}"),
        "two questions": (with_turns(PAIR[0], *PAIR), "turn 1: expected {'from': 'gpt', 'value': text}"),
        "another role": (with_turns({"from": "system", "value": ""}, *PAIR), "turn 0: expected"),
        "no text": (with_turns(PAIR[0], {"from": "gpt", "value": None}), "turn 1: expected"),
        "a turn of text": (with_turns("q", "a"), "turn 0: expected"),
        "half a surrogate pair": (with_answer("\ud83d"), "turn 1: half a surrogate pair"),
        "skills of another kind": (with_fields(skills="ocr"), "'skills' is no list of names"),
        "skills that are numbers": (with_fields(skills=[1]), "'skills' is no list of names"),
        "more skills than answers": (with_fields(skills=["a", "b"]), "'skills' has 2 entries for 1 answers"),
        "metrics that are numbers": (with_fields(metrics=[1]), "'metrics' is no list of names"),
        "accepted answers of two questions": (
            with_fields(metrics="f1", answers=[["a"], ["b"]]),
            "'answers' is no list with the accepted answers to each question",
        ),
        "a video elsewhere": (
            {"json": json.dumps({"conversations": PAIR, "video": "a.mp4"}).encode()},
            "JSON has a 'video'; expected images",
        ),
    },
    "marks": {
        "a mark too many": ({"json": GOOD["json"]}, "1 <image> marks in the conversation but 0 images"),
        "a mark too few": ({**GOOD, "0.jpg": JPEG}, "1 <image> marks in the conversation but 2 images"),
        "a mark in an answer": (with_answer("<image>"), "turn 1: <image> in an answer"),
        "an image in a pickle": ({"json": GOOD["json"], "pyd": pickle.dumps(JPEG)}, "but 0 images"),
    },
    "member": {"a video": ({**GOOD, "mp4": b"x"}, "member 'mp4' is a video; expected images")},
    "image": {
        "no bytes": (with_image(b""), "image 'jpg' (0 bytes): "),
        "one byte": (with_image(b"\xff"), "image 'jpg' (1 bytes): "),
        "text": (with_image(b"hello"), "image 'jpg' (5 bytes): neither JPEG, PNG"),
        "a web page": (with_image(b"<!DOCTYPE html><html>404</html>"), "neither JPEG, PNG"),
        "cut JPEG": (with_image(JPEG[: len(JPEG) // 2]), "incomplete or truncated"),
        "zeros for half a JPEG": (with_image(JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2)), "image 'jpg'"),
        "damaged PNG": (with_image(DAMAGED_PNG), "image 'jpg'"),  # torchvision 0.29: segmentation fault
        "PNG without pixels": (with_image(png(30, 30)), "image 'jpg'"),
        "moving PNG": (with_image(encoded_image("PNG", **MOVING)), "several frames, expected one"),
        "moving WebP": (with_image(encoded_image("WEBP", **MOVING)), "several frames, expected one"),
        "moving GIF": (with_image(encoded_image("GIF", **MOVING)), "several frames, expected one"),
        "TIFF": (with_image(encoded_image("TIFF")), "neither JPEG, PNG"),
        "an array": (with_image(b"\x93NUMPY" + bytes(200)), "neither JPEG, PNG"),
    },
    "image_limit": {
        "bomb": (with_image(png(60_000, 60_000)), "exceeds limit"),
        "small bomb": (with_image(png(10_001, 10_000)), "10001 x 10000 pixels are more than max_pixels"),
        "scans without end": (with_image(JPEG + b"\xff\xda" * 1000), "more than 100 scans"),
    },
    "length": {"a long answer": (with_answer("word " * 2000), "chat.max_tokens is 1000")},
    "key": {
        "../climbing": (GOOD, "key '../climbing' is an absolute path or has '..'"),
        "a/../../inside": (GOOD, "is an absolute path or has '..'"),
        "/absolute": (GOOD, "key '/absolute' is an absolute path or has '..'"),
        "line\nbreak": (GOOD, "has control characters or is no UTF-8"),
        "bytes \udcff": (GOOD, "has control characters or is no UTF-8"),
    },
}
KINDS = {name: kind for kind, names in RECORDS.items() for name in names}


def outcome(folder):
    """Return the keys of good records and the kinds of bad ones."""
    return [sample.id.partition("/")[2] for sample in read_samples(folder)], [
        bad.kind for bad in find_faults(read_index(folder))
    ]


def test_every_bad_record_is_counted_under_its_kind_and_the_good_ones_train(tmp_path, tokenizer):
    bad = {name: files for names in RECORDS.values() for name, (files, _) in names.items()}
    pairs = enumerate(bad.items())
    write_shard(tmp_path / "a.tar", [record for i, pair in pairs for record in (pair, (f"good {i}", GOOD))])
    config = DataConfig(
        sources=[SourceConfig(path=str(tmp_path))],
        tiling=TilingConfig(tile_size=32, max_tiles=2),
        chat=ChatConfig(max_tokens=1000),
    )
    data = DataModule(config, tokenizer=tokenizer, full_tokens_per_tile=4, seed=0)
    assert data.indexes[0].num_samples == 2 * len(KINDS)
    share = RankBatches(data, first_step=0, rank=0, world=1).rank_batch(range(2 * len(KINDS)))
    found = {bad.id.partition("/")[2]: bad for bad in share.bad_records}
    assert {name: bad.kind for name, bad in found.items()} == KINDS
    for kind, names in RECORDS.items():
        for name, (_, expected) in names.items():
            assert expected in found[name].reason, (kind, name)
    assert len(share.ids) == len(set(share.ids)) == len(KINDS)
    assert not any("\n" in bad.reason or ".cpp" in bad.reason for bad in share.bad_records)


ODD_MEMBERS = {
    "symbolic link": member("1.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": member("1.jpg", type=tarfile.LNKTYPE, linkname="0.jpg"),
    "character device": member("1.jpg", type=tarfile.CHRTYPE),
    "block device": member("1.jpg", type=tarfile.BLKTYPE),
    "fifo": member("1.jpg", type=tarfile.FIFOTYPE),
    "sparse file of a terabyte": (
        # GNU sparse: its real size stands at byte 483 of the header
        lambda header: header[:483] + b"\x80" + (2**40).to_bytes(11, "big") + header[495:]
    )(member("1.jpg", type=tarfile.GNUTYPE_SPARSE)),
    "the same name twice": member("1.jpg", JPEG) + member("1.jpg", JPEG),
}


@pytest.mark.parametrize("name", ODD_MEMBERS)
def test_members_that_are_no_plain_files_make_their_record_a_bad_one(tmp_path, name):
    odd = ODD_MEMBERS[name]
    odd = odd if "twice" in name else with_checksum(odd)
    tar = whole("0") + odd + member("1.json", GOOD["json"]) + whole("2") + bytes(1024)
    (tmp_path / "a.tar").write_bytes(tar)
    assert outcome(tmp_path) == (["0", "2"], ["member"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.idx", "a.tar", "index.json"]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_very_long_names_are_names(tmp_path, tar_format):
    key = "folder/" * 300 + "x" * 200
    with tarfile.open(tmp_path / "a.tar", "w", format=tar_format) as tar:
        for name, content in GOOD.items():
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert outcome(tmp_path) == ([key], [])


NEGATIVE = with_checksum((lambda header: header[:124] + b"\xff" * 12 + header[136:])(member("1.jpg")))
REFUSED = {  # tars from which no one knows where records begin: refused before training starts
    "no bytes": b"",
    "one byte": b"x",
    "text": b"hello" * 1000,
    "gzip": b"\x1f\x8b" + bytes(2000),
    "cut in a member": (whole("0") + whole("1"))[:-700],
    "cut in a header": whole("0") + member("1.json")[:300],
    "a size that lies": whole("0") + with_checksum(member("1.json", size=10**6)),
    "a size of ten gigabytes": whole("0") + with_checksum(member("1.json", size=10**10)),
    "a negative size": whole("0") + NEGATIVE + whole("2"),
    "garbage between members": whole("0") + b"\xaa" * 512 + whole("1") + bytes(1024),
    "two tars joined": (whole("0") + bytes(1024)) + (whole("1") + bytes(1024)),
    "long names of long names": member("././@LongLink", b"x\0", type=tarfile.GNUTYPE_LONGNAME) * 3000,
}


@pytest.mark.parametrize("name", REFUSED)
def test_shards_that_cannot_be_indexed_are_refused_in_a_sentence(tmp_path, name):
    (tmp_path / "a.tar").write_bytes(REFUSED[name])
    with pytest.raises(ValueError, match=r"a\.tar: not a readable tar \(.*fetch or write it again") as caught:
        read_index(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    "tar", [bytes(1024), bytes(10240), member("photos", type=tarfile.DIRTYPE) + bytes(1024)]
)
def test_a_tar_without_records_has_none(tmp_path, tar):
    (tmp_path / "a.tar").write_bytes(tar)
    assert read_index(tmp_path).num_samples == 0


def test_a_tar_of_one_empty_file_is_one_bad_record(tmp_path):
    (tmp_path / "a.tar").write_bytes(member("0.json") + bytes(1024))
    assert outcome(tmp_path) == ([], ["json"])


def test_damage_after_indexing_is_a_fault_of_the_records_it_hit(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"".join(map(whole, "012345")) + bytes(1024))
    write_index(tmp_path)
    bounds = scan_boundaries(tmp_path / "a.tar")
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[bounds[1] : bounds[1] + 512] = b"\xaa" * 512  # the first header of record 1
    second = content.index(b"3.json")
    content[second : second + 512] = b"\xaa" * 512  # the second header of record 3
    (tmp_path / "a.tar").write_bytes(content)
    assert outcome(tmp_path) == (["0", "2", "4", "5"], ["tar", "tar"])


def test_a_shard_that_vanishes_or_shrinks_during_a_run_gives_bad_records(tmp_path):
    for name in "abcd":
        write_shard(tmp_path / f"{name}.tar", [("0", GOOD)])
    reader = RecordReader(write_index(tmp_path))
    assert [reader(sample).key for sample in (2, 3)] == ["0", "0"]
    for name in "ac":
        (tmp_path / f"{name}.tar").unlink()
    for name in "bd":
        (tmp_path / f"{name}.tar").write_bytes(b"")
    found = keys_or_kinds(reader, range(4))
    assert found == ["shard", "shard", "0", "tar"], "c is still open, though it has no name any more"


def test_a_record_larger_than_memory_is_not_read(tmp_path):
    write_shard(tmp_path / "a.tar", [("0", GOOD)])
    with (tmp_path / "a.tar").open("r+b") as file:
        file.truncate(2**40)  # a hole, which takes no room
    write_sidecar(np.array([[0] + [-1] * 4, [2**40] + [0] * 4]), tmp_path / "a.tar")
    index = read_index(tmp_path / "a.tar")
    with pytest.raises(RecordError, match="more than a record may have"):
        RecordReader(index)(0)


@pytest.mark.parametrize("bounds", [b"", b"x" * 300, [0.0, 1024.0], [0, 2**50], [0, 512, 1024], [0]])
def test_a_sidecar_that_is_damaged_or_of_another_tar_is_rebuilt(tmp_path, bounds):
    write_shard(tmp_path / "a.tar", [("0", GOOD)])
    write_index(tmp_path)
    before = (tmp_path / "a.idx").read_bytes()
    damage_sidecar(tmp_path / "a.idx", bounds)
    assert outcome(tmp_path) == (["0"], [])
    assert ((tmp_path / "a.idx").read_bytes() == before) == (not isinstance(bounds, bytes) or bounds == b"")


@pytest.mark.parametrize(
    "bounds", [[1024, 0, 4096], [-512, 1024, 4096], [2048, 1024, 4096], [0, 2**50, 4096]]
)
def test_byte_positions_that_lead_nowhere_make_bad_records(tmp_path, bounds):
    write_shard(tmp_path / "a.tar", [("0", GOOD), ("1", GOOD)])
    write_index(tmp_path)
    damage_sidecar(tmp_path / "a.idx", bounds)
    reader = RecordReader(read_index(tmp_path))
    assert set(keys_or_kinds(reader, range(2))) <= {"tar", "io"}


def damage_sidecar(path, bounds):
    with path.open("wb") as file:
        if isinstance(bounds, bytes):
            file.write(bounds)
        else:
            np.save(file, np.pad(np.array(bounds)[:, None], ((0, 0), (0, 4))))
