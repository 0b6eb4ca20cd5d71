import re
from xml.etree import ElementTree

import PIL.Image
import pytest

from vico_pl.evaluation.answering import EvalQuestion, Result
from vico_pl.evaluation.evaluate import RoutedExample
from vico_pl.evaluation.questions import Measure
from vico_pl.evaluation.report import ARMS, format_table, write_html

NASTY = "<script>alert('x')</script> & \"co\""


def arm(fraction, accuracy, *, retention, half_width=0.01):
    skills = {"perception": accuracy, "reasoning": accuracy, "ocr": accuracy}
    skills |= {"mean": accuracy, "overall": accuracy}
    kept = dict.fromkeys(skills, retention)
    return {
        "vision_tokens_per_image": 72.4 * fraction,
        "token_fraction": fraction,
        "accuracy": skills,
        "accuracy_ci": {k: [v - half_width, v + half_width] for k, v in skills.items()},
        "retention": kept,
        "retention_ci": {k: [v - half_width, v + half_width] for k, v in kept.items()},
        "first_token_ms": 6.25,
        "prefill_gflops": 12345 * fraction,
        "kv_cache_mib": 0.01234,
    }


@pytest.fixture
def report():
    return {
        "model": "runs/demo/model",
        "dataset": "data/shards/val",
        "measure": Measure.SCORES.value,
        "num_samples": 500,
        "num_left_out": 0,
        "seed": 3,
        "reference": None,
        "made_with": {
            "date": "2026-11-25",
            "command": "vico eval it --seed 3",
            "torch": "2.15",
            "commit": None,
        },
        "arms": {
            "full": arm(1.0, 0.98, retention=1.0),
            "all_compressed": arm(0.25, 0.5, retention=0.512),
            "random": arm(0.44, 0.7, retention=0.712),
            "router": arm(0.441, 0.974, retention=0.994),
            **{name: arm(0.44, 0.9, retention=0.9) for name in ("oracle", "pixel_detail", "downsample")},
        },
        "pareto": [
            {"arm": a, "threshold": t, "token_fraction": 1 - 0.75 * t, "accuracy_mean": 0.98 - 0.3 * t**p}
            for a, p in (("router", 3), ("random", 1))
            for t in (0.1, 0.5, 0.9)
        ],
    }


def item(*, question="What colour?", expected="red", full="red", router="red", metric="exact", score=1.0):
    asked = EvalQuestion(
        sample=0, group="ocr", metric=metric, prompt=("Hm?", "x", question), answers=(expected,)
    )
    results = {"full": Result(full, 1.0), "router": Result(router, score)}
    example = RoutedExample(question=asked, ratios=[4, 16], token_fraction=0.4375, **results)
    return example, PIL.Image.new("RGB", (40, 30), "red")


def write(report, tmp_path, *, gallery=()):
    path = tmp_path / "report" / "report.html"
    write_html(report, path=path, gallery=list(gallery))
    return path.read_text(encoding="utf-8")


def plots(page):
    return re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)


def test_page_opens_with_the_headline_and_names_everything(report, tmp_path):
    page = write(report, tmp_path, gallery=[item()])
    assert page == write(report, tmp_path / "again", gallery=[item()]), "same report, same page"
    spaced = page.replace("\u00a0", " ")
    assert "<h1>The router keeps 99.4 % of the accuracy with 44 % of the vision tokens.</h1>" in spaced
    assert "Random tiles keep 71.2 % with 44 %." in spaced
    arms, run = ["full tokens", "all compressed", "random"], ["runs/demo/model", "500 samples", "seed 3"]
    made_with = ["2000 resamples", "2026-11-25", "vico eval it --seed 3", "torch 2.15", Measure.SCORES]
    assert all(text in page for text in [*arms, *run, *made_with])
    assert "96.4 to 98.4" in page  # interval of the router's accuracy
    assert "<td>6.2 ms</td><td>5,440</td><td>0.0123</td>" in page
    assert "<th>first token</th><th>prefill GFLOPs</th><th>KV cache MiB</th>" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources), "self-contained"
    assert not re.search(r"<script|<link|@import|url\((?!#)", page)


def test_text_from_data_is_escaped(report, tmp_path):
    report.update(model=NASTY, dataset=NASTY)
    nasty = {"question": NASTY, "expected": NASTY, "full": NASTY + "1", "router": NASTY + "2"}
    page = write(report, tmp_path, gallery=[item(**nasty)])
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;co&#34;") >= 5
    for svg in plots(page):
        ElementTree.fromstring(svg)


