"""Raw record -> decoded sample: pixels and conversation, or one sentence on why not."""

import gc
import io
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.PngImagePlugin
import torch
from torchvision.io import ImageReadMode, decode_image

from vico_pl.errors import RecordError, check_settings
from vico_pl.types import BadRecord, Content, Image, Record, Role, Sample, Turn

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
IMAGE_TOKEN = "<image>"
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")  # recognised by their content, whatever the member is called
VIDEO_EXTENSIONS = ("mp4", "avi", "mov", "mkv", "webm", "m4v", "mpg", "mpeg")
_MAX_REASON = 500  # characters
_MAX_SCANS = 100  # of a JPEG: about 10 are usual, and thousands in a few kilobytes take minutes to decode
_PILLOW_MAX_PIXELS = 178_956_970  # Pillow itself opens nothing above


# Long texts, such as the workflow of an image generator, are no fault of an image; together 64 MiB at most.
PIL.PngImagePlugin.MAX_TEXT_CHUNK = PIL.PngImagePlugin.MAX_TEXT_MEMORY


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """Limits of an image, checked in its header before a pixel is decoded.

    Twelve tiles of 448 px use 2.4 million pixels. 100 million are the largest cameras and a page scanned at
    1000 dpi, and 300 MB as RGB in each worker.
    """

    max_pixels: int = 100_000_000  # width times height, at most Pillow's 178,956,970
    max_bytes: int = 2**27  # of the file: 128 MiB
    min_side: int = 1  # px

    def __post_init__(self) -> None:
        limit = f"1 to {_PILLOW_MAX_PIXELS}, above which Pillow opens none"
        check_settings(
            "data.images",
            self,
            max_pixels=(1 <= self.max_pixels <= _PILLOW_MAX_PIXELS, limit),
            max_bytes=(self.max_bytes >= 1, "1 or more"),
            min_side=(self.min_side >= 1, "1 or more"),
        )


DEFAULT_LIMITS = ImageLimits()
_FIELDS = ("conversations", "skills", "metrics", "answers")  # of a record's JSON; all others are metadata
_NUMBER = re.compile(r"[0-9]{1,9}")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_bad_conversation = partial(RecordError, kind="conversation")
_bad_image = partial(RecordError, kind="image")
_over_limit = partial(RecordError, kind="image_limit")


def bad_record(name: str, error: RecordError) -> BadRecord:
    """Return what is left of a record; a reason that quotes much of it is cut."""
    reason = str(error)
    if len(reason) > _MAX_REASON:
        reason = f"{reason[:_MAX_REASON]}... ({len(reason)} characters)"
    return BadRecord(id=name, reason=printable(reason), kind=error.kind or "other")


def decode_record(record: Record, limits: ImageLimits = DEFAULT_LIMITS) -> Sample:
    """Decode the images and the conversation of a record.

    Raises:
        RecordError: the key is a path to elsewhere, JSON or an image is unreadable, an image exceeds the
            limits, roles are out of order, there are not as many `<image>` marks as images, or a video.
    """
    _check_key(record.key)
    endings = {name: name.rpartition(".")[2].lower() for name in record.files}
    for name, ending in endings.items():
        if ending in VIDEO_EXTENSIONS:
            raise RecordError(f"member '{name}' is a video; expected images: give its frames", kind="member")
    annotation = parse_annotation(record)
    images = sort_images(name for name, ending in endings.items() if ending in IMAGE_EXTENSIONS)
    turns = parse_conversation(annotation, num_images=len(images))
    return Sample(
        id=record.id,
        images=[decode_content(name, record.files[name], limits) for name in images],
        turns=turns,
        metadata={key: value for key, value in annotation.items() if key not in _FIELDS},
    )


def with_caption(record: Record, prompt: str | None) -> Record:
    """Make a caption (`KEY.txt` of img2dataset) the answer to `prompt`; a conversation stays as it is.

    Raises:
        RecordError: there is JSON, but unreadable.
    """
    if prompt is None or "txt" not in record.files:
        return record
    entry = parse_annotation(record) if "json" in record.files else {}
    if not isinstance(entry, dict) or "conversations" in entry:
        return record
    endings = [name.rpartition(".")[2] for name in record.files]
    question = f"{IMAGE_TOKEN}\n" * sum(ending in IMAGE_EXTENSIONS for ending in endings) + prompt
    caption = bytes(record.files["txt"]).decode(errors="surrogateescape").strip()  # no UTF-8: a bad record
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
    content = json.dumps({**entry, "conversations": turns}).encode()
    return replace(record, files={**record.files, "json": content})


