"""Model folders that live on the Hugging Face Hub: named OWNER/NAME or OWNER/NAME@REVISION, fetched once."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

# Weights, configurations and tokenizers; no Python file and nothing pickled.
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# A refused connection is an HTTPError, of httpx or httpx2, and neither the Hub's own nor an OSError.
Unreachable = (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError)


def is_hub_id(path: str) -> bool:
    """Say whether a path that is no folder can name a repository.

    >>> is_hub_id("OpenGVLab/InternVL3_5-1B"), is_hub_id("OpenGVLab/InternVL3_5-1B@main"), is_hub_id("./a/b")
    (True, True, False)
    """
    name, _ = split_revision(path)
    return not Path(path).exists() and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def split_revision(path: str) -> tuple[str, str | None]:
    """Return the name of a repository and the branch, tag or commit behind its `@`, if any."""
    name, _, revision = path.partition("@")
    return name, revision or None


def pinned(path: str, begun_with: str | None = None) -> str:
    """Return a repository's name with the commit that its revision stands for now; a folder as it is.

    Without a revision, a run keeps the commit that it has begun with.

    Raises:
        ValueError: the Hub does not know it, or cannot be reached.
    """
    name, revision = split_revision(path)
    if not is_hub_id(path) or re.fullmatch("[0-9a-f]{40}", revision or ""):
        return path
    if begun_with is not None and begun_with.startswith(f"{path}@"):
        return begun_with
    commit = _ask(path, HfApi().model_info, name, revision=revision).sha
    if commit is None:
        raise ValueError(f"{path}: the Hub names no commit for it")
    return f"{name}@{commit}"


def local_folder(path: str, patterns: Sequence[str] = PATTERNS) -> Path:
    """Return the folder that a path or the name of a repository stands for, fetched if it is not yet here.

    Of a repository only the files that match a pattern are fetched.

    Raises:
        ValueError: neither the cache nor the Hub has it.
    """
    if not is_hub_id(path):
        return Path(path)
    name, revision = split_revision(path)
    return Path(_ask(path, snapshot_download, name, revision=revision, allow_patterns=list(patterns)))


def _ask(path: str, question: Callable[..., Any], *arguments: str, **options: Any) -> Any:
    """Call a function of the Hub's client; say in one sentence why it cannot answer."""
    try:
        return question(*arguments, **options)
    except Unreachable as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"{path}: no such folder, and it cannot be had from the Hugging Face Hub ({reason})"
        raise ValueError(message) from error
