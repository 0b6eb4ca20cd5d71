import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.tiny import encoded_image, record
from vico_pl.data.decode import decode_record, with_caption
from vico_pl.data.module import apply
from vico_pl.errors import RecordError
from vico_pl.types import BadRecord, Sample, Turn


def reason(broken):
    with pytest.raises(RecordError) as caught:
        decode_record(broken)
    return str(caught.value)


def with_json(**annotation):
    return record(files={"json": json.dumps(annotation).encode()})


def turns(*pairs):
    return [{"from": role, "value": value} for role, value in pairs]


@pytest.mark.parametrize(("extension", "image_format"), [("jpg", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG")])
def test_a_record_becomes_pixels_and_turns(extension, image_format):
    image = encoded_image(image_format, size=(40, 30))
    sample = decode_record(record(files={"jpg": None, extension: image}, skills=["ocr"], source="web"))
    assert sample.id == "train-000000.tar/000000"
    assert [(image.shape, image.dtype) for image in sample.images] == [((3, 30, 40), torch.uint8)]
    assert sample.turns == [
        Turn(role="human", text="<image>\nWhat is it?"),
        Turn(role="gpt", text="a cat", group="ocr"),
    ]
    assert sample.metadata == {"source": "web"}


@pytest.mark.parametrize(("image_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_pixels_are_those_that_were_drawn(tmp_path, image_format, options):
    image = encoded_image(image_format, size=(13, 9), seed=5, **options)
    (tmp_path / "x").write_bytes(image)
    expected = np.asarray(Image.open(tmp_path / "x").convert("RGB")).transpose(2, 0, 1)
    sample = decode_record(record(files={"jpg": None, image_format.lower(): image}))
    assert np.array_equal(sample.images[0].numpy(), expected)


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "1"])
def test_every_kind_of_png_has_three_channels(tmp_path, mode):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert(mode).save(tmp_path / "x.png")
    sample = decode_record(record(files={"jpg": None, "png": (tmp_path / "x.png").read_bytes()}))
    assert sample.images[0].shape == (3, 8, 8)


def test_a_png_of_sixteen_bits_keeps_its_brightness(tmp_path):
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    sample = decode_record(record(files={"jpg": None, "png": (tmp_path / "x.png").read_bytes()}))
    assert sample.images[0].dtype == torch.uint8
    assert sample.images[0][0, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("name", ["{}.png", "page{}.png", "a-2-{}.png"])
def test_numbered_images_stand_in_the_order_of_their_numbers(name):
    files = {name.format(i): encoded_image("PNG", size=(10 + i, 8)) for i in (10, 2, 0, 1, 11, 9)}
    sample = decode_record(record(text="<image>" * 6, files={"jpg": None, **files}))
    assert [image.shape[2] - 10 for image in sample.images] == [0, 1, 2, 9, 10, 11]


def test_a_record_of_text_alone_has_no_images():
    assert decode_record(record(text="How many days has a leap year?", files={"jpg": None})).images == []


def test_members_with_other_endings_are_ignored():
    sample = decode_record(record(files={"txt": b"x", "npy": b"y", "jpg.md5": b"z"}))
    assert len(sample.images) == 1


def test_skills_belong_to_answers_in_their_order():
    conversation = turns(("human", "<image>a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))
    sample = decode_record(record(conversations=conversation, skills=["ocr", None]))
    assert [(turn.text, turn.group) for turn in sample.turns] == [
        ("<image>a", None),
        ("b", "ocr"),
        ("c", None),
        ("d", None),
    ]
    without = decode_record(record(conversations=conversation, skills=None))
    assert [turn.group for turn in without.turns] == [None] * 4


@pytest.mark.parametrize(
    ("fields", "metrics", "answers"),
    [
        ({}, [None, None], [(), ()]),
        ({"metrics": "anls"}, ["anls", "anls"], [(), ()]),
        ({"metrics": ["f1", None], "answers": [["b", "B"], ["d"]]}, ["f1", None], [("b", "B"), ("d",)]),
        ({"metrics": {"clip": 0.3}, "answers": {"a": 1}}, [None, None], [(), ()]),  # of another tool
        ({"answers": ["b", "d"]}, [None, None], [(), ()]),
    ],
)
def test_metrics_and_accepted_answers_belong_to_answers_in_their_order(fields, metrics, answers):
    conversation = turns(("human", "<image>a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))
    found = decode_record(record(conversations=conversation, **fields)).turns[1::2]
    assert ([turn.metric for turn in found], [turn.answers for turn in found]) == (metrics, answers)


def test_the_accepted_answers_to_a_single_question_need_no_outer_list():
    (_, answer) = decode_record(record(metrics="vqa", answers=["net", "net", "nets"])).turns
    assert answer.answers == ("net", "net", "nets")


JPEG, PNG = encoded_image("JPEG", size=(200, 150)), encoded_image("PNG", size=(200, 150))
PAIR = turns(("human", "<image>\nq"), ("gpt", "a"))
FAULTS = {
    "no JSON": (record(files={"json": None}), "no .json member; found ['jpg']"),
    "bad JSON": (record(files={"json": b'{"conversations": ['}), "JSON: Expecting value"),
    "not UTF-8": (record(files={"json": b'{"a": "\xff"}'}), "JSON: 'utf-8' codec can't decode"),
    "bottomless JSON": (record(files={"json": b"[" * 100_000}), "JSON: "),
    "a JSON list": (record(files={"json": b"[]"}), "JSON has no list 'conversations'"),
    "no conversations": (with_json(messages=PAIR), "JSON has no list 'conversations'"),
    "conversations of no turn": (with_json(conversations=[]), "must end with an answer of 'gpt'"),
    "a question alone": (with_json(conversations=PAIR[:1]), "must end with an answer of 'gpt'"),
    "no answer at the end": (with_json(conversations=[*PAIR, PAIR[0]]), "must end with an answer of 'gpt'"),
    "an answer first": (
        with_json(conversations=PAIR[::-1]),
        "turn 0: expected {'from': 'human', 'value': text}",
    ),
    "two questions": (
        with_json(conversations=[PAIR[0], *PAIR]),
        "turn 1: expected {'from': 'gpt', 'value': text}",
    ),
    "another role": (with_json(conversations=turns(("system", "x"), ("gpt", "a"))), "turn 0: expected"),
    "no text": (with_json(conversations=[PAIR[0], {"from": "gpt", "value": 3}]), "turn 1: expected"),
    "a turn of text": (with_json(conversations=["q", "a"]), "turn 0: expected"),
    "half a surrogate pair": (record(answer="\ud83d"), "turn 1: half a surrogate pair"),
    "a mark in an answer": (record(answer="<image>"), "turn 1: <image> in an answer"),
    "a mark too few": (record(text="q"), "0 <image> marks in the conversation but 1 images"),
    "a mark without image": (record(files={"jpg": None}), "1 <image> marks in the conversation but 0 images"),
    "skills of another kind": (record(skills="ocr"), "'skills' is no list of names"),
    "more skills than answers": (record(skills=["ocr", "ocr"]), "'skills' has 2 entries for 1 answers"),
    "a skill that is no name": (record(skills=[["ocr"]]), "'skills' is no list of names"),
    "metrics that are no names": (record(metrics=[1]), "'metrics' is no list of names"),
    "too few accepted answers": (
        record(metrics="f1", answers=[["a"], ["b"]]),
        "'answers' is no list with the accepted answers to each question",
    ),
    "not an image": (record(files={"jpg": b"hello"}), "image 'jpg' (5 bytes): neither JPEG, PNG"),
    "an empty image": (record(files={"jpg": b""}), "image 'jpg' (0 bytes): "),
    "a truncated JPEG": (record(files={"jpg": JPEG[: len(JPEG) // 2]}), "incomplete or truncated"),
    "a truncated PNG": (
        record(files={"jpg": PNG[: len(PNG) // 2]}),
        f"image 'jpg' ({len(PNG) // 2} bytes): ",
    ),
    "a video": (
        record(files={"jpg": None, "mp4": b"x"}, text="q"),
        "member 'mp4' is a video; expected images",
    ),
    "a video elsewhere": (
        record(files={"jpg": None}, text="q", video="a.mp4"),
        "JSON has a 'video'; expected images",
    ),
    "a moving image": (
        record(
            files={"jpg": encoded_image("GIF", save_all=True, append_images=[Image.new("P", (40, 30), 3)])}
        ),
        "several frames, expected one",
    ),
    "a key that climbs": (
        record(key="../../etc/passwd"),
        "key '../../etc/passwd' is an absolute path or has '..'",
    ),
    "a key inside out": (record(key="a/../../b"), "key 'a/../../b' is an absolute path or has '..'"),
    "an absolute key": (record(key="/etc/passwd"), "key '/etc/passwd' is an absolute path or has '..'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported_in_one_sentence(name):
    broken, expected = FAULTS[name]
    message = reason(broken)
    assert expected in message
    assert "\n" not in message
    assert ".cpp" not in message


def test_bad_records_keep_their_places_and_the_others_go_through():
    broken = [record(key="b", files={"json": b"{"}), record(key="d", answer="<image>")]
    good = [record(key="a"), record(key="c"), record(key="e")]
    stream = [good[0], broken[0], good[1], BadRecord(id="earlier", reason="unreadable"), broken[1], good[2]]
    positions, found = zip(*apply(enumerate(stream, start=40), function=decode_record), strict=True)
    assert positions == (40, 41, 42, 43, 44, 45)
    assert [type(item) for item in found] == [Sample, BadRecord, Sample, BadRecord, BadRecord, Sample]
    assert [item.id.rpartition("/")[2] for item in found] == ["a", "b", "c", "earlier", "d", "e"]
    assert found[1].reason.startswith("JSON: ")


def test_a_reason_that_quotes_a_whole_record_is_cut():
    broken = record(files={"json": None, **{f"{'x' * 1000}{i}": b"" for i in range(200)}})
    ((_, found),) = apply([(0, broken)], function=decode_record)
    assert found.reason.startswith("no .json member; found ['jpg', 'xxx")
    assert re.search(r"x\.\.\. \(2\d{5} characters\)$", found.reason)
    assert len(found.reason) < 600


def test_a_dotted_name_inside_a_key_is_no_climb():
    assert decode_record(record(key="photos/a..b")).id.endswith("photos/a..b")


def test_frames_of_a_video_are_images():
    assert len(decode_record(record(video="a.mp4")).images) == 1


PROMPT = "Describe the image."


def test_a_caption_is_the_answer_to_the_prompt():
    files = {"txt": " une étoile\n".encode(), "json": b'{"url": "https://host/a.jpg", "width": 40}'}
    sample = decode_record(with_caption(record(files=files), PROMPT))
    assert [turn.text for turn in sample.turns] == [f"<image>\n{PROMPT}", "une étoile"]
    assert sample.metadata == {"url": "https://host/a.jpg", "width": 40}
    assert len(sample.images) == 1
    alone = replace(record(), files={"0.jpg": encoded_image(), "1.png": encoded_image("PNG"), "txt": b"two"})
    assert decode_record(with_caption(alone, PROMPT)).turns[0].text == f"<image>\n<image>\n{PROMPT}"


def test_a_conversation_is_not_replaced_by_a_caption():
    both = record(files={"txt": b"a caption"})
    assert with_caption(both, PROMPT) is both
    assert with_caption(record(), PROMPT).files == record().files


@pytest.mark.parametrize(
    ("files", "prompt", "reason"),
    [
        ({"txt": b"a star", "json": b'{"url": ""}'}, None, "JSON has no list 'conversations'"),
        ({"txt": b"\xff", "json": b"{}"}, PROMPT, "half a surrogate pair"),
        ({"txt": b"an <image>", "json": b"{}"}, PROMPT, "<image> in an answer"),
        ({"txt": b"a star", "json": b"{"}, PROMPT, "JSON: "),
        ({"txt": b"a star", "json": b"[1]"}, PROMPT, "JSON has no list 'conversations'"),
        ({"json": b'{"caption": "a star"}'}, PROMPT, "JSON has no list 'conversations'"),
    ],
)
def test_a_caption_that_cannot_be_read_is_a_bad_record(files, prompt, reason):
    with pytest.raises(RecordError, match=reason):
        decode_record(with_caption(record(files=files), prompt))
