"""Raw record -> decoded sample: pixels and conversation, or one sentence on why not."""

import json
from typing import Any

import torch
from torchvision.io import ImageReadMode, decode_image

from vico_pl.types import Image, Record, Sample, Turn

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
IMAGE_TOKEN = "<image>"


class RecordError(ValueError):
    """A record that cannot be used; its text is the reason."""


def decode_record(record: Record) -> Sample:
    """Decode the images and the conversation of a record.

    Raises:
        RecordError: JSON or image unreadable, roles out of order, or as many `<image>` marks as images not met.
    """
    annotation = _parse_annotation(record)
    turns = _parse_turns(annotation)
    images = [_decode_image(name, record.files[name]) for name in _image_names(record)]
    num_marks = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if num_marks != len(images):
        raise RecordError(f"{num_marks} {IMAGE_TOKEN} marks in the conversation but {len(images)} images")
    metadata = {key: value for key, value in annotation.items() if key not in ("conversations", "skills")}
    return Sample(id=record.id, images=images, turns=turns, metadata=metadata)


def _parse_annotation(record: Record) -> dict[str, Any]:
    if "json" not in record.files:
        raise RecordError(f"no .json member; found {sorted(record.files)}")
    try:
        annotation = json.loads(record.files["json"])
    except ValueError as error:
        raise RecordError(f"JSON: {error}") from error
    if not isinstance(annotation, dict) or not isinstance(annotation.get("conversations"), list):
        raise RecordError("JSON has no list 'conversations'")
    return annotation


def _parse_turns(annotation: dict[str, Any]) -> list[Turn]:
    conversations = annotation["conversations"]
    skills = iter(annotation.get("skills", []))
    turns = []
    for index, entry in enumerate(conversations):
        role = "human" if index % 2 == 0 else "gpt"
        if not isinstance(entry, dict) or entry.get("from") != role or not isinstance(entry.get("value"), str):
            raise RecordError(f"turn {index}: expected {{'from': '{role}', 'value': text}}")
        turns.append(Turn(role=role, text=entry["value"], skill=next(skills, None) if role == "gpt" else None))
    if len(turns) < 2 or turns[-1].role != "gpt":
        raise RecordError("the conversation must end with an answer of 'gpt'")
    return turns


def _image_names(record: Record) -> list[str]:
    """Return image member names in their order: `jpg`, or `0.jpg`, `1.jpg`, ...; none for text-only samples."""
    names = [name for name in record.files if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS]
    return sorted(names, key=_image_number)


def _image_number(name: str) -> int:
    number = name.partition(".")[0]
    return int(number) if number.isdigit() else 0


def _decode_image(name: str, content: bytes) -> Image:
    try:
        return decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RecordError(f"image '{name}' ({len(content)} bytes): {reason}") from error
