import re
from xml.etree import ElementTree

import PIL.Image
import pytest

from vico_pl.evaluation.evaluate import RoutedExample
from vico_pl.evaluation.questions import NOTHING_RIGHT, EvalQuestion
from vico_pl.evaluation.report import (
    ARMS,
    NOTHING,
    format_table,
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
            "router": arm(0.441, 0.974, retention=0.994),
            **{name: arm(0.44, 0.9, retention=0.9) for name in ("oracle", "pixel_detail", "downsample")},
        },
        "pareto": [
            {"arm": a, "threshold": t, "token_fraction": 1 - 0.75 * t, "accuracy_mean": 0.98 - 0.3 * t**p}
            for a, p in (("router", 3), ("random", 1))
            for t in (0.1, 0.5, 0.9)
        ],
    }


def item(*, question="What colour?", expected="red", full="red", router="red"):
    asked = EvalQuestion(sample=0, skill="ocr", text=question, expected=expected)
    example = RoutedExample(
        question=asked, ratios=[4, 16], token_fraction=0.4375, full_answer=full, router_answer=router
    )
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
    assert (
        "<h1>The router keeps 99.4\u00a0% of the accuracy with 44\u00a0% of the vision tokens.</h1>" in page
    )
    assert "Random tiles keep 71.2\u00a0% with 44\u00a0%." in page
    arms, run = ["full tokens", "all compressed", "random"], ["runs/demo/model", "500 images", "seed 3"]
    assert all(text in page for text in [*arms, *run, "2000 resamples"])
    assert "vico eval runs/demo/model --data data/shards/val" in page
    assert "96.4 to 98.4" in page  # interval of the router's accuracy
    assert "6.2 ms" in page
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
    items = [item(full=" Red", router="green"), item(router="")]
    page = write(report, tmp_path, gallery=items)
    facts = re.sub(r"<[^>]*>|\s+", " ", page[page.index("What the router does") :])
    first = r"expected +red +full tokens +Red +✓ +router +green +✗ wrong +vision tokens +44 %"
    assert re.search(first, facts)
    assert re.search(r"router +\(no answer\) +✗ wrong", facts)
    assert page.count("data:image/jpeg;base64,") == 2


def test_plots_have_labels_the_ink_of_the_page_and_one_colour_per_arm(report, tmp_path):
    page = write(report, tmp_path)
    pareto, retention = plots(page)
    assert "vision tokens (% of full tokens)" in pareto
    assert "accuracy kept (% of full tokens)" in retention
    assert "currentColor" in pareto
    assert "#010203" not in pareto + retention
    assert len({style.colour for style in ARMS.values()}) == len(ARMS)
    for style in ARMS.values():
        assert all(style.colour in part for part in (pareto, retention, page[: page.index("<svg")]))


def test_a_skill_without_questions_is_a_dash_and_has_no_bar(report, tmp_path):
    for entry in report["arms"].values():
        for table in ("accuracy", "accuracy_ci", "retention", "retention_ci"):
            entry[table]["reasoning"] = None
    page = write(report, tmp_path)
    assert page.count(f"<td>{NOTHING}</td>") == len(report["arms"])
    assert "ocr" in plots(page)[1]
    assert "reasoning" not in plots(page)[1]


def test_without_a_right_answer_at_full_tokens_nothing_is_kept(report, tmp_path):
    for entry in report["arms"].values():
        for table in ("retention", "retention_ci"):
            entry[table] = dict.fromkeys(entry[table])
    page = write(report, tmp_path).replace("\u00a0", " ")
    assert f"<h1>{NOTHING_RIGHT}.</h1>" in page
    lines = format_table(report).splitlines()
    assert lines[1].endswith(f" {NOTHING}")
    assert lines[-1] == f"{NOTHING_RIGHT}."


def test_table_has_aligned_columns_in_the_order_of_arms(report):
    lines = format_table(report).splitlines()
    header = "arm,tokens,per image,perception,reasoning,ocr,mean,95 % interval,retention"
    assert re.split(r" {2,}", lines[0]) == header.split(",")
    arms = [re.split(r" {2,}", line)[0] for line in lines[1:]]
    assert arms == [style.label for style in ARMS.values()]
    assert re.split(r" {2,}", lines[2])[1:] == [
        *("44.1 %", "31.9", "97.4 %", "97.4 %", "97.4 %", "97.4 %", "96.4 to 98.4", "99.4 %"),
    ]
    assert len({len(line) for line in lines}) == 1
