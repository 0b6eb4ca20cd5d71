"""Imports point one way: a module imports from its own part and from the parts below it."""

import ast
from pathlib import Path

import pytest

import vico_pl
from tests.support.scripts import load_benchmark

PACKAGE = Path(vico_pl.__file__).parent
GROUND = {"types", "errors", "files", "tokens", "optim"}
MAKES = GROUND | {"data", "model", "losses"}
CONDUCTS = MAKES | {"stages", "inference"}
WATCHES = CONDUCTS | {"config", "callbacks"}
RUNS = WATCHES | {"evaluation", "prepare"}
TOOLS = RUNS | {"trainer", "planning", "audit"}
STANDS_ON = {
    **dict.fromkeys(GROUND, GROUND),
    **dict.fromkeys(("data", "model", "losses"), GROUND),
    **dict.fromkeys(("stages", "inference"), MAKES),
    "config": MAKES | {"stages"},
    "callbacks": CONDUCTS | {"config"},
    "evaluation": WATCHES,
    "prepare": MAKES | {"stages", "config"},
    "trainer": RUNS,
    "planning": RUNS,
    "audit": TOOLS,
    "doctor": TOOLS,
    "shards_cli": MAKES,
    "model_cli": RUNS | {"shards_cli"},
    "cli": TOOLS | {"doctor", "shards_cli", "model_cli"},
    "__main__": {"cli"},
    "__init__": {"inference"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Yield every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_imported(path):
    return {name.split(".")[1] for name in imported(path) if name.startswith("vico_pl.")}


def test_there_are_modules_of_every_part():
    assert {part_of(path) for path in MODULES} == set(STANDS_ON)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_part_stands_on(path):
    part = part_of(path)
    assert parts_imported(path) <= STANDS_ON[part] | {part}


def test_losses_know_no_lightning():
    for path in (PACKAGE / "losses").glob("*.py"):
        assert not any(name.startswith(("lightning", "transformers")) for name in imported(path)), path


def test_data_knows_no_compression_ratio():
    for path in (PACKAGE / "data").glob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        names |= {node.arg for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.arg)}
        assert not any("ratio" in name.lower() and "aspect" not in name.lower() for name in names), path


def test_stages_open_no_file():
    for path in (PACKAGE / "stages").glob("*.py"):
        assert not any(name.split(".")[0] in ("pathlib", "os", "io", "shutil") for name in imported(path)), (
            path
        )
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert "open" not in names, path


def test_files_and_functions_stay_within_their_limits():
    structure = load_benchmark("structure")
    found = structure.measure()
    for unit in ("longest file", "longest function", "median function"):
        assert 0 < found[f"lines of the {unit}"] <= structure.LIMITS[f"lines of the {unit}"]
