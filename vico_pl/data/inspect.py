"""Looking into a set of shards: its samples, what is wrong with them, and how many there are of what."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from vico_pl.data.decode import RecordError, bad_record, decode_record, printable
from vico_pl.data.shards import RecordReader, read_index
from vico_pl.types import BadRecord, Sample


def read_samples(source: Path | str) -> Iterator[Sample]:
    """Yield the usable samples of a set in their order."""
    return (item for item in _read_all(source) if isinstance(item, Sample))


def find_faults(source: Path | str) -> Iterator[BadRecord]:
    """Decode every record and yield the bad ones; a shard that cannot be opened comes once."""
    dead: set[str] = set()
    for item in _read_all(source):
        if isinstance(item, BadRecord) and item.reason not in dead:
            yield item
            if item.kind == "shard":
                dead.add(item.reason)


def count_contents(source: Path | str) -> dict[str, int]:
    """Count what a set holds.

    Keys: shards, samples, bad records, images, answers, `bad records: KIND` for each kind, and
    `answers: SKILL` for each skill.
    """
    counts = Counter({"shards": len(read_index(source).names)})
    for item in _read_all(source):
        if isinstance(item, BadRecord):
            counts.update(["bad records", f"bad records: {item.kind}"])
            continue
        answers = [turn for turn in item.turns if turn.role == "gpt"]
        counts.update({"samples": 1, "images": len(item.images), "answers": len(answers)})
        counts.update(f"answers: {turn.skill}" for turn in answers if turn.skill is not None)
    return dict(counts)


def _read_all(source: Path | str) -> Iterator[Sample | BadRecord]:
    index = read_index(source)
    reader = RecordReader(index)
    for position in range(index.num_samples):
        shard = index.names[index.place(position)[0]]
        name = f"{shard}, sample {position} of the set"  # until its key is known
        try:
            record = reader(position)
            name = printable(record.id)
            yield decode_record(record)
        except RecordError as error:
            yield bad_record(name, error)
