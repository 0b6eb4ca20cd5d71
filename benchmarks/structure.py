"""Measure the size of the code for the table of CONTRIBUTING.md.

A module with a single importer usually belongs inside that importer. Imports inside functions count.
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {
    "lines of `vico_pl/`": 10_500,
    "modules of `vico_pl/`": 85,
    "lines of `tests/`": 15_000,
    "modules with a single importer": 12,
    "lines of the longest file": 350,
    "lines of the longest function": 60,
    "lines of the median function": 12,
}


def measure(root: Path = ROOT) -> dict[str, float]:
    """Return each figure of the table."""
    package, tests = (sorted((root / name).rglob("*.py")) for name in ("vico_pl", "tests"))
    functions = [length for path in package for length in function_lengths(path)]
    importers = count_importers(root, package)
    return dict(
        zip(
            LIMITS,
            (
                sum(map(num_lines, package)),
                len(package),
                sum(map(num_lines, tests)),
                sum(count == 1 for count in importers.values()),
                max(map(num_lines, package)),
                max(functions),
                median(functions),
            ),
            strict=True,
        )
    )


def num_lines(path: Path) -> int:
    """Return the lines of a file, blank lines and comments included."""
    return len(path.read_text().splitlines())


def function_lengths(path: Path) -> list[int]:
    """Return the lines of each function of a file, docstrings included."""
    nodes = ast.walk(ast.parse(path.read_text()))
    functions = (node for node in nodes if isinstance(node, ast.FunctionDef))
    return [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]


def count_importers(root: Path, paths: list[Path]) -> dict[str, int]:
    """Return the number of importers of each module except packages."""
    names = {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}
    importers: dict[str, set[str]] = defaultdict(set)
    for name, path in names.items():
        for imported in imports(path) & names.keys():
            importers[imported].add(name)
    inner = (name for name in names if not name.endswith(("__init__", "__main__")))
    return {name: len(importers[name] - {name}) for name in inner}


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def main() -> None:
    """Print the table."""
    rows = [f"| {name} | {value:,.0f} | {LIMITS[name]:,} |" for name, value in measure().items()]
    sys.stdout.write("\n".join(["| figure | value | limit |", "|---|---|---|", *rows]) + "\n")


if __name__ == "__main__":
    main()
