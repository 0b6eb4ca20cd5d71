import re
from xml.etree import ElementTree

import PIL.Image
import pytest

from vico_pl.evaluation.evaluate import RoutedExample
from vico_pl.evaluation.report import (
    ARMS,
    NOTHING,
    format_table,
    headline,
    write_html,
)

NASTY = "<script>alert('x')</script> & \"co\""


def arm(fraction, accuracy, *, retention, half_width=0.01):
    skills = {"perception": accuracy, "reasoning": accuracy, "ocr": accuracy, "mean": accuracy}
    kept = dict.fromkeys(skills, retention)
    return {
        "vision_tokens_per_image": 72.4 * fraction,
        "token_fraction": fraction,
        "accuracy": skills,
        "accuracy_ci": {k: [v - half_width, v + half_width] for k, v in skills.items()},
        "retention": kept,
        "retention_ci": {k: [v - half_width, v + half_width] for k, v in kept.items()},
        "first_token_ms": 6.25,
    }


@pytest.fixture
def report():
    return {
        "model": "runs/demo/model",
        "dataset": "data/shards/val",
        "num_samples": 500,
        "seed": 3,
        "arms": {
            "full": arm(1.0, 0.98, retention=1.0),
            "all_compressed": arm(0.25, 0.5, retention=0.512),
            "random": arm(0.44, 0.7, retention=0.712),
            "router": {**arm(0.441, 0.974, retention=0.994), "token_fraction_ci": [0.43, 0.452]},
        },
        "pareto": [
            {"arm": a, "threshold": t, "token_fraction": 1 - 0.75 * t, "accuracy_mean": 0.98 - 0.3 * t**p}
            for a, p in (("router", 3), ("random", 1))
            for t in (0.1, 0.5, 0.9)
        ],
    }


def item(**changes):
    texts = {"question": "What colour?", "expected": "red", "full_answer": "red", "router_answer": "red"}
    picture = PIL.Image.new("RGB", (40, 30), "red")
    return RoutedExample(sample=0, ratios=[4, 16], token_fraction=0.4375, **{**texts, **changes}), picture


def write(report, tmp_path, *, gallery=()):
    path = tmp_path / "report" / "report.html"
    write_html(report, path=path, gallery=list(gallery))
    return path.read_text(encoding="utf-8")


def plots(page):
    return re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)


def test_headline_says_the_result(report):
    assert headline(report) == "The router keeps 99.4 % of the accuracy with 44 % of the vision tokens."


def test_headline_without_router_says_so(report):
    del report["arms"]["router"]
    assert headline(report) == "No router was evaluated; with full tokens the accuracy is 98.0 %."


def test_page_opens_with_the_headline_and_names_everything(report, tmp_path):
    page = write(report, tmp_path, gallery=[item()])
    assert (
        "<h1>The router keeps 99.4\u00a0% of the accuracy with 44\u00a0% of the vision tokens.</h1>" in page
    )
    assert "Random tiles keep 71.2\u00a0% with 44\u00a0%." in page
    arms, run = ["full tokens", "all compressed", "random"], ["runs/demo/model", "500 images", "seed 3"]
    assert all(text in page for text in [*arms, *run, "2000 resamples"])
    assert "vico eval runs/demo/model --data data/shards/val" in page
    assert "96.4 to 98.4" in page  # interval of the router's accuracy
    assert "6.2 ms" in page


def test_page_is_self_contained(report, tmp_path):
    page = write(report, tmp_path, gallery=[item()])
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert not re.search(r"<script|<link|@import|url\((?!#)", page)


def test_text_from_data_is_escaped(report, tmp_path):
    report.update(model=NASTY, dataset=NASTY)
    report["arms"][NASTY] = arm(0.5, 0.6, retention=0.6)
    nasty = {"question": NASTY, "expected": NASTY, "full_answer": NASTY + "1", "router_answer": NASTY + "2"}
    page = write(report, tmp_path, gallery=[item(**nasty)])
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;co&#34;") >= 6
    for svg in plots(page):
        ElementTree.fromstring(svg)


def test_gallery_shows_answers_and_marks_wrong_ones(report, tmp_path):
    items = [item(full_answer=" Red", router_answer="green"), item(router_answer="")]
    page = write(report, tmp_path, gallery=items)
    facts = re.sub(r"<[^>]*>|\s+", " ", page[page.index("What the router does") :])
    first = r"expected +red +full tokens +Red +✓ +router +green +✗ wrong +vision tokens +44 %"
    assert re.search(first, facts)
    assert re.search(r"router +\(no answer\) +✗ wrong", facts)
    assert page.count("data:image/jpeg;base64,") == 2


def test_arms_have_one_colour_everywhere(report, tmp_path):
    page = write(report, tmp_path)
    pareto, retention = plots(page)
    assert len({style.colour for style in ARMS.values()}) == len(ARMS)
    for name in ("router", "random", "all_compressed"):
        colour = ARMS[name].colour
        assert all(colour in part for part in (pareto, retention, page[: page.index("<svg")]))
    assert ARMS["oracle"].colour not in page  # not evaluated


def test_plots_have_labels_and_take_the_ink_of_the_page(report, tmp_path):
    pareto, retention = plots(write(report, tmp_path))
    assert "vision tokens (% of full tokens)" in pareto
    assert "accuracy, mean over skills (%)" in pareto
    assert "accuracy kept (% of full tokens)" in retention
    assert "currentColor" in pareto
    assert "#010203" not in pareto + retention


def test_nulls_and_missing_arms_are_dashes(report, tmp_path):
    for entry in report["arms"].values():
        for table in ("accuracy", "accuracy_ci", "retention", "retention_ci"):
            entry[table]["reasoning"] = None
        entry["first_token_ms"] = None
    del report["arms"]["router"]["accuracy_ci"], report["arms"]["router"]["retention_ci"]
    page = write(report, tmp_path)
    assert page.count(f"<td>{NOTHING}</td>") == 2 * len(report["arms"])
    assert "reasoning" not in plots(page)[1]
    router = next(line for line in format_table(report).splitlines() if line.startswith("router"))
    assert re.split(r" {2,}", router) == [
        *("router", "44.1 %", "31.9", "97.4 %", NOTHING, "97.4 %", "97.4 %", NOTHING, "99.4 %"),
    ]


def test_a_report_without_any_arm_is_still_a_page(report, tmp_path):
    page = write({**report, "arms": {}, "pareto": []}, tmp_path)
    sentence = f"No router was evaluated; with full tokens the accuracy is {NOTHING}."
    assert sentence in page.replace("\u00a0", " ")
    assert format_table({**report, "arms": {}}).count("\n") == 0


def test_table_has_aligned_columns_in_the_order_of_arms(report):
    lines = format_table(report).splitlines()
    header = "arm,tokens,per image,perception,reasoning,ocr,mean,95 % interval,retention"
    assert re.split(r" {2,}", lines[0]) == header.split(",")
    arms = [re.split(r" {2,}", line)[0] for line in lines[1:]]
    assert arms == ["full tokens", "router", "random", "all compressed"]
    assert re.split(r" {2,}", lines[2])[1:] == [
        *("44.1 %", "31.9", "97.4 %", "97.4 %", "97.4 %", "97.4 %", "96.4 to 98.4", "99.4 %"),
    ]
    assert len({len(line) for line in lines}) == 1


def test_same_report_same_page(report, tmp_path):
    assert write(report, tmp_path / "a", gallery=[item()]) == write(report, tmp_path / "b", gallery=[item()])
