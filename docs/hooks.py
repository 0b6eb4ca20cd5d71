"""What the pages need from MkDocs beyond its plugins: source code next to formulas, and links out of docs/.

`<!-- source: vico_pl/stages/router.py loss_ratio -->` in a page becomes the present code of that function.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = re.compile(r"<!-- source: (\S+) ([\w.]+) -->")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)\)")
# Pages that other parts of the project write, and where they go: after this page of the navigation.
FURTHER_PAGES = {
    "settings.md": ("Settings", "reference.md"),
}


def on_config(config: Any) -> Any:
    """Add the further pages that exist to the navigation."""
    for name, (title, after) in FURTHER_PAGES.items():
        if (Path(config.docs_dir) / name).is_file():
            _insert(config.nav, {title: name}, after=after)
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill in source code, and turn links to files outside docs/ into their paths."""
    folder = posixpath.dirname(page.file.src_uri)
    markdown = SOURCE.sub(lambda found: source_block(found[1], found[2]), markdown)

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


def _insert(entries: list[Any], entry: dict[str, str], *, after: str) -> None:
    for number, item in enumerate(list(entries)):
        (value,) = item.values()
        if value == after:
            entries.insert(number + 1, entry)
        elif isinstance(value, list):
            _insert(value, entry, after=after)
