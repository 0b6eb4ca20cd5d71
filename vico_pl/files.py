"""Files that appear under their name only once they are complete, and logs of JSON lines."""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ABANDONED_S = 3600.0  # a file that is being written changes more often


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success it is synced and renamed to `path`, which survives a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        yield temporary
        publish(temporary, path)
    finally:
        remove(temporary)


def publish(temporary: Path, path: Path) -> None:
    """Sync a file or folder to disk and rename it to `path`, replacing what is there.

    Only a file can replace a file in one step. A folder is first renamed to `.NAME.replaced`, from which
    `restore_replaced` brings it back if the process is killed in between.
    """
    sync_files(temporary)
    replaced = path.with_name(f".{path.name}.replaced")
    if path.is_dir() or (path.exists() and temporary.is_dir()):
        remove(replaced)
        path.replace(replaced)
    temporary.replace(path)
    _sync(path.parent)
    remove(replaced)


def sync_files(path: Path) -> None:
    """Bring a file, or a folder and the files in it, to disk."""
    for file in (*path.glob("*"), path):
        _sync(file)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were writing in a folder: files that nothing has changed for an hour."""
    for leftover in folder.glob(".*.partial"):
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - leftover.stat().st_mtime > ABANDONED_S:
                remove(leftover)


def restore_replaced(folder: Path) -> None:
    """Bring back what killed processes were replacing, unless its replacement is there."""
    for replaced in folder.glob(".*.replaced"):
        path = folder / replaced.name.removeprefix(".").removesuffix(".replaced")
        if path.exists():
            remove(replaced)
        else:
            replaced.replace(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(content: Any, path: Path, *, indent: int = 1) -> None:
    """Write a JSON file atomically."""
    remove_leftovers(path.parent)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


def append_json(path: Path, *lines: dict[str, Any], before: bytes = b"") -> None:
    """Append lines in one write, so that a killed process can only truncate the last of them."""
    with path.open("ab", buffering=0) as file:
        file.write(before + b"".join(json.dumps(line).encode() + b"\n" for line in lines))
