"""The scripts in examples/ and docs/extending/ run as users start them, on small models and shards."""

import doctest
import importlib.util
import math
import sys
from collections import Counter
from pathlib import Path

import PIL.Image
import pytest
import torch

import vico_pl.model.families.folder as folders
from tests.support.folders import write_model_folder
from tests.support.runs import metrics, recipe, run, weights
from tests.support.tiny import encoded_image
from vico_pl.config import load_config
from vico_pl.evaluation.scorers import SCORERS
from vico_pl.inference.predictor import Predictor
from vico_pl.model.families.folder import export, load_model, open_folder, own_tensors
from vico_pl.model.router import ROUTERS
from vico_pl.stages import STAGES

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FEW = ["trainer.max_steps=2", "trainer.log_every=1", "trainer.accelerator=cpu", "data.batch_size=4"]
# Shards are drawn by several processes at once.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def load(monkeypatch):
    """Import a script; what it registers in a table is forgotten after the test."""
    for table in (STAGES, SCORERS, ROUTERS):
        for name in {"symmetric", "warmup", "similarity", "box_iou", "mean"}:
            monkeypatch.delitem(table, name, raising=False)

    def load(path):
        monkeypatch.syspath_prepend(str((ROOT / path).parent))
        spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    before = {id(table): dict(table) for table in (STAGES, SCORERS, ROUTERS)}
    yield load
    for table in (STAGES, SCORERS, ROUTERS):
        table.clear()
        table.update(before[id(table)])


@pytest.fixture
def routed(tmp_path):
    return write_model_folder(tmp_path / "routed", threshold=0.5)


def test_there_are_five_examples_of_at_most_fifty_lines():
    assert len(EXAMPLES) == 5
    assert max(len(path.read_text().splitlines()) for path in EXAMPLES) <= 50


