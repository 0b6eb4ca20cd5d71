"""Looking into a folder of shards: its samples, what is wrong with them, and how many there are of what."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from vico_pl.data.decode import RecordError, bad_record, decode_record, printable
from vico_pl.data.shards import RecordReader, read_index
from vico_pl.types import BadRecord, Sample


def read_samples(folder: Path) -> Iterator[Sample]:
    """Yield the usable samples of a folder in their order."""
    return (item for item in _read_all(folder) if isinstance(item, Sample))


def find_faults(folder: Path) -> Iterator[BadRecord]:
    """Decode every record and yield the bad ones."""
    return (item for item in _read_all(folder) if isinstance(item, BadRecord))


def count_contents(folder: Path) -> dict[str, int]:
    """Count what a folder holds.

    Keys: shards, samples, bad records, images, answers, `bad records: KIND` for each kind, and
    `answers: SKILL` for each skill.
    """
    counts = Counter({"shards": len(read_index(folder).names)})
    for item in _read_all(folder):
        if isinstance(item, BadRecord):
            counts.update(["bad records", f"bad records: {item.kind}"])
            continue
        answers = [turn for turn in item.turns if turn.role == "gpt"]
        counts.update({"samples": 1, "images": len(item.images), "answers": len(answers)})
        counts.update(f"answers: {turn.skill}" for turn in answers if turn.skill is not None)
    return dict(counts)


def _read_all(folder: Path) -> Iterator[Sample | BadRecord]:
    index = read_index(folder)
    reader = RecordReader(index)
    for position in range(index.num_samples):
        name = f"{index.locate(position)[0]}, sample {position} of the set"  # until its key is known
        try:
            record = reader(position)
            name = printable(record.id)
            yield decode_record(record)
        except RecordError as error:
            yield bad_record(name, error)
