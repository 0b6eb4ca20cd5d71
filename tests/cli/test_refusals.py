"""Wrong input gives one sentence and exit code 2, and leaves nothing half-written."""

import shutil
import subprocess
import sys
import tarfile

import pytest

import vico_pl.prepare
from tests.sessions import tree
from vico_pl.model.families.base import CALIBRATION_NAME, CONFIG_NAME
from vico_pl.model.families.tensors import WEIGHTS_NAME
from vico_pl.prepare import prepare_run


def test_an_unknown_recipe_key_is_refused_with_what_was_probably_meant(refused, recipe, tmp_path):
    sentence = refused("train", recipe(), "router.windw=8", "optim.lrr=1")
    assert "unknown key router.windw (did you mean router.window?)" in sentence
    assert "unknown key optim.lrr (did you mean optim.lr?)" in sentence
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_is_refused(refused, tmp_path):
    assert refused("train", tmp_path / "absent.yaml").startswith(f"{tmp_path}/absent.yaml: no such recipe")


def test_training_on_a_missing_or_empty_shard_folder_leaves_no_run_behind(refused, recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, expected in (
        ("absent", "no such folder of shards"),
        ("empty", "no shard found; expected names such as"),
    ):
        sources = f"data.sources=[{{path: {tmp_path / name}}}]"
        assert expected in refused("train", recipe(), sources)
        assert not (tmp_path / "run").exists(), "the corrected command meets no run with other settings"


def test_training_from_a_model_without_weights_leaves_no_run_behind(refused, recipe, model, tmp_path):
    (model / WEIGHTS_NAME).unlink()
    assert refused("train", recipe()).startswith(f"{model}: no {WEIGHTS_NAME}")
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_begun_is_kept_when_it_is_refused(refused, recipe, model, tmp_path):
    prepare_run(recipe(), [])
    (tmp_path / "run" / "checkpoints").mkdir()
    (model / WEIGHTS_NAME).unlink()
    refused("train", recipe())
    assert (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("command", ["check", "stats", "index", "preview"])
def test_looking_into_a_missing_or_empty_folder_is_refused(refused, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "empty: no shard found" in refused("shards", command, tmp_path / "empty")
    refused("shards", command, tmp_path / "absent")
    assert tree(tmp_path) == {}


def test_a_model_folder_without_weights_is_refused_by_every_command(
    refused, model, answered, photo, tmp_path
):
    (model / WEIGHTS_NAME).unlink()
    before = tree(tmp_path)
    for command in (
        ["calibrate", model, "--data", answered],
        ["eval", model, "--data", answered],
        ["route", model, photo, "--output", tmp_path / "new" / "routed.png"],
        ["generate", model, photo, "--prompt", "What?"],
    ):
        assert refused(*command).startswith(f"{model}: no {WEIGHTS_NAME}; a model folder holds")
    assert tree(tmp_path) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (WEIGHTS_NAME, "no readable weights"),
        ("tokenizer.json", "its tokenizer files are incomplete or unreadable"),
        ("tokenizer_config.json", "its tokenizer files are incomplete or unreadable"),
        (CONFIG_NAME, CONFIG_NAME),
    ],
)
@pytest.mark.parametrize("content", [b"{", b""])
def test_a_damaged_model_folder_is_refused_by_its_name(refused, model, photo, name, expected, content):
    (model / name).write_bytes(content)
    sentence = refused("generate", model, photo, "--prompt", "What?")
    assert sentence.startswith(str(model))
    assert expected in sentence


def test_a_model_without_its_tokenizer_is_refused_by_its_name(refused, model, photo):
    (model / "tokenizer.json").unlink()
    sentence = refused("generate", model, photo, "--prompt", "What?")
    assert sentence.startswith(f"{model}: its tokenizer files are incomplete or unreadable")


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"shards": [{"name": "a.tar"}]}', '{"shards": 3}'])
def test_a_damaged_index_is_refused_with_the_remedy(refused, shards, tmp_path, content):
    folder = shutil.copytree(shards, tmp_path / "shards")
    (folder / "index.json").write_text(content)
    remedy = f"'vico shards index {folder}' rebuilds it"
    assert refused("shards", "check", folder) == f"{folder}/index.json: unreadable; {remedy}"