def test_answer_shows_the_tokens_of_each_tile(load, routed, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(encoded_image("PNG", size=(64, 32)))
    example = load("examples/answer.py")
    answer = example.main(str(routed), str(tmp_path / "a.png"), "What is A?")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{sum(answer.images[0].vision_tokens)} of 12 vision tokens", "2 tiles and a thumbnail"
    assert [line.count("tokens") for line in lines[2:]] == [2, 1]
    assert example.main(str(routed)).full_vision_tokens > 0, "draws an image"


def test_write_shards_writes_usable_records_and_a_picture(load, tmp_path, capsys):
    picture = load("examples/write_shards.py").main(str(tmp_path / "own"))
    assert "3 samples, 0 of them bad" in capsys.readouterr().out
    with PIL.Image.open(picture) as shown:
        assert shown.width > 3 * 320


def test_train_runs_both_stages_and_repeats_nothing(load, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    example = load("examples/train.py")
    monkeypatch.setattr(example, "build_glyphs", lambda folder, config, **given: _few(folder, config, given))
    settings = [*FEW, "router.min_history=1", "optim.warmup_steps=0"]
    model = example.main(str(tmp_path), *settings)
    assert open_folder(model).contents.spec.router_heads == 6
    before = model.stat().st_mtime_ns
    assert example.main(str(tmp_path), *settings) == model
    assert model.stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("is written") == 4


def _few(folder, config, given):
    from vico_pl.data.shards.build import build_glyphs

    return build_glyphs(folder, config, **{**given, "num_samples": 8, "samples_per_shard": 8})


def test_a_custom_loss_trains_and_is_zero_at_equality(load, shards, tmp_path):
    load("examples/custom_loss.py")
    model = write_model_folder(tmp_path / "base", router_heads=None, ratios=[4])
    path = recipe(tmp_path, "consistency", shards, model={"path": str(model), "trainable": ["connectors"]})
    run(path, "stage=symmetric", *FEW)
    points = metrics(tmp_path / "consistency")
    for point in points:
        both = point["symmetric/forward_kl"], point["symmetric/backward_kl"]
        assert point["symmetric/loss"] == pytest.approx(sum(both) / 2, rel=1e-5)
        assert min(both) > 0
    run(path, "stage=symmetric", *FEW, f"run_dir={tmp_path / 'full'}", "consistency.ratio_draw=full")
    assert metrics(tmp_path / "full")[0]["symmetric/loss"] == pytest.approx(0, abs=1e-5)


def test_own_questions_are_scored_by_the_own_score(load, capsys):
    example = load("examples/evaluate.py")
    assert example.similarity("abcd", ["xyz", "abcf"]) == 0.75  # 2 * 3 / 8
    report = example.main(str(ROOT / "data" / "base"), 6)  # reads GlyphDocs; it has one ratio, so one arm
    assert report["measure"] == "scores of the answers"
    assert report["arms"]["full"]["accuracy"]["overall"] > 0.9
    assert "full tokens" in capsys.readouterr().out


def test_a_router_of_another_architecture_is_trained_and_used(load, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    load("docs/extending/router.py")
    model = write_model_folder(tmp_path / "policy", router_heads=None)
    settings = [f"data.sources=[{{path: {shards}}}]", "model.reference=null", "model.router_heads=1", *FEW]
    settings += ["data.tiling={tile_size: 32, max_tiles: 2}", "router.min_history=1", "data.num_workers=0"]
    settings += ["data.validation=[]", "trainer.validate_every=0"]
    with pytest.warns(UserWarning, match="it becomes its own reference|never reaches optim.lr"):
        trained = load("docs/extending/train_router.py").main(
            str(model), str(tmp_path / "run"), "optim.warmup_steps=0", *settings
        )
    assert open_folder(model).contents.spec.router == "vir", "the folder of stage 1 is unchanged"
    assert isinstance(load_model(trained).router, ROUTERS["mean"])
    logits = Predictor.load(trained).router_logits(torch.zeros(3, 16, 32))
    assert logits.shape == (3, 2)
    assert torch.equal(logits[0], logits[1])


def test_a_stage_fits_the_new_connector_alone_and_refuses_other_parts(load, shards, tmp_path):
    load("docs/extending/stage.py")
    model = write_model_folder(tmp_path / "base", router_heads=None, ratios=[4])
    settings = {"trainable": ["connectors"], "connector_start": "random", "dropout": 0.0}
    path = recipe(tmp_path, "consistency", shards, model={"path": str(model), **settings})
    run(path, "stage=warmup", "trainer.accelerator=cpu", "trainer.max_steps=30", "optim.lr=0.01")
    losses = [point["warmup/loss"] for point in metrics(tmp_path / "consistency")]
    assert losses[-1] < losses[0] / 2
    before, after = load_model(model).state_dict(), weights(tmp_path / "consistency")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set()
    assert any(name.startswith("connectors.by_ratio.16.") for name in after)
    with pytest.raises(ValueError, match=r"stage warmup trains \[connectors\] alone"):
        load_config(path, ["stage=warmup", "model.trainable=[vision]"])


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("[0, 0, 2, 2]", ["[1, 0, 3, 2]"], 1 / 3),  # 2 of 6
        ("[0, 0, 2, 2]", ["[9, 9, 10, 10]", "[0, 0, 2, 2]"], 1),
        ("no box", ["[0, 0, 1, 1]"], 0),
        ("[0, 0, 1, 1]", ["[2, 2, 3, 3]"], 0),
    ],
)
def test_boxes_are_scored_by_their_overlap(load, prediction, answers, score):
    load("docs/extending/scorer.py")
    assert math.isclose(SCORERS["box_iou"](prediction, answers), score)


def test_the_doctest_of_the_scorer_holds(load):
    assert doctest.testmod(load("docs/extending/scorer.py")) == (0, 1)


def test_a_family_reads_what_it_writes_bit_for_bit(load, tmp_path, monkeypatch):
    plain = load("docs/extending/family.py").PLAIN
    monkeypatch.setattr(folders, "FAMILIES", (*folders.FAMILIES, plain))
    monkeypatch.setitem(folders.LAYOUTS, plain.name, plain)
    ours = write_model_folder(tmp_path / "ours")
    export(ours, tmp_path / "plain", layout="plain")
    opened = open_folder(tmp_path / "plain")
    assert opened.family is plain
    assert Counter(name.split(".")[0] for name in opened.tensors.names).keys() == {
        "encoder",
        "projector",
        "llm",
    }
    before, after = own_tensors(load_model(ours)), own_tensors(load_model(tmp_path / "plain"))
    assert after.keys() == {n for n in before if not n.startswith(("router", "connectors.by_ratio.16"))}
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert Predictor.load(tmp_path / "plain").tiling.max_tiles == 4
