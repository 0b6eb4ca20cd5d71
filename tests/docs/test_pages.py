"""Each command and each Python block of the documentation is run here, or the page says what it needs.

A block without a language holds commands. If the line before it is `*Needs: ...*` it is not run; its commands
are then only parsed (tests/test_readme.py): they exist, with these options, and recipes accept the settings.
All others are run, line by line and in the order of the page, in a folder that looks like a checkout after
`make demo`, with tiny models. Python blocks include a file that test_examples.py runs, or are marked as well.
"""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import vico_pl.cli
from docs.hooks import SOURCE, settings_tables, source_of
from tests.support.folders import answered_records, write_model_folder, write_set
from tests.support.tiny import encoded_image
from tests.test_readme import PAGES
from vico_pl.data.glyphs import GlyphsConfig, draw_records
from vico_pl.inference.predictor import Predictor

ROOT = Path(__file__).parents[2]
DOCS = [page for page in PAGES if page.is_relative_to(ROOT / "docs") or page.is_relative_to(ROOT / "data")]
BLOCK = re.compile(r"(?:^(\*Needs: .+?\*)\n\n)?^```([a-z]*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMANDS, OUTPUT = ("",), ("text", "json", "yaml", "message", "formula")
IN_TEST_EXAMPLES = ("python examples/evaluate.py runs/demo/router/model 10",)
TRAIN_HERE = ["trainer.log_every=1", "data.batch_size=2", "data.num_workers=0", "optim.warmup_steps=0"]
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def blocks(page):
    """(what it needs or nothing, language, text) of each block."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands_to_run(page):
    texts = [text for needs, language, text in blocks(page) if language in COMMANDS and not needs]
    lines = [line for text in texts for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [line.removeprefix(".venv/bin/") for line in lines if line not in IN_TEST_EXAMPLES]


@pytest.fixture(scope="session")
def after_demo(tmp_path_factory):
    """A folder like a checkout after `make demo`, with a tiny model that answers its own sets."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "examples", "docs", "Makefile", "data/base", "tests"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(ROOT / name)
    model = write_model_folder(folder / "runs" / "demo" / "router" / "model", threshold=0.5)
    predictor = Predictor.load(model)
    for number, name in enumerate(("calibration", "val")):
        records = answered_records(predictor, count=8, seed=10 * number)
        named_jpg = [(key, {"jpg": files["png"], "json": files["json"]}) for key, files in records]
        write_set(folder / "data" / "shards" / "glyphs" / name, named_jpg)
    glyphs = list(draw_records(GlyphsConfig(max_tiles=2), seed=1, start=0, count=8))
    write_set(folder / "data" / "shards" / "glyphs" / "train", glyphs)
    (folder / "images").mkdir()
    for name in ("a.png", "b.png", "page.png", "images/a.png", "00000006.jpg"):
        (folder / name).write_bytes(encoded_image("PNG", size=(64, 64)))
    text = (ROOT / "docs" / "own-data.md").read_text()
    (line,) = re.findall(r"^```json\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (folder / "train.jsonl").write_text(line)
    return folder


@pytest.fixture
def execute(after_demo, monkeypatch, capsys):
    """Run a command in that folder, those of Python in this process; it must end with exit code 0."""
    monkeypatch.chdir(after_demo)

    def execute(line):
        program, *words = shlex.split(line, comments=True)
        if program == "vico":
            words += TRAIN_HERE if words[0] == "train" else []
            monkeypatch.setattr(sys, "argv", ["vico", *words])
            with pytest.raises(SystemExit) as stop:
                vico_pl.cli.main()
            assert stop.value.code in (0, None), capsys.readouterr().err
        elif program == "python":
            monkeypatch.setattr(sys, "argv", words)
            runpy.run_path(words[0], run_name="__main__")
        else:
            assert program in ("make", "tail", "tar"), f"mark what '{line}' needs"
            subprocess.run([program, *words], check=True, cwd=ROOT if program == "make" else after_demo)

    return execute


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_block_is_commands_code_or_output(page):
    assert {language for _, language, _ in blocks(page)} <= {*COMMANDS, *OUTPUT, "python"}
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks(page))


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page, execute):
    for line in commands_to_run(page):
        execute(line)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_is_a_tested_file_or_marked(page):
    unmarked = [text for needs, kind, text in blocks(page) if kind == "python" and not needs]
    tested = (ROOT / "tests" / "docs" / "test_examples.py").read_text(encoding="utf-8")
    for text in unmarked:
        (path,) = re.findall(r'^--8<-- "(.+)"$', text, re.MULTILINE)
        assert f'load("{path}")' in tested


def test_the_documentation_builds_without_a_warning(tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # it formats code by ruff
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data/README.md" in (tmp_path / "study.html").read_text()


def test_most_commands_are_run():
    assert sum(len(commands_to_run(page)) for page in DOCS) >= 12


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\[`([A-Za-z_.]+)`\]\((?:\.\./)+(\S+?\.py)\)", text)
    named = [(path, name) for name, path in links if not name.endswith(".py")]
    for path, name in [*named, *SOURCE.findall(text)]:
        assert source_of(path, name)
    for module, name in re.findall(r"(?:::: |\]\[)(vico_pl[\w.]*)\.(\w+)", text):
        assert source_of(f"{module.replace('.', '/')}.py", name)


def messages():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^```message\n(.*?)\n```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def said():
    """All strings of the code, with fields as <>; fields that are constants are filled in."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "vico_pl").rglob("*.py")]
    constants = {}
    for node in (node for tree in trees for node in tree.body):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            constants |= {t.id: str(node.value.value) for t in node.targets if isinstance(t, ast.Name)}

    def text(node):
        if isinstance(node, ast.Constant):
            return str(node.value)
        is_name = isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name)
        return constants.get(node.value.id, "<>") if is_name else "<>"

    return [
        "".join(map(text, node.values if isinstance(node, ast.JoinedStr) else [node]))
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]


@pytest.mark.parametrize("message", messages(), ids=lambda message: message[:50])
def test_a_message_of_the_troubleshooting_page_is_still_in_the_code(message, said):
    parts = [part.strip(" ;:,()") for part in re.split(r"; |<[\w.]+>|(?<=unknown key) optim\.\w+", message)]
    for part in (part for part in parts if len(part) > 2 and part != "->"):
        assert any(part in text for text in said), f"no message says '{part}'"


def test_ten_messages_are_explained():
    assert len(messages()) >= 10


def test_the_page_of_settings_has_all_of_them_with_a_meaning():
    rows = [line.split(" | ") for line in settings_tables().splitlines() if line.startswith("| `")]
    by_name = {cells[0].strip("| `"): cells[1:] for cells in rows}
    assert by_name["trainer.log_every"][:2] == ["int", "`10`"]
    assert by_name["data.sources.N.path"][:2] == ["str", "required"]
    assert by_name["optim.max_grad_norm"][2].startswith("of all gradients together")
    assert [name for name, cells in by_name.items() if not cells[2].strip(" |")] == []