def test_an_override_that_does_not_fit_the_recipe_is_refused(refused, recipe):
    assert str(recipe()) in refused("train", recipe(), "data.sources.0.path=x")


def test_an_image_that_is_none_is_refused(refused, model, tmp_path):
    note = tmp_path / "note.png"
    note.write_text("not an image")
    for path, expected in (
        (note, "expected a jpg, jpeg, png, webp file"),
        (tmp_path / "absent.png", "no such file"),
    ):
        assert expected in refused("generate", model, path, "--prompt", "What?")
        assert str(path) in refused("route", model, path, "--output", tmp_path / "routed.png")
    assert not (tmp_path / "routed.png").exists()


def test_a_picture_of_an_unknown_format_is_refused(refused, model, photo, tmp_path):
    sentence = refused("route", model, photo, "--output", tmp_path / "routed.xyz")
    assert sentence == "unknown file extension: .xyz"
    assert not (tmp_path / "routed.xyz").exists()


def test_routing_without_calibration_is_refused(refused, model, photo, answered, tmp_path):
    (model / CALIBRATION_NAME).unlink()
    sentence = refused("route", model, photo, "--output", tmp_path / "routed.png")
    assert sentence.endswith("run 'vico calibrate' on a model of stage router")
    assert "run 'vico calibrate' on it first" in refused("eval", model, "--data", answered)
    assert not (model / "report").exists()


def test_evaluating_on_a_missing_or_empty_folder_is_refused(refused, model, tmp_path):
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    for command in ("eval", "calibrate"):
        assert "no such folder of shards" in refused(command, model, "--data", tmp_path / "absent")
        assert "no shard found" in refused(command, model, "--data", tmp_path / "empty")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("value", ["half", "50%", "-0.1", "1.5"])
def test_an_unreadable_budget_is_refused(vico, model, answered, value):
    before = tree(model)
    code, out, err = vico("calibrate", model, "--data", answered, "--budget", value)
    assert (code, out) == (2, "")
    assert "Invalid value for '--budget'" in err
    assert tree(model) == before


@pytest.mark.parametrize("value", ["0.2", "0"])
def test_a_budget_that_cannot_be_met_is_refused_before_anything_is_measured(refused, model, answered, value):
    sentence = refused("calibrate", model, "--data", answered, "--budget", value)
    assert sentence == f"budget {float(value)} cannot be met: all tiles compressed cost 0.25"


@pytest.mark.parametrize(
    "arguments",
    [
        ["shards", "glyphs", "--num-samples", "0"],
        ["shards", "glyphs", "--samples-per-shard", "0"],
        ["shards", "build", "--annotations", "a", "--images", "b", "--samples-per-shard", "0"],
    ],
)
def test_sets_of_no_samples_are_refused(vico, tmp_path, arguments):
    code, _, err = vico(*arguments, "--output", tmp_path / "out")
    assert code == 2
    assert f"Invalid value for '{arguments[-2]}'" in err
    assert not (tmp_path / "out").exists()


def test_checking_tars_without_records_is_refused(refused, tmp_path):
    folder, note = tmp_path / "tars", tmp_path / "note"  # a name without an ending is no member of a record
    folder.mkdir()
    note.write_text("x")
    with tarfile.open(folder / "a-0.tar", "w") as tar:
        tar.add(note, arcname="note")
    expected = f"{folder}: no records; expected members KEY.json, KEY.jpg (data/README.md)"
    assert refused("shards", "check", folder) == expected


def test_an_accelerator_that_the_machine_lacks_is_refused(refused, recipe):
    assert "trainer: " in refused("train", recipe(), "trainer.accelerator=tpu")


def test_settings_that_no_image_can_meet_are_refused(refused, tmp_path):
    sentence = refused("shards", "glyphs", "--output", tmp_path / "out", "--max-tiles", "7")
    assert sentence == "max_tiles is 7; expected 1 to 6"
    assert not (tmp_path / "out").exists()


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
