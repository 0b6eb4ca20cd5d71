"""Questions of public benchmarks, read from files as they are published; nothing is downloaded.

A suite is an entry of `SUITES`: its files, how it asks and what scores it. Both forms are read: parquet as on
the Hugging Face Hub, and the TSV of VLMEvalKit.
"""

import ast
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from vico_pl.data.decode import IMAGE_TOKEN, bad_record, decode_record
from vico_pl.data.tables import image_content, read_rows
from vico_pl.errors import RecordError
from vico_pl.types import BadRecord, Record, Sample

# As VLMEvalKit (vlmeval/dataset/image_vqa.py, vlm/internvl/utils.py) and lmms-eval (tasks/docvqa, ai2d) ask.
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

# Of several columns, the first that is not empty counts.
_QUESTION = ("query", "question")
_ANSWERS = ("answers", "answer", "label")
_IMAGES = ("decoded_image", "image", "image_1", "image_path")
_KEYS = ("questionId", "question_id", "index", "pid", "id")
_KINDS = ("answer_type", "question_type", "category")  # of a question
_SPLIT = re.compile(r"(train|validation|val|testmini|test|dev)(?![a-z])")
_IMAGE_MARK = re.compile(r"<image ([1-9])>")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A benchmark: its files, how it asks and what scores it."""

    metric: str
    metrics: Mapping[str, str | None] = field(default_factory=dict)  # of other kinds; None: needs a judge
    tsv: str  # name of VLMEvalKit's file
    split: str = "test"  # of the Hub's files; others are left alone
    subfolder: str = "data"  # of the Hub's files, unless they are in the folder itself
    group: tuple[str, ...] = ()  # columns
    suffix: str = SHORT  # of questions without a list of options
    names_options: bool = False  # in its questions already; then the right answer is the text of an option


SUITES = {
    "docvqa": Suite(metric="anls", tsv="DocVQA_VAL", split="validation", subfolder="DocVQA"),
    "infovqa": Suite(metric="anls", tsv="InfoVQA_VAL", split="validation", subfolder="InfographicVQA"),
    "chartqa": Suite(metric="relaxed", tsv="ChartQA_TEST", group=("type", "split")),
    "textvqa": Suite(metric="vqa", tsv="TextVQA_VAL", split="validation"),
    "ocrbench": Suite(
        metric="ocrbench",
        metrics={"Handwritten Mathematical Expression Recognition": "ocrbench_formula"},
        tsv="OCRBench",
        group=("question_type", "category"),
        suffix="",
    ),
    "ai2d": Suite(metric="choice", tsv="AI2D_TEST"),
    "mmstar": Suite(metric="choice", tsv="MMStar", split="val", group=("category",), suffix=LETTER),
    "mmmu": Suite(
        metric="choice",
        metrics={"open": "mmmu_open"},
        tsv="MMMU_DEV_VAL",
        split="validation",
        subfolder="*",  # one per subject
        group=("category", "id", "subfield"),  # of the Hub's id, validation_Art_Theory_12, the subject
    ),
    "mathvista": Suite(
        metric="choice",
        metrics={"integer": "number", "float": "number", "list": None},
        tsv="MathVista_MINI",
        split="testmini",
        group=("task",),
        suffix="",
        names_options=True,
    ),
}


def read_suite(name: str, folder: Path, *, skipped: list[BadRecord] | None = None) -> Iterator[Sample]:
    """Read a benchmark; each sample is a question whose answer has a metric, accepted answers and a group.

    Rows that cannot be used are added to `skipped`, and a warning at the end counts them.

    Raises:
        ValueError: no such suite or folder, or none of its files; while reading: a file is damaged, lacks a
            column or has no usable row.
    """
    if name not in SUITES:
        raise ValueError(f"{name!r} is no suite; expected one of {', '.join(SUITES)}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one with the files of {name}")
    return _read_files(name, _find_files(name, folder), [] if skipped is None else skipped)


def _find_files(name: str, folder: Path) -> list[Path]:
    suite = SUITES[name]
    places = {".", "data", suite.subfolder}
    found = sorted({path for place in places for path in folder.glob(f"{place}/*.parquet")})
    splits = {path: _SPLIT.match(path.name) for path in found}
    texts = sorted(folder.glob("*.tsv"))
    chosen = [path for path, split in splits.items() if split is None or split[1] == suite.split]
    chosen = chosen or [path for path in texts if len(texts) == 1 or path.stem == suite.tsv]
    if not chosen:
        expected = f"{suite.split}-*.parquet or {suite.tsv}.tsv"
        given = ", ".join(path.name for path in [*found, *texts][:5]) or "neither parquet nor TSV"
        raise ValueError(f"{folder}: no file of {name}; expected {expected}, found {given}")
    return chosen


def _read_files(name: str, files: list[Path], skipped: list[BadRecord]) -> Iterator[Sample]:
    count, before = 0, len(skipped)
    for path in files:
        for position, row in enumerate(read_rows(path)):
            key = _first(row, _KEYS) or f"{position:06d}"
            if not position:
                _check_columns(name, row, path)
            try:
                record = _to_record(name, {**(row.get("metadata") or {}), **row}, path, key)
                if record is not None:
                    yield decode_record(record)
                    count += 1
            except RecordError as error:
                skipped.append(bad_record(f"{path.name}/{key}", error))
    faults = skipped[before:]
    if faults:
        kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(f.kind for f in faults).items())
        left_out = f"{len(faults)} of {count + len(faults)} rows are left out ({kinds})"
        text = f"{name}: {left_out}; the first, {faults[0].id}: {faults[0].reason}"
        if not count:
            raise ValueError(text)
        warnings.warn(text, stacklevel=2)


def _check_columns(name: str, row: dict[str, Any], path: Path) -> None:
    for columns in (_QUESTION, _ANSWERS, _IMAGES):
        if not any(column in row for column in columns):
            expected = f"no column {' or '.join(columns)}, which {name} needs"
            raise ValueError(f"{path}: {expected}; it has {', '.join(row)}")


def _to_record(name: str, row: dict[str, Any], path: Path, key: str) -> Record | None:
    """Write a row as a record, which is then checked and decoded like one of a shard; None: another split."""
    suite, split = SUITES[name], row.get("split") or ""
    if _SPLIT.fullmatch(split) and split != suite.split:
        return None
    metric = suite.metrics.get(_first(row, _KINDS), suite.metric)
    answers = _texts(next((row[column] for column in _ANSWERS if column in row), None))
    if not answers:
        raise RecordError("no accepted answer; test sets are published without")
    options = _texts(row.get("options") or row.get("choices"))
    options = options or [row[letter] for letter in ascii_uppercase if row.get(letter)]
    question, suffix = _first(row, _QUESTION), suite.suffix
    if metric is None or (suite.names_options and metric == "choice" and not options):
        raise RecordError("only a judge model can score an answer of this kind", kind="judge")
    if options and metric == "choice":
        answers = _option_answers(answers[0], options, by_text=suite.names_options)
        if not suite.names_options:
            question += "".join(f"\n{a}. {text}" for a, text in zip(ascii_uppercase, options, strict=False))
            suffix = LETTER
    text, images = _place_images(question + suffix, _images(row, path.parent))
    group = re.sub(r"^(validation|test|dev)_|_\d+$", "", _first(row, suite.group)) or name
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answers[0]}]
    annotation = {"conversations": turns, "skills": [group], "metrics": metric, "answers": answers}
    files = {f"{number}.png": content for number, content in enumerate(images)}
    return Record(shard=path.name, key=key, files={**files, "json": json.dumps(annotation).encode()})


def _first(row: dict[str, Any], columns: tuple[str, ...]) -> str:
    values = (row.get(column) for column in columns)
    return next((str(value) for value in values if value not in (None, "")), "")


def _texts(value: Any) -> list[str]:
    """Return the texts of a list, of a list written as text, or of a single value."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):  # it may only look like a list
            parsed = ast.literal_eval(value)
            value = parsed if all(isinstance(item, str) for item in parsed) else value
    values = value if isinstance(value, list) else [value or None]
    return [str(item) for item in values if item is not None]


