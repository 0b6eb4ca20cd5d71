"""What the pages need from MkDocs beyond its plugins: source code next to formulas, and links out of docs/.

`<!-- source: vico_pl/stages/labels.py loss_ratio -->` in a page becomes the present code of that function,
and `<!-- settings -->` the tables of all settings, whose meanings are the comments next to their fields.
"""

import ast
import inspect
import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

ROOT = Path(__file__).parents[1]
SOURCE = re.compile(r"<!-- source: (\S+) ([\w.]+) -->")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)\s]*)?\)")
SETTINGS = "<!-- settings -->"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill in source code, and turn links to files outside docs/ into their paths."""
    folder = posixpath.dirname(page.file.src_uri)
    markdown = SOURCE.sub(lambda found: source_block(found[1], found[2]), markdown)
    if SETTINGS in markdown:
        markdown = markdown.replace(SETTINGS, settings_tables())

    def shown(link: re.Match[str]) -> str:
        return _shown(link[1], posixpath.normpath(posixpath.join("docs", folder, link[2])), link[0])

    return LINK.sub(shown, markdown)


def source_block(path: str, name: str) -> str:
    """Return the code of a function or class as a block of Markdown, without its docstring."""
    return f'```python title="{path}"\n{source_of(path, name)}\n```'


def source_of(path: str, name: str) -> str:
    """Return the code of a function, class or method (`Class.method`) of a file, without its docstring.

    Raises:
        KeyError: the file defines no such name.
    """
    text = (ROOT / path).read_text(encoding="utf-8")
    node: Any = ast.parse(text)
    for part in name.split("."):
        defined = {child.name: child for child in node.body if hasattr(child, "name")}
        node = defined[part]
    lines = text.splitlines()
    kept = lines[node.lineno - 1 : node.end_lineno]
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        first, last = docstring.lineno - node.lineno, docstring.end_lineno - node.lineno
        kept = kept[:first] + kept[last + 1 :]
    margin = len(kept[0]) - len(kept[0].lstrip())
    return "\n".join(line[margin:] for line in kept)


def _shown(text: str, path: str, link: str) -> str:
    """Return what stands for a link to a file of the project; other links stay as they are."""
    if path.startswith("docs/"):
        return link
    name = text.strip("`")
    return f"`{name}`" if name == path or path.endswith(f"/{name}") else f"`{name}` (`{path}`)"


def settings_tables() -> str:
    """Return a table for each section of a recipe: name, type, default and meaning of each setting."""
    from vico_pl.config import RunConfig

    return "\n\n".join(_section_tables(RunConfig, ""))


def _section_tables(section: type, prefix: str) -> Iterator[str]:
    meanings, hints, inner = comments_of(section), get_type_hints(section), []
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for field in fields(section):
        hint = hints[field.name]
        nested = next((t for t in (hint, *get_args(hint)) if is_dataclass(t)), None)
        if nested is not None:
            inner.append((nested, f"{prefix}{field.name}.{'' if nested is hint else 'N.'}"))
            continue
        kind = (
            hint.__name__
            if isinstance(hint, type) and not get_args(hint)
            else str(hint).replace("typing.", "")
        )
        cells = (f"`{prefix}{field.name}`", kind, _default(field), meanings[field.name])
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    title = f"## {prefix.rstrip('.') or 'The run'}"
    yield "\n\n".join([title, str(section.__doc__), "\n".join(rows)])
    for nested, place in inner:
        yield from _section_tables(nested, place)


def comments_of(section: type) -> dict[str, str]:
    """Return the comment of each field of a dataclass: behind it, or in the lines before it."""
    found, above = {}, []
    for base in reversed(section.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines():
            code, _, comment = line.partition("  # ")
            field = re.match(r"    (\w+): ", code)
            if line.startswith("    # "):
                above.append(line.strip("# "))
                continue
            if field:
                found[field[1]] = " ".join([*above, *([comment] if comment else [])])
            above = []
    return found


def _default(field: Any) -> str:
    if field.default is not MISSING:
        return f"`{json.dumps(field.default)}`"
    return "required" if field.default_factory is MISSING else f"`{json.dumps(field.default_factory())}`"
