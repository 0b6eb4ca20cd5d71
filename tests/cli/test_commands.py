"""What the commands print, write and end with."""

import json
import os
import re
import shlex
import shutil
import sys
from importlib.metadata import version

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from typer.main import get_command

import vico_pl.cli
import vico_pl.evaluation.questions
import vico_pl.files
from tests.support.folders import tree, write_model_folder, write_set
from tests.support.tiny import encoded_image, record
from vico_pl.data.shards.reader import read_samples
from vico_pl.files import write_json
from vico_pl.inference.predictor import Predictor
from vico_pl.model.families.base import CALIBRATION_NAME, CONFIG_NAME
from vico_pl.prepare import prepare_run

# Shards are drawn by several processes at once, as users have it.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def pixels(path):
    with PIL.Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_the_version_is_that_of_the_package(vico):
    assert vico("--version") == (0, f"vico_pl {version('vico_pl')}\n", "")


def test_glyphs_are_drawn_counted_checked_and_shown(vico, tmp_path):
    folder = tmp_path / "glyphs"
    settings = ["--num-samples", "5", "--samples-per-shard", "3", "--max-tiles", "2", "--questions", "2"]
    code, out, _ = vico("shards", "glyphs", "--output", folder, *settings)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert (code, out) == (0, f"{folder}: 5 samples in 2 shards, {num_bytes:,} bytes\n")
    code, out, _ = vico("shards", "stats", folder)
    counts = dict(line.rsplit(maxsplit=1) for line in out.splitlines())
    num_answers = sum(len(sample.turns) // 2 for sample in read_samples(folder))
    assert (code, counts["shards"], counts["samples"]) == (0, "2", "5")
    assert int(counts["answers"]) == num_answers >= 5
    assert vico("shards", "check", folder)[:2] == (0, f"{folder}: all 5 records are usable\n")
    picture = tmp_path / "new" / "sheet.png"
    assert vico("shards", "preview", folder, "--output", picture, "--count", "3")[0] == 0
    shown, everything = pixels(picture), tmp_path / "all.png"
    vico("shards", "preview", folder, "--output", everything)
    assert pixels(everything).shape[0] > shown.shape[0], "three samples take one row, five take two"
    vico("shards", "glyphs", "--output", tmp_path / "other", *settings, "--seed", "1")
    first, second = (next(read_samples(path)) for path in (folder, tmp_path / "other"))
    assert first.turns != second.turns


def test_check_names_every_bad_record_and_fails(vico, tmp_path):
    entries = [
        ("good", record().files),
        ("cut", record(files={"jpg": b"\xff\xd8"}).files),
        ("0", {"json": b"["}),
    ]
    folder = write_set(tmp_path / "set", entries)
    code, out, err = vico("shards", "check", folder)
    assert (code, out) == (1, "")
    first, second = err.splitlines()
    assert first.startswith("set-000000.tar/cut: image 'jpg' (2 bytes)")
    assert second.startswith("set-000000.tar/0: JSON")


def test_foreign_tars_are_indexed(vico, tmp_path, shards):
    folder = tmp_path / "foreign"
    folder.mkdir()
    for path in shards.glob("*.tar"):
        shutil.copy(path, folder)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.tar"))
    expected = f"{folder}: 18 samples in 3 shards, {num_bytes:,} bytes\n"
    assert vico("shards", "index", folder)[:2] == (0, expected)
    one = f"{folder}/train-00000[0].tar"
    assert vico("shards", "index", one)[1].startswith(f"{one}: 7 samples in 1 shards, ")
    assert (folder / "index.json").exists()


@pytest.mark.filterwarnings("ignore:.*set-000001.tar. named in index.json but absent:UserWarning")
def test_build_packs_what_is_usable_of_several_files_and_names_the_rest(vico, tmp_path, photo, model):
    images, folder, picture = tmp_path / "images", tmp_path / "set", tmp_path / "new" / "stats.png"
    images.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(photo, images / name)

    def entry(text, image):
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}]
        return {"conversations": turns, "image": image}

    lines = [
        entry("<image>\nOne?", "a.png"),
        entry("<image>\nAbsent?", "absent.png"),
        entry("<image>\nOutside?", "../photo.png"),
        entry("<image><image>\nTwo?", ["a.png", "b.png"]),
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "list.json").write_text(json.dumps([entry("<image>\nThree?", "b.png")]))
    files = [part for name in ("train.jsonl", "list.json") for part in ("--annotations", tmp_path / name)]
    arguments = [*files, "--images", images, "--output", folder, "--shard-size", "0.001", "--workers", "2"]
    code, out, err = vico("shards", "build", *arguments)
    assert (code, out) == (1, f"{folder}: 3 samples in 3 shards, 40,960 bytes\n")
    absent, outside = (line for line in err.splitlines() if line.startswith("train.jsonl:"))
    assert absent == "train.jsonl:2: image 'absent.png' is absent"
    assert outside.startswith("train.jsonl:3: image path '../photo.png' leads out of")
    assert [len(sample.images) for sample in read_samples(folder)] == [1, 2, 1]

    code, out, _ = vico("shards", "stats", f"{folder}/set-00000[12].tar", "--output", picture)
    counts = dict(line.rsplit(maxsplit=1) for line in out.splitlines()[:-1])
    assert (code, counts["samples"], counts["text bytes"]) == (0, "2", "39")
    assert pixels(picture).shape[1] == 1440
    code, out, _ = vico("shards", "stats", folder, "--tokenizer", model)
    assert (code, "text tokens" in out) == (0, True)
    (folder / "set-000001.tar").unlink()
    code, _, err = vico("shards", "check", folder)
    assert (code, err.count("set-000001.tar, sample 1 of the set")) == (1, 1)


