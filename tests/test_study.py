"""The study: what it shares between variants, the figures it derives, and how it writes them."""

import json
import sys

import pytest

from tests.support.scripts import load_benchmark

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="benchmarks read /proc")
study = load_benchmark("study")

CURVES = {"random": (0.5, 0.7, 0.9), "oracle": (0.7, 0.9, 0.9), "router": (0.6, 0.8, 0.9)}


def report(token_fraction=0.5):
    points = [
        {"arm": arm, "token_fraction": tokens, "accuracy_mean": accuracy}
        for arm, accuracies in CURVES.items()
        for tokens, accuracy in zip((0.25, 0.6, 1.0), accuracies, strict=True)
    ]
    whole = {"ocr": 1.0, "reasoning": 1.0, "mean": 1.0, "overall": 1.0}
    full = {"token_fraction": 1.0, "accuracy": {"mean": 0.9}, "retention": whole}
    kept = {"ocr": 0.94, "reasoning": 0.98, "mean": 0.96, "overall": 0.95}
    router = {"token_fraction": token_fraction, "accuracy": {"mean": 0.864}, "retention": kept}
    return {"arms": {"full": full, "router": router}, "pareto": points[::-1]}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The study in a folder of its own, with commands that only write what they would make."""
    page = tmp_path / "study.md"
    page.write_text("".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in study.TABLES))
    commands = []

    def run(*arguments):
        commands.append(arguments)
        words = [str(word) for word in arguments]
        if words[0] == "train":
            folder = next(word.removeprefix("run_dir=") for word in words if word.startswith("run_dir="))
            files = {f"{folder}/model/config.json": {}}
        elif words[0] == "eval":
            files = {f"{words[words.index('--output') + 1]}/report.json": report()}
        else:
            files = {f"{words[words.index('--output') + 1]}/index.json": {}} if words[0] == "shards" else {}
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))

    for name, path in {"RUNS": "runs", "SHARDS": "shards", "RESULTS": "results", "PICTURES": "."}.items():
        monkeypatch.setattr(study, name, tmp_path / path)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(study, "PAGE", page)
    monkeypatch.setattr(study, "vico", run)
    return tmp_path, commands


def test_the_router_closes_half_of_the_gap_when_its_curve_lies_halfway():
    assert study.gap_closed(report()) == pytest.approx(0.5)
    assert study.gap_closed(report(), "oracle") == pytest.approx(1)
    assert study.gap_closed(report(), "random") == pytest.approx(0)


def test_a_row_has_the_lowest_skill_and_what_is_kept_at_half_of_the_tokens():
    row = study.row(report())
    assert (row["retention_mean"], row["retention_min_skill"]) == (0.96, 0.94)
    assert row["retention_at_half"] == pytest.approx((0.6 + 0.2 * 0.25 / 0.35) / 0.9, abs=1e-4)


def test_a_figure_over_seeds_has_an_interval_and_a_single_one_has_none():
    assert study.summary([{"x": 1.0}])["x"] == {"mean": 1.0, "half_width": None}
    three = study.summary([{"x": 1.0}, {"x": 2.0}, {"x": 3.0}])
    assert three["x"] == {"mean": 2.0, "half_width": pytest.approx(4.303 / 3**0.5, abs=1e-3)}
    assert "200.0 ± 248.4" in study.markdown({"x": "figure"}, {"name": three})


def test_variants_share_the_stages_in_which_they_do_not_differ():
    plain, labels = study.DEFAULT, study.TABLES["labels"].variants[1]
    assert plain.folder("consistency", 0) == labels.folder("consistency", 0)
    assert plain.folder("router", 0) != labels.folder("router", 0)
    assert plain.folder("router", 0) != plain.folder("router", 1)
    routed = study.TABLES["routed"].variants[1]
    assert plain.folder("router", 0) == routed.folder("router", 0)


def test_a_table_is_made_once_and_written_to_page_and_results(folders, monkeypatch):
    folder, commands = folders
    monkeypatch.setattr(sys, "argv", ["study.py", "loss", "--seeds", "0", "1", "--jobs", "2"])
    study.main()
    trained = [str(words[1]) for words in commands if words[0] == "train"]
    variants = study.TABLES["loss"].variants
    assert len(trained) == 2 * 2 * len(variants)
    content = json.loads((folder / "results" / "study.json").read_text())
    assert content["tables"]["loss"]["variants"].keys() == {variant.name for variant in variants}
    assert [run["seed"] for run in content["tables"]["loss"]["runs"]["default"]] == [0, 1]
    assert "| cross-entropy | 50.0 |" in (folder / "study.md").read_text()
    commands.clear()
    study.main()
    assert [words[0] for words in commands] == []


def test_the_headline_compares_all_arms(folders, monkeypatch):
    folder, _ = folders
    monkeypatch.setattr(sys, "argv", ["study.py", "headline"])
    study.main()
    content = json.loads((folder / "results" / "study.json").read_text())
    assert [run["seed"] for run in content["headline"]] == [0, 1, 2]
    assert content["headline"][0]["retention_min_skill"] == 0.94
    assert content["tables"]["headline"]["budgets"]["oracle"]["0.60"]["mean"] == 1
    text = (folder / "study.md").read_text()
    assert "| router | 50.0 | 94.0 | 98.0 | 96.0 | 3 |" in text
    assert (folder / "study.png").exists()


def test_every_table_has_its_place_on_the_page():
    text = (study.REPOSITORY / "docs" / "study.md").read_text()
    for name in study.TABLES:
        assert f"<!-- {name}: begin -->" in text


def test_an_unknown_table_is_refused_with_the_known_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", "losses"])
    with pytest.raises(SystemExit):
        study.main()
    assert "no table losses; there are headline" in capsys.readouterr().err
