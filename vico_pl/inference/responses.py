"""Files that a model writes: shards with its own answers, and routed vision tokens for other engines."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from vico_pl.data.decode import (
    IMAGE_EXTENSIONS,
    IMAGE_TOKEN,
    bad_record,
    decode_record,
    parse_annotation,
    printable,
)
from vico_pl.data.shards.build import SAMPLES_PER_SHARD, Records, build_set
from vico_pl.data.shards.index import PLAN_NAME
from vico_pl.data.shards.reader import RecordReader, read_index
from vico_pl.data.shards.shard import ShardIndex
from vico_pl.errors import RecordError
from vico_pl.files import append_json, atomic_path
from vico_pl.inference.generate import RoutedSample, TextReader, generation_options, prompt_texts
from vico_pl.inference.predictor import Predictor
from vico_pl.types import BadRecord, Record, Turn

LOG_NAME = "bad_records.jsonl"  # of the new set: records that are not in it, and why
EMBEDDINGS = "image_embeds"  # name of the tensor of vision tokens, (N, D)
_PER_ANSWER = ("skills", "metrics", "answers")  # fields of a record's JSON


@dataclass
class Conversation:
    """A record while its questions are answered."""

    record: Record
    turns: list[Turn]
    routed: RoutedSample
    texts: list[str] = field(default_factory=list)  # questions and the model's answers so far
    fault: RecordError | None = None


def generate_responses(
    predictor: Predictor,
    source: Path | str,
    output: Path,
    *,
    prompt: str | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    **options: Any,
) -> tuple[ShardIndex, list[BadRecord]]:
    """Write a set with the model's answers to the questions of `source`; returns its index and bad records.

    A later question follows the model's own earlier answers. With `prompt` each record is asked that alone
    and needs no JSON. The same call completes an interrupted set; `options` as of `Predictor.generate`.

    Raises:
        ValueError: the folder holds another set, or one of another model, or no record can be used.
    """
    if any(output.glob("*.tar")) and not (output / PLAN_NAME).exists():
        raise ValueError(f"{output}: holds tars but no {PLAN_NAME}, so another set; choose another folder")
    index, settings = read_index(source), {**generation_options(options), "max_new_tokens": max_new_tokens}
    files = [(path, path.stat()) for path in sorted(predictor.folder.iterdir()) if path.is_file()]
    plan = {
        "source": [[entry.name, entry.num_samples, entry.num_bytes, entry.sha256] for entry in index.entries],
        "model": [[path.name, status.st_size, status.st_mtime_ns] for path, status in files],
        "prompt": prompt,
        **settings,
    }
    answer = partial(
        _answered,
        predictor=predictor,
        read=partial(_read, reader=RecordReader(index), prompt=prompt),
        log=output / LOG_NAME,
        batch_size=batch_size,
        settings=settings,
    )
    parts = [
        range(start, min(start + samples_per_shard, end))
        for first, end in pairwise(index.starts)  # within a shard, where keys are unique
        for start in range(first, end, samples_per_shard)
    ]
    written = build_set(output, answer, parts, settings=plan, workers=1)
    bad = _read_log(output / LOG_NAME)
    if not written.num_samples:
        first = bad[0].reason if bad else "it is empty"
        raise ValueError(f"{source}: no usable record; the first fault: {first}")
    return written, bad


@torch.no_grad()
def embed_image(predictor: Predictor, image: Path, output: Path) -> tuple[int, int]:
    """Write the routed vision tokens of an image; return their number, and that of full tokens.

    The file has one tensor (N, D), D being the width of the language model, and the ratio of each tile in its
    metadata, row by row, the thumbnail last.

    Raises:
        ValueError: the file is no image.
    """
    routed = predictor.prepare([image])
    tokens, _ = predictor.model.connectors(routed.features, routed.ratios.to(routed.features.device))
    metadata = {"ratios": json.dumps(routed.ratios.tolist()), "image": image.name}
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as temporary:
        save_file({EMBEDDINGS: tokens.cpu().contiguous()}, temporary, metadata)
    return len(tokens), len(routed.ratios) * predictor.model.tokens_per_full_tile


def _answered(
    part: range,
    *,
    predictor: Predictor,
    read: Callable[[int], Record],
    log: Path,
    batch_size: int,
    settings: Mapping[str, Any],
) -> Records:
    """Yield the records at these positions with the model's answers; those that fail are logged."""
    batches = range(part.start, part.stop, batch_size)
    for start in tqdm(batches, desc=f"records from {part.start}", unit="batch", disable=None):
        opened = [_open(predictor, read, i) for i in range(start, min(start + batch_size, part.stop))]
        usable = [one for one in opened if isinstance(one, Conversation)]
        while asked := [one for one in usable if one.fault is None and len(one.texts) < len(one.turns)]:
            _answer_next(predictor, asked, settings)
        faults = [one for one in opened if isinstance(one, BadRecord)]
        faults += [bad_record(one.record.id, one.fault) for one in usable if one.fault is not None]
        if faults:
            append_json(log, *map(asdict, faults))
        for one in usable:
            if one.fault is None:
                annotation = parse_annotation(one.record)
                turns = zip(annotation["conversations"], one.texts, strict=True)
                annotation["conversations"] = [{**turn, "value": text} for turn, text in turns]
                yield one.record.key, dict[str, Any](one.record.files) | {"json": _to_json(annotation)}