def test_what_follows_a_question_mark_is_not_shown(refused):
    assert "hush" not in refused("shards", "check", "memory://nowhere/set?hush")


def test_a_finished_run_says_so_and_trains_nothing(vico, refused, recipe, tmp_path):
    prepare_run(recipe(), [])
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / CONFIG_NAME).write_text("{}")
    before = tree(tmp_path)
    next_step = f"Next: vico calibrate {tmp_path}/run/model --data SHARDS, with held-out shards\n"
    code, out, _ = vico("train", recipe())
    assert (code, out) == (0, f"{tmp_path}/run is finished: its model is {tmp_path}/run/model\n{next_step}")
    assert "seed: 0 -> 3" in refused("train", recipe(), "seed=3")
    assert tree(tmp_path) == before


def test_calibrate_writes_the_threshold_that_sessions_use(vico, model, answered):
    code, out, _ = vico("calibrate", model, "--data", answered, "--budget", "0.6")
    stored = json.loads((model / CALIBRATION_NAME).read_text())
    assert code == 0
    assert f"threshold {stored['threshold']:.4f}" in out
    assert Predictor.load(model).rule.threshold == stored["threshold"]
    assert stored["chosen"]["token_fraction"] <= 0.6
    assert (stored["budget"], stored["data"]) == (0.6, str(answered))


def test_calibrate_says_what_is_certain_and_how_many_images_would_show_more(vico, model, answered):
    def calibrated(retention):
        code, out, _ = vico("calibrate", model, "--data", answered, "--retention", retention)
        assert code == 0
        return out, json.loads((model / CALIBRATION_NAME).read_text())

    out, stored = calibrated("0.1")
    kept, sure = stored["chosen"]["retention"]["mean"], stored["chosen"]["retention_bound"]
    assert f"{kept:.2%} of the accuracy, at least {sure:.2%} with 97.5 % certainty" in out
    assert stored["chosen"]["token_fraction"] < 1
    out, stored = calibrated("0.5")  # in the mean over three skills
    assert "no threshold is sure to keep 50.00% of the accuracy, so nothing is compressed" in out
    fewer, number = stored["promising"]["token_fraction"], stored["promising"]["images_needed"]
    assert number > 8
    asked = stored["chosen"]["num_images"]
    assert f"{fewer:.1%} may keep it, too: about {number} images, not {asked}, would show it" in out


@torch.no_grad()
def test_a_threshold_is_chosen_and_exported_in_one_dtype(vico, model, answered, tmp_path):
    assert vico("calibrate", model, "--data", answered, "--budget", "0.6", "--dtype", "bfloat16")[0] == 0
    stored = json.loads((model / CALIBRATION_NAME).read_text())
    session = Predictor.load(model, dtype=torch.bfloat16)
    ratios = [session.choose_ratios(session.encode(sample.tiles)) for sample in session.samples(answered)]
    spent = (4 / torch.cat(ratios)).mean().item()
    assert (stored["dtype"], stored["chosen"]["token_fraction"]) == ("bfloat16", pytest.approx(spent))
    export = ["export", model, "--layout", "ours"]
    assert vico(*export[:2], tmp_path / "same", *export[2:], "--dtype", "bfloat16")[0] == 0
    with pytest.warns(UserWarning, match="chosen with weights of bfloat16, this export has float32"):
        assert vico(*export[:2], tmp_path / "other", *export[2:])[0] == 0


