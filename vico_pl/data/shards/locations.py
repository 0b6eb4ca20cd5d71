"""Names of sets of shards: a folder, some tars of it, or the same at a URL.

- `data/shards/mine`: a folder
- `data/shards/mine/train-{000000..000031}.tar`, `.../train-*.tar`, `.../train-000000.tar`
- `https://host/mine`: a folder at a URL, with an index.json
- `s3://bucket/mine/train-{000000..000031}.tar.gz`
- `pipe:ssh host cat train-{000..031}.tar`: only where shell commands are allowed
"""

import glob
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from braceexpand import braceexpand

SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz")
MAX_SHARDS = 1_000_000  # of one set: a larger brace range is a typing error


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the shards of a set are: all in one folder."""

    base: str  # the folder or its URL; of commands: the text
    names: list[str] | None  # of the shards; None: all of the folder
    is_local: bool
    query: str = ""  # of URLs: what follows the name, such as a signature
    commands: dict[str, str] | None = None  # shell command of each shard

    def location(self, name: str) -> str:
        """Return the path, the URL or the command that gives a file."""
        return f"{self.base}/{name}{self.query}" if self.commands is None else self.commands[name]

    def identity(self, name: str) -> str:
        """Return what identifies a file: its absolute path, its command, or its URL without a signature."""
        place = self.location(name).removesuffix(self.query)
        return str(Path(place).absolute()) if self.is_local else place

    @property
    def folder(self) -> Path | str:
        """Return the name of the set."""
        return Path(self.base) if self.is_local else without_secrets(self.base)


def parse_source(text: str, *, allow_pipe: bool = False) -> Source:
    """Parse the name of a set of shards.

    Raises:
        ValueError: it is a shell command and this is not allowed, several folders, or no shard is there.
    """
    if text.startswith("pipe:"):
        return _parse_pipe(text, allow_pipe=allow_pipe)
    if text.startswith("file:/"):
        return _parse_path("/" + text.removeprefix("file:").lstrip("/"))
    url = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", text, re.DOTALL)
    if url:  # with one slash after a conversion to `Path`
        return _parse_url(f"{url[1].lower()}://{url[2]}")
    return _parse_path(text)


def without_secrets(text: str) -> str:
    """Remove the passwords and signatures of URLs from a message.

    >>> without_secrets("https://me:secret@host/a.tar?signature=1: no such file")
    'https://host/a.tar: no such file'
    """
    secrets = r"([A-Za-z][\w+.-]*://)([^\s/'\"]*@)?([^\s?]*)(\?\S*?(?=:?(?:\s|$)))?"
    return re.sub(secrets, r"\1\3", text)


def list_shards(folder: Path) -> list[str]:
    """Return the shards of a folder, sorted.

    Raises:
        ValueError: there is none.
    """
    names = sorted(path.name for path in folder.iterdir() if _is_shard(path.name))
    if not names:
        raise ValueError(f"{folder}: no shard found; expected names such as a-00.tar (see data/README.md)")
    return names


def _parse_path(text: str) -> Source:
    path = Path(text)
    if path.is_dir():
        return Source(base=str(path), names=None, is_local=True)
    if not _names_shards(text):
        remedy = "make one with 'vico shards build' or 'make shards'"
        raise ValueError(f"{text}: no such folder of shards; {remedy}")
    named = [text] if path.exists() else _expand(text)
    paths = [found for name in named for found in _glob(name)]
    if not paths:
        raise ValueError(f"{text}: no such shard; expected names such as train-000000.tar")
    base, names = _split(paths, text)
    here = "/" if text.startswith("/") else "."
    return Source(base=base or here, names=names, is_local=True)


def _parse_url(text: str) -> Source:
    plain, query = re.fullmatch(r"([^?]*)(\?.*)?", text, re.DOTALL).groups(default="")  # type: ignore[union-attr]
    shown = without_secrets(text)
    if "*" in plain:
        remedy = "name shards of a URL as train-{00..31}.tar"
        raise ValueError(f"{shown}: '*' finds only files of a folder; {remedy}")
    if not _names_shards(plain):
        return Source(base=plain.rstrip("/"), names=None, is_local=False, query=query)
    base, names = _split(_expand(plain), shown)
    return Source(base=base, names=names, is_local=False, query=query)


def _parse_pipe(text: str, *, allow_pipe: bool) -> Source:
    if not allow_pipe:
        raise ValueError(
            f"{without_secrets(text)}: 'pipe:' runs a shell command, which a recipe has to allow by "
            "data.streaming.allow_pipe=true; name a folder or a URL instead if you can"
        )
    commands = _expand(text)
    found = [re.findall(r"[\w.-]+\.(?:tar\.gz|tgz|tar)\b", command) for command in commands]
    named = [names[-1] if names else "" for names in found]
    if len(set(named)) < len(named) or "" in named:  # no usable names
        named = [f"pipe-{number:06d}.tar" for number in range(len(commands))]
    return Source(base=text, names=named, is_local=False, commands=dict(zip(named, commands, strict=True)))


def _names_shards(text: str) -> bool:
    """Say whether a text names tars, not a folder."""
    return _is_shard(text.rpartition("/")[2]) or "{" in text or glob.has_magic(text)


def _is_shard(name: str) -> bool:
    return name.endswith(SHARD_ENDINGS) and not name.startswith(".")


def _expand(text: str) -> list[str]:
    """Expand `{00..31}` and `{a,b}`."""
    shown = without_secrets(text)
    spans = re.findall(r"(-?\d{1,18})\.\.(-?\d{1,18})", text)
    if prod(abs(int(end) - int(start)) + 1 for start, end in spans) > MAX_SHARDS:
        raise ValueError(f"{shown}: more than {MAX_SHARDS} shards")
    try:
        return list(braceexpand(text))
    except ValueError as error:
        raise ValueError(f"{shown}: {error}; expected a range such as train-{{00..31}}.tar") from error


def _glob(text: str) -> list[str]:
    """Return the shards that match a path with `*` and `?`, or the path itself."""
    if glob.has_magic(text) and not Path(text).exists():
        return sorted(filter(_is_shard, glob.glob(text)))
    return [text]


def _split(locations: list[str], text: str) -> tuple[str, list[str]]:
    """Return the folder and the names of shards."""
    folders = sorted({location.rpartition("/")[0] for location in locations})
    if len(folders) > 1:
        both = without_secrets(f"'{folders[0]}' and '{folders[1]}'")
        remedy = "expected one folder: name each as a source of its own"
        raise ValueError(f"{text}: names shards of {both}; {remedy}")
    names = [location.rpartition("/")[2] for location in locations]
    for name in names:
        if not _is_shard(name):
            endings = " or ".join(SHARD_ENDINGS)
            raise ValueError(f"{text}: '{name}' is no shard; expected a name that ends in {endings}")
    return folders[0], list(dict.fromkeys(names))
