"""Commands, options, settings, files and links on the pages for users exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from tests.support.folders import write_model_folder
from tests.support.tiny import encoded_image
from vico_pl.cli import app
from vico_pl.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "data" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "recipes" / "smollm2" / "README.md",
]
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
OPTIONAL = re.compile(r"\s\[([^\]]*)\]")  # [--budget 0.5], but not the brackets of key=[value]
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*(\.\w+)?")  # DIR, N, FILE.yaml


def lines_of_code(page):
    """Every line of a fenced block, and every piece of code in a sentence; says which is a whole line."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(FENCE.findall(text)).replace("\\\n", " ")
    whole = [(line.strip(), True) for line in blocks.splitlines()]
    return whole + [(code, False) for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]


def commands(program, *, pages=PAGES):
    """Each mention of a program with its arguments, and whether it is a whole line."""
    found = []
    for page in pages:
        for code, whole in lines_of_code(page):
            line = re.sub(r"^(\$ )?(\.venv/bin/)?", "", code)
            if line.split()[:1] == [program]:
                found.append(pytest.param(line, whole, id=f"{page.relative_to(ROOT)}: {line[:70]}"))
    return found


def phony_targets():
    text = (ROOT / "Makefile").read_text()
    return {name for line in re.findall(r"^\.PHONY: (.*)", text, re.MULTILINE) for name in line.split()}


def resolve(words):
    """Return the command that the words of a `vico` line name, and the remaining words."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no command '{words[0]}'"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def settings(line):
    """The recipe and the key=value settings of a training command."""
    words = shlex.split(line)
    given = dict(word.split("=", 1) for word in words if re.match(r"(RECIPE|ARGS)=", word))
    if words[0] == "make":
        return given["RECIPE"], shlex.split(given.get("ARGS", ""))
    return words[2], words[3:]


def test_the_readme_names_the_main_commands():
    assert {"demo", "test"} <= {param.values[0].split()[1] for param in commands("make", pages=PAGES[:1])}
    assert len(commands("vico", pages=PAGES[:1])) >= 5


@pytest.mark.parametrize(("line", "_whole"), commands("make"))
def test_a_make_target_exists(line, _whole):
    words = [word for word in shlex.split(line, comments=True)[1:] if "=" not in word]
    assert set(words) <= phony_targets()


@pytest.mark.parametrize(("line", "whole"), commands("vico"))
def test_a_vico_command_is_understood(line, whole):
    command, words = resolve(shlex.split(OPTIONAL.sub("", line), comments=True)[1:])
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line))
    assert named <= known, f"no option {named - known}"
    if whole and not hasattr(command, "commands"):
        command.make_context("vico", ["1" if PLACEHOLDER.fullmatch(word) else word for word in words])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_shows_help(page, capsys):
    for param in commands("vico", pages=[page]):
        command, _ = resolve(shlex.split(OPTIONAL.sub("", param.values[0]), comments=True)[1:])
        with pytest.raises(SystemExit) as stop:
            command.main(["--help"], prog_name="vico")
        assert stop.value.code == 0
        assert "--help" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "_whole"),
    [
        param
        for param in [*commands("make"), *commands("vico")]
        if re.search(r"RECIPE=recipes/|vico train recipes/", param.values[0])
    ],
)
def test_settings_that_a_training_command_gives_are_accepted(line, _whole):
    recipe, overrides = settings(line)
    config = load_config(ROOT / recipe, overrides)
    for override in overrides:
        key, value = override.split("=", 1)
        if key == "run_dir":
            assert config.run_dir == value


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_are_there(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    local = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    missing = [link for link in local if link and not (page.parent / link).exists()]
    assert missing == []
    if page.name == "README.md" and page.parent == ROOT:
        assert any(link.endswith(".png") for link in local), "the first screen shows a picture"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_the_project_that_code_names_are_there(page):
    words = [word for line, _ in lines_of_code(page) for word in re.findall(r"[\w./-]+", line)]
    named = {word for word in words if re.match(r"(recipes|vico_pl|tests|benchmarks)/", word)}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_python_of_the_readme_runs_as_written(tmp_path, monkeypatch, capsys):
    write_model_folder(tmp_path / "runs" / "demo" / "router" / "model", threshold=0.5)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded_image("PNG", size=(64, 64)))
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGES[0].read_text(), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    first, ratios = capsys.readouterr().out.splitlines()[:2]
    assert first.endswith(" of 20 vision tokens")
    assert set(json.loads(ratios)) <= {4, 16}
