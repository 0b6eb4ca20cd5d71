"""Shards from the parquet files of data sets on the Hub."""

import json
import re

import pytest
from typer.testing import CliRunner

from tests.support.tiny import encoded_image
from vico_pl.data.shards.build import build_from_annotations
from vico_pl.data.shards.reader import RecordReader, find_faults, read_samples
from vico_pl.shards_cli import shards

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
PNG, JPEG = encoded_image("PNG", size=(40, 30), seed=1), encoded_image(size=(20, 50), seed=2)


def image(content):
    return {"bytes": content, "path": None}


def onevision(number, *, picture=PNG, text="<image>\nWhat?", answer="a cat"):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    picture = None if picture is None else image(picture)
    return {"id": f"row-{number}", "image": picture, "conversations": turns, "data_source": "chart"}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return path


def test_llava_onevision_comes_back_as_it_was(tmp_path):
    rows = [onevision(0), onevision(1, picture=None, text="Who?"), onevision(2, picture=JPEG, text="Where?")]
    index, faults = build_from_annotations([write(tmp_path / "a.parquet", rows)], tmp_path, tmp_path / "out")
    assert (index.num_samples, faults) == (3, [])
    first, none, unmarked = read_samples(tmp_path / "out")
    assert first.metadata == {"id": "row-0", "data_source": "chart", "source": "chart"}
    assert [sample.turns[0].text for sample in (first, none, unmarked)] == [
        "<image>\nWhat?",
        "Who?",
        "<image>\nWhere?",
    ]
    assert [[tuple(i.shape[1:]) for i in s.images] for s in (first, none, unmarked)] == [
        [(30, 40)],
        [],
        [(50, 20)],
    ]
    assert (RecordReader(index)(0).files["png"], RecordReader(index)(2).files["jpg"]) == (PNG, JPEG), "copied"


def test_the_cauldron_comes_back_as_it_was(tmp_path):
    texts = [{"user": f"Q{i}?", "assistant": f"A{i}.", "source": "VQAv2"} for i in range(2)]
    rows = [{"images": [image(PNG), image(JPEG)], "texts": texts}]
    build_from_annotations([write(tmp_path / "a.parquet", rows)], tmp_path, tmp_path / "out")
    (sample,) = read_samples(tmp_path / "out")
    assert [turn.text for turn in sample.turns] == ["<image>\n<image>\nQ0?", "A0.", "Q1?", "A1."]
    assert [tuple(i.shape[1:]) for i in sample.images] == [(30, 40), (50, 20)]
    assert sample.metadata == {"source": "VQAv2"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (onevision(0, text="<image><image>"), "2 <image> marks in the conversation but 1 images"),
        (onevision(0, answer=None), "turn 1: expected"),
        (
            {"image": image(PNG), "caption": "a cat"},
            "columns image, caption: expected 'conv",
        ),
        ({"image": "no base64!", "conversations": []}, "image is not base64"),
        ({"image": 7, "conversations": []}, "image is neither bytes nor base64"),
        ({"image": None, "conversations": []}, "the conversation must end with an answer"),
    ],
)
def test_a_bad_row_is_named_and_left_out(tmp_path, row, reason):
    bad, good = write(tmp_path / "bad.parquet", [row]), write(tmp_path / "good.parquet", [onevision(1)])
    index, faults = build_from_annotations([bad, good], tmp_path, tmp_path / "out")
    assert [fault.id for fault in faults] == ["bad.parquet[0, 0]"]
    assert reason in faults[0].reason
    assert (index.num_samples, list(find_faults(index))) == (1, [])
    with pytest.raises(
        ValueError, match=r"bad\.parquet: no usable line; the first fault: " + re.escape(reason)[:20]
    ):
        build_from_annotations([bad], tmp_path, tmp_path / "none")


def test_the_command_takes_a_folder_and_its_bytes_do_not_depend_on_the_workers(tmp_path):
    rows = [onevision(i, picture=(PNG, JPEG)[i % 2]) for i in range(10)]
    write(tmp_path / "hub" / "a" / "train-0.parquet", rows[:7])
    write(tmp_path / "hub" / "b" / "train-0.parquet", rows[7:])
    for workers in (1, 3):
        output = tmp_path / str(workers) / "set"
        asked = ["build", "--annotations", tmp_path / "hub", "--output", output]
        done = CliRunner().invoke(
            shards, [str(a) for a in (*asked, "--samples-per-shard", 4, "--workers", workers)]
        )
        assert "10 samples in 3 shards" in done.output
    one, three = ({p.name: p.read_bytes() for p in (tmp_path / n / "set").iterdir()} for n in ("1", "3"))
    assert one == three
    assert [s.metadata["id"] for s in read_samples(tmp_path / "1" / "set")] == [f"row-{i}" for i in range(10)]


def test_json_and_parquet_follow_each_other(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.jsonl").write_text(json.dumps({**onevision(1), "image": "a.png"}))
    table = write(tmp_path / "a.parquet", [onevision(0)])
    build_from_annotations([table, tmp_path / "b.jsonl"], tmp_path, tmp_path / "out")
    assert [sample.metadata["id"] for sample in read_samples(tmp_path / "out")] == ["row-0", "row-1"]


@pytest.mark.parametrize("content", [None, b"", b"PAR1 and more PAR1"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet: no(t readable as parquet| such file)"):
        build_from_annotations([tmp_path / "a.parquet"], tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
