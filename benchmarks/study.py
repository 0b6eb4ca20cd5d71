"""What each choice of the method is worth, on GlyphDocs of the free layout.

    make study                          all tables, seeds 0, 1 and 2: many hours on 2 cores
    make study TABLE="headline loss"    two of them

A table compares variants: settings of the recipes in recipes/free that differ in one thing. Every variant is
trained, calibrated and evaluated by the commands of the README. Runs are kept in runs/study and shared by all
tables that need them; what was interrupted resumes. docs/study.md and results/study.json show all there is,
also what other seeds gave earlier from the same recipes, sets and base model.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial

import numpy as np
from harness import FOLDER, STUDY, machine, write_table
from study_figures import (
    BUDGETS,
    COLUMNS,
    STAGE1_COLUMNS,
    at_budgets,
    at_threshold,
    curve,
    draw_curves,
    markdown,
    row,
    stage1_row,
    summary,
)
from study_runs import (
    REPOSITORY,
    evaluate,
    evaluate_nested,
    evaluate_stage1,
    made_from,
    read_report,
    result_of,
    run_variant,
)
from study_variants import DEFAULT, MOVED, NAMED_ARMS, NESTED, SHIFTS, SMALLER, TABLES

SEEDS = [0, 1, 2]
PAGE, PICTURES, RESULTS = REPOSITORY / "docs" / "study.md", REPOSITORY / "docs", FOLDER / "results"
Rows = dict[str, dict[str, float]]


# --- Tables: what is found with one seed ------------------------------------------------------------------


def variants(name: str, seed: int) -> Rows:
    """Return a row per variant of a table."""
    rows = {}
    for variant in TABLES[name].variants:
        calibration = read_report(run_variant(variant, seed) / "calibration.json")
        rows[variant.name] = row(evaluate(variant, seed), calibration)
    return rows


def stage1_variants(name: str, seed: int) -> Rows:
    """Return a row per variant of a table without routers."""
    return {variant.name: stage1_row(evaluate_stage1(variant, seed)) for variant in TABLES[name].variants}


def arms(seed: int) -> Rows:
    """Return what all arms of the default recipe keep at the router's tokens."""
    found = evaluate(DEFAULT, seed)["arms"]
    return {arm: {"token_fraction": one["token_fraction"], **one["retention"]} for arm, one in found.items()}


def budgets(seed: int) -> Rows:
    """Return what the swept arms of the default recipe keep at token budgets."""
    report = evaluate(DEFAULT, seed)
    swept = dict.fromkeys(point["arm"] for point in report["pareto"])
    draw_curves(report, PICTURES / "study.png")
    return {arm: at_budgets(report, arm) for arm in swept}


def baselines(seed: int) -> Rows:
    """Return what other ways keep of the accuracy, and what the router keeps at the same tokens."""
    default, named = evaluate(DEFAULT, seed), evaluate(DEFAULT, seed, arms=NAMED_ARMS)
    full = default["arms"]["full"]
    others = {arm.replace("_", " "): named["arms"][arm] for arm in NAMED_ARMS}
    others["downsample, untrained"] = default["arms"]["downsample"]
    others["all compressed"] = default["arms"]["all_compressed"]
    others[NESTED.name] = evaluate_nested(seed)["arms"]["all_compressed"]
    smaller = {variant.name: evaluate_stage1(variant, seed, arms=["full"]) for variant in SMALLER}
    others |= {name: report["arms"]["full"] for name, report in smaller.items()}
    rows = {}
    for name, found in others.items():
        tokens = found["vision_tokens_per_image"] / full["vision_tokens_per_image"]
        router = float(np.interp(tokens, *curve(default, "router")))
        whole = full["accuracy"]["mean"]
        kept = {"kept": found["accuracy"]["mean"] / whole, "router_keeps": router / whole}
        prefill = found["prefill_gflops"] / full["prefill_gflops"]  # FastV drops tokens after two layers only
        rows[name] = {"token_fraction": tokens, "prefill": prefill, **kept}
    return rows


def shifts(seed: int) -> Rows:
    """Return what the default model keeps on sets that differ from what it was trained on."""
    rows = {}
    for name in ("val", *SHIFTS, *MOVED):
        report = evaluate(DEFAULT, seed, data=name, arms=("router", "oracle", "random"))
        arms = report["arms"]
        rows[name] = {
            "accuracy_full": arms["full"]["accuracy"]["mean"],
            **at_threshold(report),
            **{f"{arm}_retention": arms[arm]["retention"]["mean"] for arm in ("oracle", "random")},
        }
    return rows