def parse_conversation(annotation: Any, *, num_images: int) -> list[Turn]:
    """Read the turns of a record's JSON.

    Raises:
        RecordError: no conversation, roles out of order, or not as many `<image>` marks as images.
    """
    if not isinstance(annotation, dict) or not isinstance(annotation.get("conversations"), list):
        raise _bad_conversation("JSON has no list 'conversations'")
    if not num_images and (annotation.get("video") or annotation.get("videos")):  # else its frames are there
        raise _bad_conversation("JSON has a 'video'; expected images: give its frames as images")
    turns = _parse_turns(annotation)
    marks = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if marks != num_images:
        reason = f"{marks} {IMAGE_TOKEN} marks in the conversation but {num_images} images"
        raise RecordError(reason, kind="marks")
    return turns


@contextmanager
def parsing() -> Iterator[None]:
    """Parse JSON without garbage collection, whose finalizers find no stack left when it nests too deep.

    Raises:
        ValueError: it nests too deep.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    except RecursionError as error:
        raise ValueError(str(error)) from error
    finally:
        if was_enabled:
            gc.enable()


def read_image(path: Path) -> Image:
    """Read an image file.

    Raises:
        ValueError: there is no such file, or it is no image.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return decode_content(path.name, path.read_bytes(), DEFAULT_LIMITS)
    except RecordError as error:
        raise ValueError(f"{path}: {error}; expected a {', '.join(IMAGE_EXTENSIONS)} file") from error


def sort_images(names: Iterable[str]) -> list[str]:
    """Return image members by number; those whose names differ in more than numbers stay as they are.

    >>> sort_images(["10.jpg", "2.jpg"]), sort_images(["page1.png", "page10.png", "page2.png"])
    (['2.jpg', '10.jpg'], ['page1.png', 'page2.png', 'page10.png'])
    >>> sort_images(["left2.jpg", "right1.jpg"])
    ['left2.jpg', 'right1.jpg']
    """
    stems = {name: name.rpartition(".")[0] for name in names}
    if len({_NUMBER.sub("", stem) for stem in stems.values()}) > 1:
        first = {name: stem.partition(".")[0] for name, stem in stems.items()}
        stems = {name: part if part.isdecimal() else "" for name, part in first.items()}
    return sorted(stems, key=lambda name: [int(number) for number in _NUMBER.findall(stems[name])] or [0])


def printable(text: str) -> str:
    """Escape control characters and invalid UTF-8: a name must not forge a line of a log."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", lambda character: ascii(character[0])[1:-1], text)


def _check_key(key: str) -> None:
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts:
        raise RecordError(f"key '{key}' is an absolute path or has '..'; keys are names", kind="key")
    if printable(key) != key:
        raise RecordError(f"key '{key}' has control characters or is no UTF-8", kind="key")


def parse_annotation(record: Record) -> Any:
    """Return the content of a record's JSON."""
    if "json" not in record.files:
        raise RecordError(f"no .json member; found {sorted(record.files)}", kind="json")
    try:
        with parsing():
            return json.loads(bytes(record.files["json"]))
    except ValueError as error:
        raise RecordError(f"JSON: {error}", kind="json") from error


def _parse_turns(annotation: dict[str, Any]) -> list[Turn]:
    roles: tuple[Role, ...] = get_args(Role)  # human, gpt
    conversation = enumerate(annotation["conversations"])
    turns = [_parse_turn(entry, index, roles[index % 2]) for index, entry in conversation]
    if not turns or turns[-1].role != "gpt":
        raise _bad_conversation("the conversation must end with an answer of 'gpt'")
    count, metrics = len(turns) // 2, annotation.get("metrics")
    if isinstance(metrics, dict):  # another tool's
        metrics = None
    columns = zip(
        _names("skills", annotation.get("skills"), count),
        _names("metrics", [metrics] * count if isinstance(metrics, str) else metrics, count),
        _accepted(annotation.get("answers") if metrics else None, count),
        strict=True,
    )
    for index, (group, metric, accepted) in zip(range(1, 2 * count, 2), columns, strict=True):
        turns[index] = replace(turns[index], group=group, metric=metric, answers=accepted)
    return turns


def _names(field: str, given: Any, count: int) -> list[str | None]:
    if not given:
        return [None] * count
    if not isinstance(given, list) or not all(isinstance(entry, str | None) for entry in given):
        raise _bad_conversation(f"'{field}' is no list of names")
    if len(given) != count:
        raise _bad_conversation(f"'{field}' has {len(given)} entries for {count} answers; expected one each")
    return given


def _accepted(given: Any, count: int) -> list[tuple[str, ...]]:
    """Read the accepted answers to each question; those to a single one need no outer list."""
    if given is None:
        return [()] * count
    lists = [given] if count == 1 and _are_texts(given) else given
    if not isinstance(lists, list) or len(lists) != count or not all(map(_are_texts, lists)):
        raise _bad_conversation("'answers' is no list with the accepted answers to each question")
    return [tuple(texts) for texts in lists]


