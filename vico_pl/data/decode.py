"""Raw record -> decoded sample: pixels and conversation, or one sentence on why not."""

import json
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import to_dtype

from vico_pl.types import Image, Record, Role, Sample, Turn

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
IMAGE_TOKEN = "<image>"


class RecordError(ValueError):
    """A record that cannot be used; its text is the reason."""


def decode_record(record: Record) -> Sample:
    """Decode the images and the conversation of a record.

    Raises:
        RecordError: the key is a path to elsewhere, JSON or an image is unreadable, roles are out of order,
            or there are not as many `<image>` marks as images.
    """
    _check_key(record.key)
    annotation, names = _parse_annotation(record), _image_names(record)
    turns = parse_conversation(annotation, num_images=len(names))
    images = [_decode_image(name, record.files[name]) for name in names]
    metadata = {key: value for key, value in annotation.items() if key not in ("conversations", "skills")}
    return Sample(id=record.id, images=images, turns=turns, metadata=metadata)


def parse_conversation(annotation: Any, *, num_images: int) -> list[Turn]:
    """Read the turns of a record's JSON.

    Raises:
        RecordError: no conversation, roles out of order, or not as many `<image>` marks as images.
    """
    if not isinstance(annotation, dict) or not isinstance(annotation.get("conversations"), list):
        raise RecordError("JSON has no list 'conversations'")
    turns = _parse_turns(annotation)
    num_marks = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if num_marks != num_images:
        raise RecordError(f"{num_marks} {IMAGE_TOKEN} marks in the conversation but {num_images} images")
    return turns


def read_image(path: Path) -> Image:
    """Read an image file.

    Raises:
        ValueError: there is no such file, or it is no image.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return _decode_image(path.name, path.read_bytes())
    except RecordError as error:
        raise ValueError(f"{path}: {error}; expected a {', '.join(IMAGE_EXTENSIONS)} file") from error


def _check_key(key: str) -> None:
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts:
        raise RecordError(f"key '{key}' is an absolute path or has '..'; keys are names")


def _parse_annotation(record: Record) -> Any:
    if "json" not in record.files:
        raise RecordError(f"no .json member; found {sorted(record.files)}")
    try:
        return json.loads(record.files["json"])
    except (ValueError, RecursionError) as error:
        raise RecordError(f"JSON: {error}") from error


def _parse_turns(annotation: dict[str, Any]) -> list[Turn]:
    conversations, skills = annotation["conversations"], annotation.get("skills") or []
    if not isinstance(skills, list) or not all(isinstance(skill, str | None) for skill in skills):
        raise RecordError("'skills' is no list of names")
    roles: tuple[Role, ...] = get_args(Role)  # human, gpt
    turns = [_parse_turn(entry, index, roles[index % 2]) for index, entry in enumerate(conversations)]
    if len(turns) < 2 or turns[-1].role != "gpt":
        raise RecordError("the conversation must end with an answer of 'gpt'")
    answers = turns[1::2]
    turns[1::2] = [replace(turn, skill=skill) for turn, skill in zip_longest(answers, skills[: len(answers)])]
    return turns


def _parse_turn(entry: Any, index: int, role: Role) -> Turn:
    if not isinstance(entry, dict) or entry.get("from") != role or not isinstance(entry.get("value"), str):
        raise RecordError(f"turn {index}: expected {{'from': '{role}', 'value': text}}")
    text: str = entry["value"]
    if role == "gpt" and IMAGE_TOKEN in text:
        raise RecordError(f"turn {index}: {IMAGE_TOKEN} in an answer; images belong to the turns of 'human'")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RecordError(f"turn {index}: half a surrogate pair, which no UTF-8 text has")
    return Turn(role=role, text=text)


def _image_names(record: Record) -> list[str]:
    """Return image member names in their order: `jpg`, or `0.jpg`, `1.jpg`, ...; none if text-only."""
    names = [name for name in record.files if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS]
    return sorted(names, key=_image_number)


def _image_number(name: str) -> int:
    number = name.partition(".")[0]
    return int(number) if number.isdigit() else 0


def _decode_image(name: str, content: bytes) -> Image:
    try:
        image = decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:  # ValueError: no bytes at all
        reason = str(error).splitlines()[0].split(", ", 2)[-1]  # without the place in torchvision's source
        raise RecordError(f"image '{name}' ({len(content)} bytes): {reason}") from error
    if image.ndim != 3:
        raise RecordError(f"image '{name}': {len(image)} frames, expected one")
    return to_dtype(image, torch.uint8, scale=True)  # PNGs may have 16 bits
