import re
from dataclasses import replace
from itertools import cycle

import pytest
import torch

from tests.support.tiny import encoded_image, record
from vico_pl.data.decode import decode_record, with_caption
from vico_pl.data.module import apply
from vico_pl.types import Turn


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


@pytest.mark.parametrize("name", ["{}.png", "page{}.png", "a-2-{}.png"])
def test_numbered_images_stand_in_the_order_of_their_numbers(name):
    files = {name.format(i): encoded_image("PNG", size=(10 + i, 8)) for i in (10, 2, 0, 1, 11, 9)}
    sample = decode_record(record(text="<image>" * 6, files={"jpg": None, **files}))
    assert [image.shape[2] - 10 for image in sample.images] == [0, 1, 2, 9, 10, 11]


@pytest.mark.parametrize(
    ("changes", "num_images"),
    [
        ({"text": "How many days has a leap year?", "files": {"jpg": None}}, 0),
        ({"files": {"txt": b"x", "npy": b"y", "jpg.md5": b"z"}}, 1),  # other endings are ignored
        ({"video": "a.mp4"}, 1),  # its frames are here
        ({"key": "photos/a..b"}, 1),  # a dotted name is no climb
    ],
)
def test_images_of_a_record_are_its_members_with_their_endings(changes, num_images):
    assert len(decode_record(record(**changes)).images) == num_images


TEXTS = ("<image>a", "b", "c", "d")
CONVERSATION = [{"from": role, "value": text} for role, text in zip(cycle(("human", "gpt")), TEXTS)]


def test_skills_belong_to_answers_in_their_order():
    sample = decode_record(record(conversations=CONVERSATION, skills=["ocr", None]))
    assert [(turn.text, turn.group) for turn in sample.turns] == [
        ("<image>a", None),
        ("b", "ocr"),
        ("c", None),
        ("d", None),
    ]
    without = decode_record(record(conversations=CONVERSATION, skills=None))
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
    found = decode_record(record(conversations=CONVERSATION, **fields)).turns[1::2]
    assert ([turn.metric for turn in found], [turn.answers for turn in found]) == (metrics, answers)


def test_the_accepted_answers_to_a_single_question_need_no_outer_list():
    (_, answer) = decode_record(record(metrics="vqa", answers=["net", "net", "nets"])).turns
    assert answer.answers == ("net", "net", "nets")


def test_a_reason_that_quotes_a_whole_record_is_cut():
    broken = record(files={"json": None, **{f"{'x' * 1000}{i}": b"" for i in range(200)}})
    ((_, found),) = apply([(0, broken)], function=decode_record)
    assert found.reason.startswith("no .json member; found ['jpg', 'xxx")
    assert re.search(r"x\.\.\. \(2\d{5} characters\)$", found.reason)
    assert len(found.reason) < 600


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
    with pytest.raises(ValueError, match=reason):
        decode_record(with_caption(record(files=files), prompt))