def _are_texts(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(isinstance(text, str) for text in given)


def _parse_turn(entry: Any, index: int, role: Role) -> Turn:
    if not isinstance(entry, dict) or entry.get("from") != role or not isinstance(entry.get("value"), str):
        raise _bad_conversation(f"turn {index}: expected {{'from': '{role}', 'value': text}}")
    text: str = entry["value"]
    if role == "gpt" and IMAGE_TOKEN in text:
        reason = f"turn {index}: {IMAGE_TOKEN} in an answer; images belong to the turns of 'human'"
        raise RecordError(reason, kind="marks")
    if _SURROGATE.search(text):
        raise _bad_conversation(f"turn {index}: half a surrogate pair, which no UTF-8 text has")
    return Turn(role=role, text=text)


def decode_content(name: str, content: Content, limits: ImageLimits) -> Image:
    """Decode an image; any error of the decoder becomes a `RecordError`.

    On hostile bytes that may be any exception: OSError, SyntaxError, struct.error, RuntimeError, ...
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd but readable metadata
            return _pixels(content, limits)
    except Exception as error:
        kind = getattr(error, "kind", "image")
        # The first line, of torchvision's without the place in its source.
        line = (str(error).splitlines() or [type(error).__name__])[0]
        reason = line if isinstance(error, RecordError) else line.split(", ", 2)[-1]
        raise RecordError(f"image '{name}' ({len(content)} bytes): {reason}", kind=kind) from error


def _pixels(content: Content, limits: ImageLimits) -> Image:
    """Decode by content: torchvision for grey and RGB JPEGs, Pillow for all else.

    The pixels of both are the same and so, nearly, is the speed. But torchvision 0.29 ends the process
    (segmentation fault) on a PNG with damaged pixel data, drops alpha and does not turn WebP by its EXIF.
    """
    if not 0 < len(content) <= limits.max_bytes:
        reason = f"expected 1 to {limits.max_bytes} bytes"
        raise _over_limit(reason) if content else _bad_image(reason)
    image = _open_image(content, limits)
    if image.format in ("JPEG", "MPO"):  # MPO: a photo with further pictures behind it, which are left alone
        if _num_scans(content) > _MAX_SCANS:
            raise _over_limit(f"more than {_MAX_SCANS} scans")
        if image.mode in ("L", "RGB"):
            data = torch.frombuffer(content, dtype=torch.uint8)  # no copy: nothing writes to it
            return decode_image(data, ImageReadMode.RGB, apply_exif_orientation=True)
    elif getattr(image, "is_animated", False):
        raise _bad_image("several frames, expected one: no question says which one it is about")
    elif image.format == "PNG":
        image.verify()  # checksums of all chunks up to the end, which decoding does not look at
        image = _open_image(content, limits)
    return pillow_pixels(image)


def _open_image(content: Content, limits: ImageLimits) -> PIL.Image.Image:
    """Read and check the header alone."""
    try:
        image = PIL.Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    except PIL.UnidentifiedImageError as error:
        raise _bad_image("neither JPEG, PNG, WebP nor GIF, or its header is damaged") from error
    except PIL.Image.DecompressionBombError as error:
        raise _over_limit(str(error)) from error
    sides = f"{image.width} x {image.height} pixels"
    if image.width * image.height > limits.max_pixels:
        raise _over_limit(f"{sides} are more than max_pixels ({limits.max_pixels})")
    if min(image.size) < limits.min_side:
        raise _over_limit(f"{sides}: a side is shorter than min_side ({limits.min_side})")
    return image


def _num_scans(jpeg: Content) -> int:
    """Count start-of-scan markers, eight times as fast as `bytes.count`."""
    values = np.frombuffer(jpeg, np.uint8)
    return int(np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == 0xDA)))


def pillow_pixels(image: PIL.Image.Image) -> Image:
    """Return the pixels as RGB: turned by EXIF, transparency on white, 16 bits as 8."""
    image.load()
    with suppress(Exception):  # damaged EXIF turns nothing, as in torchvision
        image = PIL.ImageOps.exif_transpose(image)
    clear = image.info.get("transparency")  # of a PNG, perhaps: one colour, or the alpha of each of a palette
    if isinstance(clear, tuple) and max(clear) > 255:  # colours of 16 bits, of which Pillow keeps eight
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.mode.startswith("I"):  # grey of 16 bits
        values = np.asarray(image)
        image = PIL.Image.fromarray((values >> 8).astype(np.uint8))
        if isinstance(clear, int):
            image.putalpha(PIL.Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:  # on white: the colour of transparent pixels is arbitrary, often black
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