def _open(predictor: Predictor, read: Callable[[int], Record], position: int) -> Conversation | BadRecord:
    name = f"sample {position} of the set"
    try:
        record = read(position)
        name = record.id
        sample = decode_record(record)
        return Conversation(record, sample.turns, predictor.prepare(sample.images, name=name))
    except RecordError as error:
        return bad_record(printable(name), error)


def _read(position: int, *, reader: RecordReader, prompt: str | None) -> Record:
    """Read a record; with a prompt it asks that and nothing else."""
    record = reader(position)
    if prompt is None:
        return record
    given = parse_annotation(record) if "json" in record.files else {}
    fields = given.items() if isinstance(given, dict) else ()
    kept = {name: value for name, value in fields if name not in _PER_ANSWER}
    endings = [name.rpartition(".")[2].lower() for name in record.files]
    (question,) = prompt_texts(prompt, num_images=sum(ending in IMAGE_EXTENSIONS for ending in endings))
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": ""}]
    return replace(record, files={**record.files, "json": _to_json({**kept, "conversations": turns})})


def _answer_next(predictor: Predictor, asked: Sequence[Conversation], settings: Mapping[str, Any]) -> None:
    """Answer the next question of each conversation."""
    ready = []
    for one in asked:
        texts = [*one.texts, one.turns[len(one.texts)].text]
        images = one.routed.first(sum(text.count(IMAGE_TOKEN) for text in texts))  # others come later
        try:
            ready.append((one, images, predictor.encode_prompt(images.sample, texts)))
        except RecordError as error:
            one.fault = error
        one.texts = texts
    routed, prompts = [images for _, images, _ in ready], [encoded for *_, encoded in ready]
    reader = TextReader(tokenizer=predictor.tokenizer)
    answers = predictor.answer_batch(routed, prompts, reader=reader, **settings) if ready else ()
    for (one, *_), answer in zip(ready, answers, strict=True):
        one.texts.append(answer.text)
        if IMAGE_TOKEN in answer.text:
            one.fault = RecordError(f"{IMAGE_TOKEN} in an answer of the model", kind="marks")


def _to_json(annotation: dict[str, Any]) -> bytes:
    return json.dumps(annotation, ensure_ascii=False).encode(errors="surrogatepass")


def _read_log(path: Path) -> list[BadRecord]:
    """Return the records of a log once; a shard that was begun twice has logged them twice."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [BadRecord(**json.loads(line)) for line in dict.fromkeys(lines)]
