"""Invalid input ends with one sentence, exit code 2 and nothing half-written."""

import shlex
import subprocess
import sys
import tarfile

import pytest

import vico_pl.prepare
from tests.support.folders import tree
from vico_pl.model.families.base import CALIBRATION_NAME, CONFIG_NAME, WEIGHTS_NAME
from vico_pl.prepare import prepare_run

INSPECT = ("check", "stats", "index", "preview")
GENERATE = "generate {model} {photo} --prompt What?"
ROUTE = "route {model} {photo} --output {here}/new/routed.png"
BAD_TOKENIZER = "{model}: its tokenizer files are incomplete or unreadable"


@pytest.fixture
def places(recipe, model, answered, photo, tmp_path, monkeypatch):
    """Fill in a command: a recipe, a model folder, questions, a photo, and things that cannot be used."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.png").write_text("not an image")
    known = {"recipe": recipe(), "model": model, "answered": answered, "photo": photo, "here": tmp_path}
    return lambda text: text.format(**known)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("train {recipe} router.windw=8", "unknown key router.windw (did you mean router.window?)"),
        ("train {here}/absent.yaml", "{here}/absent.yaml: no such recipe"),
        ("train {recipe} 'data.sources=[{{path: {here}/absent}}]'", "no such folder of shards"),
        ("train {recipe} 'data.sources=[{{path: {here}/empty}}]'", "no shard found; expected names such as"),
        ("train {recipe} data.sources.7.path=x", "{recipe}"),
        ("train {recipe} trainer.accelerator=tpu", "trainer: "),
        ("plan {recipe} model.path=someone/something", "someone/something: its shape is not known here"),
        *((f"shards {name} {{here}}/absent", "no such folder of shards") for name in INSPECT),
        *((f"shards {name} {{here}}/empty", "empty: no shard found") for name in INSPECT),
        ("export {here}/a.ckpt {here}/new --layout hf", "a checkpoint becomes a folder in our layout"),
        ("export {here}/a.ckpt {here}/new", "expected a checkpoint in RUN/checkpoints"),
        (
            "train {recipe} 'data.validation=[{{name: a, path: {here}/empty}}]' trainer.validate_every=1",
            "no shard found",
        ),
        ("shards glyphs --output {here}/out --max-tiles 7", "max_tiles is 7; expected 1 to 6"),
        ("eval {model} --data {here}/absent", "no such folder of shards"),
        ("eval {model} --data {here}/empty", "no shard found"),
        ("calibrate {model} --data {here}/absent", "no such folder of shards"),
        ("calibrate {model} --data {here}/empty", "no shard found"),
        (
            "calibrate {model} --data {answered} --budget 0.2",
            "budget 0.2 cannot be met: all tiles compressed cost 0.25",
        ),
        ("generate {model} {here}/note.png --prompt What?", "expected a jpg, jpeg, png, webp file"),
        ("generate {model} {here}/absent.png --prompt What?", "{here}/absent.png: no such file"),
        ("embed {model} {here}/note.png --output {here}/new/a.safetensors", "{here}/note.png"),
        ("embed {model} {here}/empty --output {here}/new", "{here}/empty: no image in this folder"),
        ("route {model} {here}/note.png --output {here}/routed.png", "{here}/note.png"),
        ("route {model} {here}/absent.png --output {here}/routed.png", "{here}/absent.png"),
        ("route {model} {photo} --output {here}/routed.xyz", "unknown file extension: .xyz"),
    ],
)
@pytest.mark.filterwarnings("ignore:model.reference is not set")
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    refused, places, tmp_path, command, expected
):
    before = tree(tmp_path)
    assert places(expected) in refused(*shlex.split(places(command)))
    assert tree(tmp_path) == before
    assert not (tmp_path / "run").exists(), "the corrected command meets no run with other settings"


@pytest.mark.parametrize(
    ("name", "content", "command", "expected"),
    [
        *(
            (WEIGHTS_NAME, None, command, f"{{model}}: no {WEIGHTS_NAME}")
            for command in (
                "train {recipe}",
                "calibrate {model} --data {answered}",
                "eval {model} --data {answered}",
                ROUTE,
                GENERATE,
            )
        ),
        ("tokenizer.json", None, GENERATE, BAD_TOKENIZER),
        *(("tokenizer.json", content, GENERATE, BAD_TOKENIZER) for content in ("{", "")),
        *(("tokenizer_config.json", content, GENERATE, BAD_TOKENIZER) for content in ("{", "")),
        *((WEIGHTS_NAME, content, GENERATE, "no readable weights") for content in ("{", "")),
        *((CONFIG_NAME, content, GENERATE, f"{{model}}/{CONFIG_NAME}") for content in ("{", "")),
        (CALIBRATION_NAME, None, ROUTE, "run 'vico calibrate' on a model of stage router"),
    ],
)
def test_a_model_folder_that_lacks_something_is_refused_by_its_name(
    refused, places, model, tmp_path, name, content, command, expected
):
    (model / name).unlink()
    if content is not None:
        (model / name).write_text(content)
    before = tree(tmp_path)
    sentence = refused(*shlex.split(places(command)))
    assert sentence.startswith(str(model))
    assert places(expected) in sentence
    assert tree(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_a_run_that_has_begun_is_kept_when_it_is_refused(refused, recipe, model, tmp_path):
    prepare_run(recipe(), [])
    (tmp_path / "run" / "checkpoints").mkdir()
    (model / WEIGHTS_NAME).unlink()
    refused("train", recipe())
    assert (tmp_path / "run" / "config.yaml").exists()


def test_checking_tars_without_records_is_refused(refused, tmp_path):
    folder, note = tmp_path / "tars", tmp_path / "note"  # a name without an ending is no member of a record
    folder.mkdir()
    note.write_text("x")
    with tarfile.open(folder / "a-0.tar", "w") as tar:
        tar.add(note, arcname="note")
    expected = f"{folder}: no records; expected members KEY.json, KEY.jpg (data/README.md)"
    assert refused("shards", "check", folder) == expected


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(
            (f"calibrate {{model}} --data {{answered}} --budget {value}", "--budget")
            for value in ("half", "50%", "-0.1", "1.5")
        ),
        ("shards glyphs --output {here}/out --num-samples 0", "--num-samples"),
        ("shards glyphs --output {here}/out --samples-per-shard 0", "--samples-per-shard"),
        (
            "shards build --annotations a --images b --output {here}/out --samples-per-shard 0",
            "--samples-per-shard",
        ),
    ],
)
def test_values_that_an_option_cannot_have_are_refused(vico, places, tmp_path, command, option):
    before = tree(tmp_path)
    code, out, err = vico(*shlex.split(places(command)))
    assert (code, out) == (2, "")
    assert f"Invalid value for '{option}'" in err
    assert tree(tmp_path) == before


def test_a_process_of_its_own_ends_with_the_code_and_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "vico_pl", "shards", "check", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"vico: {tmp_path}/absent: no such folder of shards")
    assert done.stderr.count("\n") == 1


def test_an_interrupted_command_says_so(vico, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(vico_pl.prepare, "prepare_run", interrupt)
    code, out, err = vico("train", tmp_path / "recipe.yaml")
    assert (code, out) == (130, "")
    assert err.endswith("vico: interrupted; the same command resumes\n")