def test_calibrate_refuses_a_model_that_is_never_right_and_measures_agreement_without_skills(
    vico, refused, model, tmp_path
):
    def set_of(skill):
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "no: zz"}]
        annotation = json.dumps({"conversations": turns, "skills": [skill]}).encode()
        files = {"png": encoded_image("PNG", size=(64, 64)), "json": annotation}
        return write_set(tmp_path / str(skill), [("0", files)])

    message = "0 % right at full tokens, so there is no accuracy to keep"
    assert message in refused("calibrate", model, "--data", set_of("ocr"), "--budget", "0.6")
    code, out, _ = vico("calibrate", model, "--data", set_of(None), "--budget", "0.6")
    assert (code, "agreement with full tokens on the answers of the data" in out) == (0, True)


def test_a_disk_that_is_full_leaves_the_old_calibration(refused, model, answered, monkeypatch):
    before = tree(model)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vico_pl.files.os, "fsync", full)
    monkeypatch.setattr(vico_pl.evaluation.questions, "tqdm", lambda groups, **_: groups)
    assert "No space left on device" in refused("calibrate", model, "--data", answered)
    assert tree(model) == before


def test_eval_writes_report_and_page(vico, model, answered, tmp_path):
    output = tmp_path / "report"
    code, out, _ = vico("eval", model, "--data", answered, "--output", output)
    assert code == 0
    report = json.loads((output / "report.json").read_text())
    assert (report["model"], report["dataset"]) == (str(model), str(answered))
    scored = {"router", "random", "pixel_detail", "statistics", "oracle"}
    assert report["arms"].keys() == {"full", "all_compressed", "downsample", *scored}
    assert "What is" in (output / "report.html").read_text(), "the gallery shows questions"
    assert "all compressed" in out
    assert sorted(path.name for path in output.iterdir()) == ["report.html", "report.json"]


def test_route_draws_the_picture_and_counts_compressed_tiles(vico, model, photo, tmp_path):
    counts = []
    for threshold in (0.0, 1.1):
        write_json({"threshold": threshold}, model / CALIBRATION_NAME)
        picture = tmp_path / "new" / f"{threshold}.png"
        code, out, _ = vico("route", model, photo, "--output", picture)
        counts.append(out.split(";")[0])
        assert code == 0
        assert min(pixels(picture).shape[:2]) > 100
    assert counts == ["5 of 5 tiles compressed", "0 of 5 tiles compressed"]
    dimmed, bright = (pixels(tmp_path / "new" / f"{threshold}.png") for threshold in (0.0, 1.1))
    assert dimmed.shape == bright.shape
    assert (dimmed != bright).mean() > 0.1


def test_generate_follows_the_router_and_the_limit_of_tokens(vico, photo, tmp_path):
    model = write_model_folder(tmp_path / "endless", ends=False)

    def answer(limit):
        code, out, _ = vico("generate", model, photo, "--prompt", "What is A?", "--max-new-tokens", limit)
        assert code == 0
        return out.strip()

    one, six = answer(1), answer(6)
    assert 0 < len(one) < len(six)
    assert six.startswith(one.rstrip("\ufffd"))
    write_json({"threshold": 0.0}, model / CALIBRATION_NAME)
    compressed = answer(6)
    write_json({"threshold": 1.1}, model / CALIBRATION_NAME)
    assert compressed != answer(6)


def test_generate_answers_each_image_or_all_together(vico, model, photo, tmp_path):
    folder, options = tmp_path / "photos", ["--prompt", "What is A?", "--max-new-tokens", "5"]
    folder.mkdir()
    for name, seed in (("b.PNG", 1), ("a.jpg", 2)):
        (folder / name).write_bytes(encoded_image("PNG", seed=seed))
    (folder / "notes.txt").write_text("no image")
    paths = [photo, folder / "a.jpg", folder / "b.PNG"]
    session = Predictor.load(model)
    texts = [answer.text for answer in session.generate(paths, ["What is A?"] * 3, max_new_tokens=5)]
    expected = "".join(f"{path}:\n{text}\n\n" for path, text in zip(paths, texts, strict=True))
    assert vico("generate", model, photo, folder, *options, "--batch-size", "2") == (0, expected, "")
    (one,) = session.generate([paths], ["What is A?"], max_new_tokens=5)
    assert vico("generate", model, photo, folder, *options, "--together")[1] == f"{one.text}\n"