def _option_answers(answer: str, options: list[str], *, by_text: bool) -> list[str]:
    """Return the letter of the right option, and its text unless that is an image."""
    names = options if by_text else list(ascii_uppercase[: len(options)])
    number = names.index(answer) if answer in names else int(answer) if answer.isdecimal() else -1
    if not 0 <= number < len(options):
        raise RecordError(f"answer {answer!r} is none of {len(options)} options")
    texts = [] if _IMAGE_MARK.search(options[number]) else [options[number]]
    return [ascii_uppercase[number], *texts]


def _images(row: dict[str, Any], folder: Path) -> list[bytes | None]:
    """Return the contents of the images of a row; None: it has no image of that number."""
    given = row.get("decoded_image") or row.get("image")
    if "image_1" in row:
        return [image_content(row.get(f"image_{number}")) for number in range(1, 8)]
    if given or "image_path" not in row:
        return [image_content(value) for value in (_texts(given) if isinstance(given, str) else [given])]
    paths = [(folder / name).resolve() for name in _texts(row["image_path"])]
    for path in paths:
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            raise RecordError(f"image '{path}' is no file below {folder}", kind="image")
    return [path.read_bytes() for path in paths]


def _place_images(text: str, images: list[bytes | None]) -> tuple[str, list[bytes]]:
    """Put each image where the text names it, as in `<image 2>`, or all before the text."""
    text = text.replace(IMAGE_TOKEN, "")
    named = [int(mark) for mark in _IMAGE_MARK.findall(text)]
    chosen = [images[number - 1] if number <= len(images) else None for number in named] if named else images
    found = [image for image in chosen if image is not None]
    if not found or len(found) < len(named):
        raise RecordError(f"{len(found)} of {max(1, len(named))} images are there", kind="marks")
    return _IMAGE_MARK.sub(IMAGE_TOKEN, text) if named else f"{IMAGE_TOKEN}\n" * len(found) + text, found
