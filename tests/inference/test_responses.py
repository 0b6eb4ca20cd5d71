"""A set of shards whose responses are the model's own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.folders import tree, write_model_folder
from tests.support.tiny import encoded_image
from vico_pl.data.chat import ChatEncoder
from vico_pl.data.decode import decode_record
from vico_pl.data.shards.reader import RecordReader, find_faults, read_index, write_index, write_shard
from vico_pl.data.tiling import tile_sample
from vico_pl.inference.predictor import Predictor
from vico_pl.inference.responses import LOG_NAME, generate_responses

MAX_NEW = 6


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return Predictor.load(write_model_folder(tmp_path_factory.mktemp("responses") / "model", threshold=0.5))


def photo(seed, size=(64, 32)):
    return encoded_image("PNG", size=size, seed=seed)


def annotation(*texts, **fields):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return json.dumps({"conversations": turns, **fields}).encode()


def sources():
    """Records with one question, several, several images that come one by one, text only, and bad ones."""
    two = annotation("<image>\nWhat is A?", "x", "And B?", "y", skills=["ocr", None], license="MIT", id=7)
    one_by_one = annotation("<image>\nWhat is it?", "x", "And this?\n<image>", "y")
    return [
        [
            ("a", {"png": photo(1), "json": annotation("Who?\n<image>", "nobody")}),
            ("b", {"png": photo(2), "json": two, "txt": b"untouched"}),
            ("cut", {"png": b"no image", "json": annotation("<image>", "x")}),
            ("c", {"0.png": photo(3), "1.png": photo(4, (32, 64)), "json": one_by_one}),
        ],
        [
            ("long", {"json": annotation("What? " * 300, "x")}),
            ("d", {"json": annotation("Who are you?", "x", "Why?", "y", "What is A?", "z")}),
            ("e", {"png": photo(5), "json": annotation("<image>", "x")}),
        ],
    ]


@pytest.fixture
def source(tmp_path):
    for number, records in enumerate(sources()):
        write_shard(tmp_path / "source" / f"source-{number:06d}.tar", records)
    write_index(tmp_path / "source")
    return tmp_path / "source"


def records_of(folder):
    index = read_index(folder)
    reader = RecordReader(index)
    return {record.key: record for record in map(reader, range(index.num_samples))}


def conversation(record):
    return [turn["value"] for turn in json.loads(record.files["json"])["conversations"]]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_answer_is_what_the_model_says_after_its_own_earlier_answers(
    predictor, source, tmp_path, batch_size
):
    size = {"batch_size": batch_size, "samples_per_shard": 3}
    written, bad = generate_responses(predictor, source, tmp_path / "own", max_new_tokens=MAX_NEW, **size)
    assert (written.num_samples, written.shard_sizes) == (5, [2, 1, 2])
    assert [one.id for one in bad] == ["source-000000.tar/cut", "source-000001.tar/long"]
    assert bad[0].reason.startswith("image 'png' (8 bytes)")
    assert "tokens at full vision tokens" in bad[1].reason
    before, after = records_of(source), records_of(tmp_path / "own")
    for key, record in after.items():
        expected = []
        for question in conversation(before[key])[::2]:
            expected.append(question)
            marks = sum(text.count("<image>") for text in expected)
            images = [record.files[name] for name in sorted(record.files) if name.endswith("png")]
            if marks == len(images):  # images that come later would be cut into other tiles
                (answer,) = predictor.generate([images], [expected], max_new_tokens=MAX_NEW)
                expected.append(answer.text)
            else:
                expected.append(conversation(record)[len(expected)])
        assert conversation(record) == expected


def test_all_but_the_answers_is_kept_byte_for_byte_and_the_set_can_be_trained_on(predictor, source, tmp_path):
    generate_responses(predictor, source, tmp_path / "own", max_new_tokens=MAX_NEW)
    before, after = records_of(source), records_of(tmp_path / "own")
    for key, record in after.items():
        assert {**record.files, "json": b""} == {**before[key].files, "json": b""}
        old, new = (json.loads(one.files["json"]) for one in (before[key], record))
        assert {**old, "conversations": 0} == {**new, "conversations": 0}
        assert conversation(before[key])[::2] == conversation(record)[::2]
        sample = tile_sample(decode_record(record), predictor.tiling)
        encoder = ChatEncoder(predictor.tokenizer, full_tokens_per_tile=4)
        assert encoder.encode(sample).response_mask.sum() >= len(sample.turns) // 2
    assert after["b"].files["txt"] == b"untouched"
    assert list(find_faults(read_index(tmp_path / "own"))) == []


def test_a_prompt_is_asked_of_images_without_questions(predictor, tmp_path):
    records = [
        ("a", {"png": photo(1)}),
        ("b", {"0.png": photo(2), "1.png": photo(3), "json": b'{"url": "x", "skills": ["ocr"]}'}),
        ("c", {"png": photo(4), "json": annotation("<image>\nOld?", "x", "More?", "y")}),
        ("d", {"png": photo(5), "json": b"[1]"}),
        ("e", {"png": photo(5), "json": b"{"}),
    ]
    write_shard(tmp_path / "images" / "images-000000.tar", records)
    settings = {"prompt": "Describe it.", "max_new_tokens": MAX_NEW}
    _, bad = generate_responses(predictor, tmp_path / "images", tmp_path / "own", **settings)
    assert [(one.kind, one.reason[:5]) for one in bad] == [("json", "JSON:")]
    after = records_of(tmp_path / "own")
    assert list(after) == ["a", "b", "c", "d"]
    (answer,) = predictor.generate(photo(1), "Describe it.", max_new_tokens=MAX_NEW)
    assert conversation(after["a"]) == ["<image>\nDescribe it.", answer.text]
    (answer,) = predictor.generate([[photo(2), photo(3)]], ["Describe it."], max_new_tokens=MAX_NEW)
    assert conversation(after["b"]) == ["<image>\n<image>\nDescribe it.", answer.text]
    assert set(json.loads(after["b"].files["json"])) == {"url", "conversations"}
    assert len(conversation(after["c"])) == 2
    assert len(list(map(decode_record, after.values()))) == 4


def test_an_answer_with_an_image_mark_is_a_bad_record(predictor, source, tmp_path, monkeypatch):
    monkeypatch.setattr(type(predictor.tokenizer), "decode", lambda *_, **__: "an <image>")
    with pytest.raises(ValueError, match="no usable record; the first fault: image 'png'"):
        generate_responses(predictor, source, tmp_path / "own", max_new_tokens=2)
    lines = (tmp_path / "own" / LOG_NAME).read_text().splitlines()
    assert sum("<image> in an answer of the model" in line for line in lines) == 5


def test_a_set_of_other_settings_is_refused_and_the_same_is_returned(predictor, source, tmp_path):
    settings = {"max_new_tokens": 2}
    first = generate_responses(predictor, source, tmp_path / "own", **settings)
    before = tree(tmp_path / "own")
    again = generate_responses(predictor, source, tmp_path / "own", **settings)
    assert (again[0].entries, again[1]) == (first[0].entries, first[1])
    for change in ({"max_new_tokens": 5}, {"prompt": "Why?"}, {"temperature": 0.5}):
        with pytest.raises(ValueError, match="already holds a set of other annotations, images or settings"):
            generate_responses(predictor, source, tmp_path / "own", **{**settings, **change})
    with pytest.raises(ValueError, match=r"source: holds tars but no build\.json, so another set"):
        generate_responses(predictor, tmp_path / "own", source, **settings)
    assert tree(tmp_path / "own") == before


def test_a_killed_command_is_completed_by_the_same(predictor, tmp_path):
    records = [(f"{i:03d}", {"png": photo(i), "json": annotation("<image>\nA?", "x")}) for i in range(60)]
    records[3] = ("003", {"png": b"no image", "json": annotation("<image>", "x")})
    write_shard(tmp_path / "source" / "source-000000.tar", records)
    settings = {"max_new_tokens": 2, "batch_size": 2, "samples_per_shard": 10}
    generate_responses(predictor, tmp_path / "source", tmp_path / "whole" / "own", **settings)
    output = tmp_path / "own"
    command = [sys.executable, "-m", "vico_pl", "generate", predictor.folder, "--data", tmp_path / "source"]
    command += ["--output", output, "--max-new-tokens=2", "--batch-size=2", "--samples-per-shard=10"]
    first = output / "own-000001.idx"
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE) as process:
        while not first.exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    assert not (output / "index.json").exists()
    written, bad = generate_responses(predictor, tmp_path / "source", output, **settings)
    assert (written.num_samples, [one.id for one in bad]) == (59, ["source-000000.tar/003"])
    assert all(path.stat().st_mtime_ns == modified for path, modified in kept.items())
    expected = {path.name: content for path, content in tree(tmp_path / "whole" / "own").items()}
    assert {path.name: content for path, content in tree(output).items()} == expected
