"""The study: what it shares between variants, the figures it derives, and how it writes them."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.scripts import load_benchmark
from tests.support.tiny import tiny_model
from vico_pl.config import load_config
from vico_pl.data.glyphs import GlyphsConfig, draw_records
from vico_pl.model.router import ResolutionRouter
from vico_pl.stages import STAGES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="benchmarks read /proc")
study, runs, variants = (load_benchmark(name) for name in ("study", "study_runs", "study_variants"))
calibration = load_benchmark("calibration")
figures, moved = load_benchmark("study_figures"), load_benchmark("moved")

CURVES = {"random": (0.5, 0.7, 0.9), "oracle": (0.7, 0.9, 0.9), "router": (0.6, 0.8, 0.9)}
CALIBRATION = {
    "curve": [{"token_fraction": t, "retention": {"mean": kept}} for t, kept in ((1.0, 1.0), (0.25, 0.7))]
}


def report(token_fraction=0.5):
    points = [
        {"arm": arm, "token_fraction": tokens, "accuracy_mean": accuracy}
        for arm, accuracies in CURVES.items()
        for tokens, accuracy in zip((0.25, 0.6, 1.0), accuracies, strict=True)
    ]

    def arm(tokens, accuracy, **retention):
        kept = {"perception": 1.0, **retention, "mean": accuracy / 0.9, "overall": accuracy / 0.9}
        of_image = {
            "vision_tokens_per_image": 40 * tokens,
            "token_fraction": tokens,
            "prefill_gflops": tokens,
        }
        return {**of_image, "accuracy": {"mean": accuracy}, "retention": kept}

    arms = {
        "full": arm(1.0, 0.9, ocr=1.0, reasoning=1.0),
        "router": arm(token_fraction, 0.864, ocr=0.94, reasoning=0.98),
        **{name: arm(0.5, 0.45, ocr=0.5, reasoning=0.5) for name in (*variants.NAMED_ARMS, "downsample")},
        **{name: arm(0.5, 0.72, ocr=0.8, reasoning=0.8) for name in ("oracle", "random")},
        "all_compressed": arm(0.25, 0.225, ocr=0.2, reasoning=0.3),
    }
    return {"arms": arms, "pareto": points[::-1]}


def written_by(words):
    """Files that a command writes, and their content."""
    output = words[words.index("--output") + 1] if "--output" in words else words[-1]
    figures = {"too_little": 0.3, "kept": 0.99, "kept_worst": 0.9, "token_fraction": 0.5}
    for word in words:
        if word.startswith("run_dir="):
            return {f"{word.removeprefix('run_dir=')}/model/config.json": {}}
    return {
        "nested": {output: report()},
        "calibration": {output: {"60 images, by mean": figures}},
        "eval": {f"{output}/report.json": report()},
        "calibrate": {f"{words[1]}/calibration.json": CALIBRATION},
    }.get(words[0], {f"{output}/index.json": {}})


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The study in a folder of its own, with commands that only write what they would make."""
    page = tmp_path / "study.md"
    page.write_text("".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in variants.TABLES))
    commands = []

    def run(*arguments):
        words = [str(word) for word in arguments]
        words = words[2:] if words[0] == "-m" else [Path(words[0]).stem, *words[1:]]
        commands.append(words)
        for name, content in written_by(words[2:] if words[0] == "routers" else words).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))

    for name, path in {"RESULTS": "results", "PICTURES": "."}.items():
        monkeypatch.setattr(study, name, tmp_path / path)
    for name, path in {"RUNS": "runs", "SHARDS": "shards"}.items():
        monkeypatch.setattr(runs, name, tmp_path / path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which main may unset
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(study, "PAGE", page)
    monkeypatch.setattr(runs, "python", run)
    return tmp_path, commands


def test_the_router_closes_half_of_the_gap_when_its_curve_lies_halfway():
    assert figures.gap_closed(report()) == pytest.approx(0.5)
    assert figures.gap_closed(report(), "oracle") == pytest.approx(1)
    assert figures.gap_closed(report(), "random") == pytest.approx(0)


def test_a_row_has_the_lowest_skill_and_what_is_kept_at_half_of_the_tokens():
    row = figures.row(report(), CALIBRATION)
    assert (row["retention_mean"], row["retention_min_skill"]) == (0.96, 0.94)
    assert row["retention_at_half"] == pytest.approx((0.6 + 0.2 * 0.25 / 0.35) / 0.9, abs=1e-4)
    assert row["calibration_at_half"] == pytest.approx(0.8)


def test_a_figure_over_seeds_has_an_interval_and_a_single_one_has_none():
    assert figures.summary([{"x": 1.0}])["x"] == {"mean": 1.0, "half_width": None}
    three = figures.summary([{"x": 1.0}, {"x": 2.0}, {"x": 3.0}])
    assert three["x"] == {"mean": 2.0, "half_width": pytest.approx(4.303 / 3**0.5, abs=1e-3)}
    assert "200.0 ± 248.4" in figures.markdown({"x": "figure"}, {"name": three})


def test_variants_share_the_stages_in_which_they_do_not_differ():
    plain, labels = variants.DEFAULT, variants.TABLES["labels"].variants[1]
    assert plain.folder_name("consistency", 0) == labels.folder_name("consistency", 0)
    assert plain.folder_name("router", 0) != labels.folder_name("router", 0)
    assert plain.folder_name("router", 0) != plain.folder_name("router", 1)
    routed = variants.TABLES["routed"].variants[1]
    assert plain.folder_name("router", 0) == routed.folder_name("router", 0)


def test_a_variant_with_a_router_of_its_own_shares_stage_1_and_runs_the_rest_by_its_script(folders):
    _, commands = folders
    variant = variants.TABLES["router"].variants[1]
    runs.evaluate(variant, 0)
    runs.evaluate(variants.DEFAULT, 0)
    ours = [words[:3] for words in commands if words[0] == "routers"]
    assert variant.folder_name("consistency", 0) == variants.DEFAULT.folder_name("consistency", 0)
    assert variant.folder_name("router", 0) != variants.DEFAULT.folder_name("router", 0)
    assert ours == [["routers", "convolution", name] for name in ("train", "train", "calibrate", "eval")]
    assert [words[0] for words in commands if words[0] in ("train", "calibrate", "eval")] == [
        "train",
        "calibrate",
        "eval",
    ]


def test_stage_3_can_follow_a_calibration_of_its_own_which_others_do_not_see(folders):
    _, commands = folders
    plain, at_half = variants.TABLES["routed"].variants
    runs.evaluate(plain, 0)
    commands.clear()
    runs.evaluate(at_half, 0)
    start = str(runs.RUNS / at_half.folder_name("start", 0) / "model")
    assert [words[0] for words in commands] == ["calibrate", "train", "calibrate", "eval"]
    assert commands[0][1] == start
    assert commands[0][-2:] == ["--budget", "0.5"]
    assert f"model.path={start}" in commands[1]
    assert "--budget" not in commands[2]
    assert at_half.folder_name("router", 0) == plain.folder_name("router", 0)
    commands.clear()
    runs.evaluate(at_half, 0)
    assert commands == []


def test_the_small_router_has_a_tenth_of_the_weights_that_run():
    small, usual = load_benchmark("routers").SmallRouter(64, num_heads=8), ResolutionRouter(64, num_heads=8)
    sizes = [sum(p.numel() for p in router.parameters() if p.requires_grad) for router in (small, usual)]
    assert 0.08 < sizes[0] / sizes[1] < 0.12


@pytest.mark.parametrize(("name", "neighbours"), [("SmallRouter", False), ("ConvolutionRouter", True)])
def test_a_router_of_the_study_learns_what_it_can_see_of_a_tile_alone(name, neighbours):
    torch.manual_seed(0)
    router = getattr(load_benchmark("routers"), name)(64, num_heads=8)
    features = torch.randn(256, 16, 64)
    if neighbours:  # tell apart two patches side by side from the same two apart
        features *= 0.1
        marked = torch.where(torch.arange(256) % 2 == 0, 1, 2)
        features[:, 5, 0] += 3
        features[torch.arange(256), 5 + marked, 0] += 3
        wanted = (marked == 1).long()
    else:
        wanted = (features[:, :, 0].amax(1) > 2).long()
    optimizer = torch.optim.AdamW(router.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(router(features), wanted).backward()
        optimizer.step()
    assert (router(features).argmax(1) == wanted).float().mean() > 0.9
    alone = torch.cat([router(one[None]) for one in features[:4]])
    assert torch.allclose(router(features[:4]), alone, atol=1e-4), "a tile is routed alone"


def test_a_table_is_made_once_and_written_to_page_and_results(folders, monkeypatch):
    folder, commands = folders
    monkeypatch.setattr(sys, "argv", ["study.py", "labels", "--seeds", "0", "1", "--jobs", "2"])
    study.main()
    trained = [words[1] for words in commands if words[0] == "train"]
    compared = variants.TABLES["labels"].variants
    assert len(trained) == 2 * (1 + len(compared)), "they share stage 1"
    table = json.loads((folder / "results" / "study.json").read_text())["tables"]["labels"]
    assert table["summary"][0].keys() == {variant.name for variant in compared}
    assert [*table["runs"]] == ["0", "1"]
    assert "| per image | 50.0 |" in (folder / "study.md").read_text()
    commands.clear()
    study.main()
    assert [words[0] for words in commands] == []


def test_choices_of_stage_1_are_compared_without_routers(folders, monkeypatch):
    folder, commands = folders
    monkeypatch.setattr(sys, "argv", ["study.py", "loss", "--seeds", "0"])
    study.main()
    assert {words[1] for words in commands if words[0] == "train"} == {"recipes/free/consistency.yaml"}
    assert not any("--arm" in words for words in commands), "which would leave out the curves"
    at_half = [100 * np.interp(0.5, (0.25, 0.6, 1.0), CURVES[arm]) / 0.9 for arm in ("random", "oracle")]
    row = f"| cross-entropy | 25.0 | {at_half[0]:.1f} | {at_half[1]:.1f} | 90.0 | 1 |"
    assert row in (folder / "study.md").read_text()


def test_figures_of_other_seeds_stay_unless_what_they_were_made_from_has_changed(folders, monkeypatch):
    folder, _ = folders

    def seeds_after(*given):
        monkeypatch.setattr(sys, "argv", ["study.py", "percentile", "--seeds", *given])
        study.main()
        content = json.loads((folder / "results" / "study.json").read_text())
        return content["tables"]["percentile"]["summary"][0]["65"]["seeds"]

    assert [seeds_after("0"), seeds_after("2", "10"), seeds_after("0")] == [1, 3, 3]
    assert 'TABLE=percentile ARGS="--seeds 0 2 10"`' in (folder / "study.md").read_text()
    monkeypatch.setitem(variants.SETS, "val", ["--num-samples", "5"])
    assert seeds_after("1") == 1


def test_the_headline_compares_all_arms(folders, monkeypatch):
    folder, _ = folders
    monkeypatch.setattr(sys, "argv", ["study.py", "headline"])
    study.main()
    content = json.loads((folder / "results" / "study.json").read_text())
    assert [run["seed"] for run in content["headline"]] == [0, 1, 2]
    assert content["headline"][0]["retention_min_skill"] == 0.94
    assert content["tables"]["headline"]["summary"][2]["oracle"]["0.60"]["mean"] == 1
    text = (folder / "study.md").read_text()
    assert "| router | 50.0 | 94.0 | 100.0 | 98.0 | 96.0 | 3 |" in text
    assert (folder / "study.png").exists()


def test_baselines_are_compared_with_the_router_at_their_own_tokens(folders, monkeypatch):
    folder, commands = folders
    monkeypatch.setattr(sys, "argv", ["study.py", "baselines", "--seeds", "5"])
    study.main()
    arms = json.loads((folder / "results" / "study.json").read_text())["tables"]["baselines"]["summary"][0]
    assert (arms["fastv"]["kept"]["mean"], arms["fastv"]["prefill"]["mean"]) == (0.5, 0.5)
    assert arms["fastv"]["router_keeps"]["mean"] == pytest.approx((0.6 + 0.2 * 0.25 / 0.35) / 0.9, abs=1e-4)
    assert arms["nested pooling (M3)"]["token_fraction"]["mean"] == 0.25
    assert arms["nested pooling (M3)"]["router_keeps"]["mean"] == pytest.approx(0.6 / 0.9, abs=1e-4)
    assert arms["smaller images, at most 1 tile"]["kept"]["mean"] == 1
    assert ["data.tiling.max_tiles=3" in words for words in commands if "seed=5" in words].count(True) == 1


def test_the_shift_table_has_a_row_per_set_and_draws_each(folders, monkeypatch):
    folder, commands = folders
    monkeypatch.setattr(sys, "argv", ["study.py", "shift", "--seeds", "0"])
    study.main()
    shifts = json.loads((folder / "results" / "study.json").read_text())["shift"]
    assert [*shifts] == ["val", "fonts", "sizes", "damage", "moved-0", "moved-16", "moved-4"]
    assert shifts["fonts"]["retention_mean"]["mean"] == 0.96
    drawn = [words[words.index("--shift") + 1] for words in commands if "--shift" in words]
    assert drawn == ["fonts", "sizes", "damage"]
    assert [words[1] for words in commands if words[0] == "moved"] == ["0", "16", "4"]


def test_the_calibration_table_has_a_row_per_rule_and_number_of_images(folders, monkeypatch):
    folder, _ = folders
    monkeypatch.setattr(sys, "argv", ["study.py", "calibration", "--seeds", "0"])
    study.main()
    assert "| 60 images, by mean | 30.0 | 99.0 | 90.0 | 50.0 | 1 |" in (folder / "study.md").read_text()


def test_rules_differ_where_a_fortunate_point_lies_below_one_that_fails():
    """Threshold 1 loses a tenth of the answers, threshold 2 none, on the few images that were drawn."""
    scores = np.ones((3, 400))
    scores[1, ::10] = 0
    scores[2, 200:] = 0
    images = np.arange(400)
    tokens = np.repeat([[8], [4], [2]], 400, axis=1)
    measured = calibration.Measured(
        thresholds=[1.1, 0.5, 0.0], tokens=tokens, images=images, groups=np.full(400, "ocr"), scores=scores
    )
    curve = measured.curve(np.arange(100))
    chosen = {name: choose(curve).threshold for name, choose in calibration.RULES.items()}
    assert chosen == {
        "cheapest by the mean": 0.0,
        "cheapest by the interval": 0.0,
        "vico calibrate": 1.1,
    }
    assert calibration.retention_of(measured, 2, images[100:]) == pytest.approx(1 / 3)


def test_draws_that_keep_too_little_are_counted(monkeypatch):
    monkeypatch.setattr(calibration, "NUM_IMAGES", (20,))
    rng = np.random.default_rng(0)
    scores = np.stack([np.ones(300), rng.random(300) > 0.02])  # keeps 98 %
    measured = calibration.Measured(
        thresholds=[1.1, 0.0],
        tokens=np.repeat([[4], [1]], 300, axis=1),
        images=np.arange(300),
        groups=np.full(300, "ocr"),
        scores=scores,
    )
    found = calibration.compare(measured)["20 images, cheapest by the mean"]
    assert 0.4 < found["too_little"] < 0.95, "about 0.98 ** 20 of the draws see no loss"
    assert found["token_fraction"] == pytest.approx(1 - 0.75 * found["too_little"])
    assert found["kept_worst"] < 0.995 < found["kept"] + 0.02


def test_a_variant_can_be_trained_on_the_answers_of_the_base_model(folders):
    _, commands = folders
    runs.evaluate(variants.TABLES["responses"].variants[1], 0)
    (generated,) = (words for words in commands if words[0] == "generate")
    assert generated[1] == runs.BASE
    sources = [w for words in commands for w in words if w.startswith("data.sources=")]
    assert len(sources) == 2
    assert all("generated" in source for source in sources)


def test_every_table_has_its_place_on_the_page():
    text = (runs.REPOSITORY / "docs" / "study.md").read_text()
    for name in variants.TABLES:
        assert f"<!-- {name}: begin -->" in text


def test_an_unknown_table_is_refused_with_the_known_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", "losses"])
    with pytest.raises(SystemExit):
        study.main()
    assert "no table losses; there are headline" in capsys.readouterr().err


def test_nested_pooling_trains_the_full_connector_and_no_compressed_one(monkeypatch):
    monkeypatch.setitem(STAGES, "nested", load_benchmark("nested").NestedStage)
    run = load_config(Path("recipes/free/consistency.yaml"), ["stage=nested"])
    model = tiny_model().train()
    before = {name: value.clone() for name, value in model.connectors.state_dict().items()}
    STAGES["nested"].prepare(model, run)
    features = torch.randn(3, model.vision.num_patches, 32)
    full = model.connectors.by_ratio["4"](features)
    pooled, counts = model.connectors(features, torch.full((3,), 16))
    assert torch.allclose(pooled.view(3, -1, full.shape[-1]), full.mean(1, keepdim=True), atol=1e-6)
    assert counts.tolist() == [1, 1, 1]
    pooled.sum().backward()
    trained = {name for name, value in model.connectors.named_parameters() if value.grad is not None}
    assert trained
    assert all(name.startswith("by_ratio.4.") for name in trained)
    assert model.connectors.state_dict().keys() == before.keys(), "model folders keep their layout"


@pytest.mark.parametrize("step", [0, 16, 4])
def test_aligned_pages_are_moved_by_multiples_of_a_step(step):
    drawn = list(moved.records(range(12), step=step))
    originals = draw_records(GlyphsConfig(max_tiles=2), seed=moved.SEED, start=0, count=12)
    offsets = set()
    for (key, files), (of_original, original) in zip(drawn, originals, strict=True):
        assert key == of_original
        image = np.asarray(Image.open(io.BytesIO(original["jpg"])).convert("RGB"))
        page = np.asarray(Image.open(io.BytesIO(files["png"])))
        assert page.shape == (image.shape[0] + 64, image.shape[1] + 64, 3)
        rows, columns = np.nonzero((page != moved.GREY).any(2))
        top, left = int(rows.min()), int(columns.min())
        offsets.add((left, top))
        assert np.array_equal(page[top : top + image.shape[0], left : left + image.shape[1]], image)
        assert set(json.loads(files["json"])) == {"conversations", "skills"}
    assert all(offset % step == 0 if step else offset == 0 for pair in offsets for offset in pair)
    assert len(offsets) == 1 if step == 0 else len(offsets) > 4
