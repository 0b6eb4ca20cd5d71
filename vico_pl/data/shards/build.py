"""Writing sets of shards: several processes, whole shards or none; an interrupted set is continued.

The plan of a set is written first, as `build.json`: how it was asked for, and how many samples each shard
gets. A later build into the same folder must have the same plan, or the set would be of two kinds.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vico_pl.data.glyphs import GlyphsConfig, draw_records
from vico_pl.data.shards.index import INDEX_NAME, PLAN_NAME, side_index_path
from vico_pl.data.shards.parallel import run_parallel
from vico_pl.data.shards.reader import ShardIndex, read_index, write_index, write_shard
from vico_pl.files import write_json

Part = TypeVar("Part", bound=Sized)  # what a shard is made of, as long as it has samples


def build_glyphs(
    folder: Path,
    config: GlyphsConfig,
    *,
    num_samples: int,
    seed: int,
    samples_per_shard: int,
    workers: int | None = None,
) -> ShardIndex:
    """Draw GlyphDocs shards."""
    starts = range(0, num_samples, samples_per_shard)
    parts = [range(start, min(start + samples_per_shard, num_samples)) for start in starts]
    write = partial(_write_glyphs, config=config, seed=seed)
    return build_set(folder, write, parts, settings={**vars(config), "seed": seed}, workers=workers)


def build_set(
    folder: Path,
    write: Callable[[Path, Part], None],
    parts: Sequence[Part],
    *,
    settings: Mapping[str, Any],
    workers: int | None = None,
) -> ShardIndex:
    """Write a set of shards with `write(path, part)`; shards that are already whole are kept.

    `settings` tell what else the records depend on. `workers` is the number of processes, by default that of
    the CPU cores; the bytes do not depend on it.

    Raises:
        ValueError: the folder already holds a set, or a part of one, that was asked for otherwise.
    """
    plan = _plan(settings, [len(part) for part in parts])
    if _is_whole(folder, plan):
        return read_index(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.partial"):  # of a process that was killed
        leftover.unlink()
    write_json(plan, folder / PLAN_NAME)
    paths = [folder / f"{folder.name}-{number:06d}.tar" for number in range(len(parts))]
    jobs = [(path, part) for path, part in zip(paths, parts, strict=True) if not _is_written(path)]
    done, run = len(parts) - len(jobs), partial(_write, write=write)
    for _ in run_parallel(run, jobs, workers=workers, title=str(folder), done=done):
        pass
    return write_index(folder, workers=workers)


def _plan(settings: Mapping[str, Any], counts: list[int]) -> dict[str, Any]:
    plan = {"version": 1, "settings": dict(settings), "num_samples": counts}
    return {**plan, "sha256": _checksum(plan)}


def _checksum(plan: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _is_whole(folder: Path, plan: dict[str, Any]) -> bool:
    """Say whether a folder holds the set of a plan; another one, or a part of another, is refused."""
    is_whole, path = (folder / INDEX_NAME).exists(), folder / PLAN_NAME
    state = "already holds" if is_whole else "already holds a part of"
    remedy = "remove it or choose another folder"
    if path.exists():
        if _read_plan(path) != plan:
            raise ValueError(f"{folder}: {state} a set of other annotations or settings; {remedy}")
    elif is_whole:
        found, expected = read_index(folder).num_samples, sum(plan["num_samples"])
        if found != expected:
            raise ValueError(f"{folder}: {state} {found} samples, not {expected}; {remedy}")
    elif any(folder.glob("*.tar")):
        raise ValueError(f"{folder}: holds tars of which no {PLAN_NAME} tells the origin; {remedy}")
    return is_whole


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan: dict[str, Any] = json.loads(path.read_bytes())
        checksum = plan.pop("sha256")
    except (ValueError, AttributeError, KeyError, RecursionError):
        plan, checksum = {}, ""
    if checksum != _checksum(plan):
        raise ValueError(f"{path}: damaged; remove the folder and build it again")
    return {**plan, "sha256": checksum}


def _is_written(path: Path) -> bool:
    """Say whether a shard is whole: its side index is written after it."""
    return path.exists() and side_index_path(path).exists()


def _write(job: tuple[Path, Part], *, write: Callable[[Path, Part], None]) -> None:
    write(*job)


def _write_glyphs(path: Path, part: range, *, config: GlyphsConfig, seed: int) -> None:
    write_shard(path, draw_records(config, seed=seed, start=part.start, count=len(part)))