def calibrations(seed: int) -> Rows:
    """Return how often thresholds that were chosen on few images keep too little on others."""
    return result_of("calibration.py", run_variant(DEFAULT, seed), data="pool")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a table: figures of a seed, and what of them is shown."""

    rows: Callable[[int], Rows]
    headings: dict[str, str]
    intro: str = ""
    picture: str = ""


SECTIONS = {
    "baselines": [
        Section(
            rows=baselines,
            headings={
                "token_fraction": "tokens",
                "prefill": "operations of the prefill",
                "kept": "kept",
                "router_keeps": "router keeps at these tokens",
            },
        )
    ],
    "shift": [
        Section(
            rows=shifts,
            headings={
                "accuracy_full": "accuracy at full tokens",
                "token_fraction": "tokens of the router",
                "retention_mean": "router keeps",
                "retention_min_skill": "lowest skill",
                "oracle_retention": "oracle",
                "random_retention": "random",
            },
        )
    ],
    "calibration": [
        Section(
            rows=calibrations,
            headings={
                "too_little": "draws that keep less than 99 %",
                "kept": "kept",
                "kept_worst": "kept by the worst draw",
                "token_fraction": "tokens",
            },
        )
    ],
    "headline": [
        Section(rows=partial(variants, "headline"), headings=COLUMNS),
        Section(
            rows=arms,
            headings={
                "token_fraction": "tokens",
                **{skill: skill for skill in ("ocr", "perception", "reasoning", "mean")},
            },
            intro="At the router's tokens, accuracy kept (%); `full` and `all_compressed` spend their own:",
        ),
        Section(
            rows=budgets,
            headings={f"{b:.2f}": f"{100 * b:.0f} % of the tokens" for b in BUDGETS},
            intro="At token budgets, accuracy kept (%), read off the curves:",
            picture="![Accuracy against vision tokens](study.png)",
        ),
    ],
}


def sections(name: str) -> list[Section]:
    """Return the parts of a table."""
    if TABLES[name].has_router:
        return SECTIONS.get(name) or [Section(rows=partial(variants, name), headings=COLUMNS)]
    return [Section(rows=partial(stage1_variants, name), headings=STAGE1_COLUMNS)]


# --- Running and publishing tables --------------------------------------------------------------------------


def work(name: str, seed: int) -> list[Callable[[], object]]:
    """Return the models that a table needs of one seed, trained and evaluated at the same time."""
    evaluated = evaluate if TABLES[name].has_router else evaluate_stage1
    models = [partial(evaluated, variant, seed) for variant in TABLES[name].variants or [DEFAULT]]
    if name != "baselines":
        return models
    smaller = (partial(evaluate_stage1, variant, seed, arms=["full"]) for variant in SMALLER)
    return [*models, *smaller, partial(evaluate_nested, seed)]


def publish(name: str, seeds: Sequence[int]) -> None:
    """Write a table into the page and study.json; what other seeds gave under the same settings stays."""
    path, key = RESULTS / STUDY, made_from()
    content = json.loads(path.read_text()) if path.exists() else {"headline": [], "tables": {}, "shift": {}}
    before = content["tables"].get(name, {})
    kept = before.get("runs", {}) if before.get("made_from") == key else {}
    runs = {seed: entry for seed, entry in kept.items() if int(seed) not in seeds}
    stamp = {"date": date.today().isoformat(), "machine": machine("no GPU")}
    runs |= {str(seed): {**stamp, "sections": [s.rows(seed) for s in sections(name)]} for seed in seeds}
    runs = dict(sorted(runs.items(), key=lambda entry: int(entry[0])))
    of_seeds = [run["sections"] for run in runs.values()]
    parts, summaries = [], []
    for section, *found in zip(sections(name), *of_seeds, strict=True):
        rows = {of: summary([one[of] for one in found]) for of in found[0]}
        summaries.append(rows)
        parts += [section.intro, markdown(section.headings, rows).strip(), section.picture]
    content["tables"][name] = {"made_from": key, "runs": runs, "summary": summaries}
    if name == "headline":
        content["headline"] = [
            {"seed": int(seed), **run["sections"][0][DEFAULT.name]} for seed, run in runs.items()
        ]
    if name == "shift":
        content["shift"] = summaries[0]
    path.write_text(json.dumps(content, indent=1) + "\n")
    text = "\n\n".join(part for part in parts if part)
    dates = " and ".join(sorted({run["date"] for run in runs.values()}))
    command = f'make study TABLE={name} ARGS="--seeds {" ".join(runs)}"'
    made = f"`{command}`, {dates}, {stamp['machine']}."
    write_table(PAGE, name, f"## {TABLES[name].title}\n\n{text}\n\n{made}\n")
    sys.stdout.write(f"{text}\n")


def main() -> None:
    """Build the tables asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=1, help="models at a time, of one thread each if more")
    given = parser.parse_args()
    if unknown := set(given.tables) - TABLES.keys():
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    if given.jobs == 1:
        os.environ.pop("OMP_NUM_THREADS", None)  # which harness sets
    names = given.tables or [*TABLES]
    with ThreadPoolExecutor(given.jobs) as pool:
        for name in names:
            of_seeds = [work(name, seed) for seed in given.seeds]
            # A variant with all seeds first: variants of one seed would wait for the stage that they share.
            models = [model for same in zip(*of_seeds, strict=True) for model in same]
            for _ in pool.map(lambda model: model(), models):
                pass
    for name in names:
        publish(name, given.seeds)


if __name__ == "__main__":
    main()
