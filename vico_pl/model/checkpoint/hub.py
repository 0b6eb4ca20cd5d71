"""Model folders that live on the Hugging Face Hub, fetched once and pinned to a commit."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HFValidationError,
    HTTPError,  # of httpx or httpx2, whichever the Hub's client uses
    OfflineModeIsEnabled,
)

# Weights, configurations and tokenizers; no Python file and nothing pickled.
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# A refused connection is an HTTPError that is neither the Hub's own nor an OSError.
Unreachable = (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError)


def is_hub_id(path: str) -> bool:
    """Say whether a path that is no folder can name a repository, such as OpenGVLab/InternVL3_5-1B."""
    return not Path(path).exists() and path.count("/") == 1 and not path.startswith((".", "/", "~"))


def pinned_revision(path: str, revision: str | None) -> str:
    """Return the commit that a branch or tag of a repository, or its default branch, stands for now.

    Raises:
        ValueError: the Hub does not know it, or cannot be reached.
    """
    try:
        commit = HfApi().model_info(path, revision=revision).sha
    except Unreachable as error:
        raise ValueError(_message(path, revision, error)) from error
    if commit is None:
        raise ValueError(f"{path}: the Hub names no commit for revision {revision or 'main'}")
    return commit


def fetch(path: str, revision: str | None) -> Path:
    """Return the folder of a repository's files, from the cache where they are there.

    Raises:
        ValueError: neither the cache nor the Hub has them.
    """
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=PATTERNS))
    except Unreachable as error:
        raise ValueError(_message(path, revision, error)) from error


def local_folder(path: str, revision: str | None = None) -> Path:
    """Return the folder that a path or the name of a repository stands for."""
    return fetch(path, revision) if is_hub_id(path) else Path(path)


def _message(path: str, revision: str | None, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    at = f" at revision {revision}" if revision else ""
    return f"{path}: no such folder, and it cannot be had from the Hugging Face Hub{at} ({reason})"