def test_generate_writes_a_set_and_names_what_is_bad(vico, model, answered, tmp_path):
    records = [("a", {"png": encoded_image("PNG")}), ("cut", {"png": b"x"})]
    folder = write_set(tmp_path / "set", records)
    arguments = ["generate", model, "--data", folder, "--output", tmp_path / "own", "--prompt", "What?"]
    expected = f"{tmp_path / 'own'}: 1 samples in 1 shards\n"
    for _ in range(2):
        code, out, err = vico(*arguments)
        assert (code, out) == (1, expected)
        assert err.startswith("set-000000.tar/cut: image 'png' (1 bytes)")
    assert vico("shards", "check", tmp_path / "own")[0] == 0
    code, out, _ = vico("generate", model, "--data", answered, "--output", tmp_path / "two", "--top-p", "0.5")
    assert (code, out) == (0, f"{tmp_path / 'two'}: 8 samples in 1 shards\n")


def test_generate_asks_for_what_is_missing(refused, model, photo, answered, tmp_path):
    expected = "expected images with --prompt, or --data with --output; see 'vico generate --help'"
    assert refused("generate", model) == expected
    assert refused("generate", model, photo) == expected
    assert refused("generate", model, "--data", answered) == expected
    assert refused("generate", model, photo, "--data", answered, "--output", tmp_path / "x") == expected
    (tmp_path / "empty").mkdir()
    sentence = refused("generate", model, tmp_path / "empty", "--prompt", "What?")
    assert sentence == f"{tmp_path / 'empty'}: no image in this folder; expected jpg, jpeg, png, webp files"


def test_plan_prints_and_writes_the_same(vico, recipe, tmp_path):
    code, out, err = vico("plan", recipe(), "trainer.max_steps=20", "--json", tmp_path / "out" / "plan.json")
    assert (code, err) == (0, "")
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert written["samples"] == 40
    assert written["memory_gib"]["no_activation_checkpointing"]["1 GPU"]["policy weights"] > 0
    assert all(line in out for line in written["advice"])
    assert "20 steps of 2 samples" in out


def test_embed_writes_the_vision_tokens_of_an_image_or_of_each_image_of_a_folder(
    vico, model, photo, tmp_path
):
    one, folder = tmp_path / "new" / "photo.safetensors", tmp_path / "all"
    code, out, _ = vico("embed", model, photo, "--output", one)
    spent = len(load_file(one)["image_embeds"])
    assert (code, out) == (0, f"1 images: {spent} of 20 vision tokens; {one} is written\n")
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(photo.read_bytes())
    (images / "notes.txt").write_text("no image")
    code, out, _ = vico("embed", model, images, "--output", folder)
    assert (code, out.partition(";")[0]) == (0, f"2 images: {2 * spent} of 40 vision tokens")
    assert set(tree(folder)) == {folder / "a.png.safetensors", folder / "b.png.safetensors"}


def test_serve_says_what_it_is_for_and_refuses_a_folder_that_is_not_there(vico, refused, model, monkeypatch):
    uvicorn = pytest.importorskip("uvicorn")
    served = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: served.append(options))
    code, out, _ = vico("serve", model, "--port", "8123", "--max-tokens", "7")
    assert (code, [(one["host"], one["port"]) for one in served]) == (0, [("127.0.0.1", 8123)])
    assert "http://127.0.0.1:8123/" in out
    assert "not for production" in out
    assert vico("serve", model, "--image-dir", "absent")[0] == 2
    assert vico("serve", model, "--max-pixels", 10**10)[0] == 2
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert refused("serve", model) == "vico serve needs uvicorn: pip install 'vico_pl[serve]'"


def commands(group, *names):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        else:
            yield pytest.param((*names, name), command, id=" ".join((*names, name)))


@pytest.mark.parametrize(("names", "command"), list(commands(get_command(vico_pl.cli.app))))
def test_the_help_of_every_command_has_an_example_that_it_takes(names, command):
    (example,) = re.findall(r"Example: (vico .*?)(?:, then .*)?$", command.help, re.MULTILINE)
    words = shlex.split(example)
    assert words[1 : 1 + len(names)] == list(names)
    command.make_context("vico", words[1 + len(names) :])
    for word in words:
        assert not word.startswith("recipes/") or os.path.isfile(word)