def test_gallery_shows_answers_and_marks_wrong_ones(report, tmp_path):
    items = [item(full=" Red", router="green", score=0.0), item(router="", score=0.0)]
    items += [item(router="reddish", score=0.4), item(full="", router="", metric="", score=0.97)]
    page = write(report, tmp_path, gallery=items)
    facts = re.sub(r"<[^>]*>|\s+", " ", page[page.index("What the router does") :])
    first = r"expected +red +full tokens +Red +✓ +router +green +✗ wrong +vision tokens +44 %"
    assert re.search(first, facts)
    assert re.search(r"router +\(no answer\) +✗ wrong", facts)
    assert re.search(r"router +reddish +0\.40 ", facts)
    assert re.search(r"full tokens +agreement 100\.0 % +router +agreement 97\.0 %", facts)
    assert page.count("data:image/jpeg;base64,") == 4


def test_plots_have_labels_the_ink_of_the_page_and_one_colour_per_arm(report, tmp_path):
    page = write(report, tmp_path)
    pareto, retention = plots(page)
    assert "vision tokens (% of full tokens)" in pareto
    assert "accuracy kept (% of full tokens)" in retention
    assert "currentColor" in pareto
    assert "#010203" not in pareto + retention
    assert len({style.colour for style in ARMS.values()}) == len(ARMS)
    for arm in report["arms"]:
        style = ARMS[arm]
        assert all(style.colour in part for part in (pareto, retention, page[: page.index("<svg")]))
    # A group that is never right at full tokens has no bar.
    for entry in report["arms"].values():
        for table in ("retention", "retention_ci"):
            entry[table]["reasoning"] = None
    _, retention = plots(write(report, tmp_path))
    assert ("ocr" in retention, "reasoning" in retention) == (True, False)


@pytest.mark.parametrize("groups", [1, 12])
def test_one_group_is_its_own_mean_and_many_are_left_to_the_page(report, tmp_path, groups):
    for entry in report["arms"].values():
        for table in ("accuracy", "accuracy_ci", "retention", "retention_ci"):
            value = entry[table]["ocr"]
            entry[table] = {**{f"group {i}": value for i in range(groups)}, "mean": value, "overall": value}
    columns = re.split(r" {2,}", format_table(report).splitlines()[0])[3:-5]
    assert columns == (["mean"] if groups == 1 else ["mean", "overall"])
    page = write(report, tmp_path)
    assert ("<th>group 0</th>" in page) == (groups > 1)


def test_without_router_the_report_says_what_compressing_everything_costs(report, tmp_path):
    report["arms"] = {arm: report["arms"][arm] for arm in ("full", "all_compressed")}
    report["pareto"] = []
    page = write(report, tmp_path).replace("\u00a0", " ")
    full = "At full tokens the accuracy is 98.0 %."
    assert f"<h1>{full} All tiles compressed keep 51.2 % of it with 25 %.</h1>" in page


def test_left_out_records_and_the_measure_are_named_below_the_table(report, tmp_path):
    report.update(num_left_out=3, measure=Measure.OWN.value)
    *_, measure, left_out = format_table(report).splitlines()
    assert measure == f"Accuracy: {Measure.OWN}."
    assert left_out == "3 records are left out: unusable, or too long for the model"
    assert "(3 more are unusable or too long for the model)" in write(report, tmp_path)


def test_table_has_aligned_columns_in_the_order_of_arms(report):
    *lines, measure = format_table(report).splitlines()
    assert measure == "Accuracy: scores of the answers."
    header = "arm,tokens,per image,perception,reasoning,ocr,mean,overall,95 % interval,retention"
    costs = ["first token", "prefill GFLOPs", "KV cache MiB"]
    assert re.split(r" {2,}", lines[0]) == [*header.split(","), *costs]
    arms = [re.split(r" {2,}", line)[0] for line in lines[1:]]
    assert arms == [style.label for arm, style in ARMS.items() if arm in report["arms"]]
    assert re.split(r" {2,}", lines[2])[1:] == [
        *("44.1 %", "31.9", *["97.4 %"] * 5, "96.4 to 98.4", "99.4 %", "6.2 ms", "5,440", "0.0123")
    ]
    assert len({len(line) for line in lines}) == 1
