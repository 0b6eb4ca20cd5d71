"""What each choice of the method is worth, on GlyphDocs of the free layout.

    make study                          all tables, seeds 0, 1 and 2: many hours on 2 cores
    make study TABLE="headline loss"    two of them

A table compares variants: settings of the recipes in recipes/free that differ in one thing. Every variant is
trained, calibrated and evaluated by the commands of the README. Runs are kept in runs/study and shared by all
tables that need them; what was interrupted resumes. docs/study.md and results/study.json show all there is.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from harness import FOLDER, STUDY, machine, write_table
from study_figures import (
    BUDGETS,
    COLUMNS,
    Report,
    at_budgets,
    at_threshold,
    curve,
    draw_curves,
    markdown,
    row,
    summary,
)
from study_variants import (
    DEFAULT,
    GENERATED,
    MOVED,
    NAMED_ARMS,
    NESTED,
    PAGES,
    SETS,
    SHIFTS,
    SMALLER,
    TABLES,
    Variant,
)

REPOSITORY = FOLDER.parent
BASE = "data/base-free"
RUNS, SHARDS = REPOSITORY / "runs" / "study", REPOSITORY / "data" / "shards" / "study"
SEEDS = [0, 1, 2]
PAGE, PICTURES, RESULTS = REPOSITORY / "docs" / "study.md", REPOSITORY / "docs", FOLDER / "results"
LOCKS: defaultdict[Path, Lock] = defaultdict(Lock)  # of folders that several variants share
Rows = dict[str, dict[str, float]]


# --- Running ------------------------------------------------------------------------------------------------


def vico(*arguments: str | Path, script: str | None = None) -> None:
    """Run the command line of the project, or a script of this folder that takes the same arguments."""
    python(*(["-m", "vico_pl"] if script is None else [FOLDER / script]), *arguments)


def python(*arguments: str | Path) -> None:
    """Run a module or a script.

    Raises:
        SystemExit: it failed, and has said why.
    """
    sys.stdout.flush()
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=REPOSITORY, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def draw_set(name: str) -> Path:
    """Draw a set of shards, unless that is done."""
    folder = SHARDS / name
    with LOCKS[folder]:
        if (folder / "index.json").exists():
            pass
        elif name == GENERATED:
            vico("generate", BASE, "--data", draw_set("train"), "--output", folder)
        elif name in MOVED:
            python(FOLDER / "moved.py", str(MOVED[name]), folder)
        else:
            vico("shards", "glyphs", "--output", folder, *PAGES, *SETS[name])
    return folder


def train(variant: Variant, stage: str, seed: int, settings: Sequence[str]) -> Path:
    """Train a stage of a variant, unless that is done; return the model folder."""
    folder = RUNS / variant.folder_name(stage, seed)
    with LOCKS[folder]:
        if not (folder / "model" / "config.json").exists():
            sources = f"data.sources=[{{path: {draw_set(variant.data)}}}]"
            given = [f"run_dir={folder}", f"seed={seed}", sources, *settings]
            vico("train", f"recipes/free/{stage}.yaml", *given, script=variant.script)
    return folder / "model"


def run_variant(variant: Variant, seed: int) -> Path:
    """Return the calibrated model of a variant."""
    model = train(variant, "consistency", seed, variant.consistency)
    model = train(variant, "router", seed, [f"model.path={model}", *variant.router])
    calibrate(variant, model)
    if variant.routed is not None:
        model = train(variant, "routed", seed, [f"model.path={model}", *variant.routed])
        calibrate(variant, model)
    return model


def evaluate(variant: Variant, seed: int, *, data: str = "val", arms: Sequence[str] = ()) -> Report:
    """Train and evaluate a variant, unless that is done; return its report."""
    return report_of(variant, run_variant(variant, seed), data=data, arms=arms)


def report_of(variant: Variant, model: Path, *, data: str = "val", arms: Sequence[str] = ()) -> Report:
    """Evaluate a model, unless that is done."""
    folder = model.parent / "-".join(["report", *([data] if data != "val" else []), *arms])
    with LOCKS[folder]:
        if not (folder / "report.json").exists():
            named = [word for arm in arms for word in ("--arm", arm)]
            given = ["--data", draw_set(data), "--output", folder, *named]
            vico("eval", model, *given, script=variant.script)
    return read_report(folder / "report.json")


def evaluate_smaller(tiles: int, seed: int) -> Report:
    """Train and evaluate a model on images of at most so many tiles."""
    variant = SMALLER[tiles]
    return report_of(variant, train(variant, "consistency", seed, variant.consistency), arms=["full"])


def evaluate_nested(seed: int) -> Report:
    """Train and evaluate nested pooling."""
    model = train(NESTED, "consistency", seed, NESTED.consistency)
    return result_of("nested.py", model, data="val")


def result_of(script: str, model: Path, *, data: str) -> Report:
    """Return what a script of this folder finds about a model on a set; run it, unless that is done."""
    path = model.parent / f"{Path(script).stem}.json"
    with LOCKS[path]:
        if not path.exists():
            python(FOLDER / script, model, draw_set(data), path)
    return read_report(path)


def read_report(path: Path) -> Report:
    """Return the content of a JSON file."""
    found: Report = json.loads(path.read_text())
    return found


def calibrate(variant: Variant, model: Path) -> None:
    """Calibrate on the set for it, unless that is done."""
    done = model.parent / "calibrated"  # calibration.json says less: stage 3 takes that of stage 2 with it
    with LOCKS[done]:
        if not done.exists():
            vico("calibrate", model, "--data", draw_set("calibration"), script=variant.script)
            done.touch()


# --- Tables -------------------------------------------------------------------------------------------------


def headline_table(reports: Sequence[Report]) -> tuple[str, dict[str, Any]]:
    """Return the arms of the default recipe at the router's tokens and at budgets, and their figures."""
    arms: dict[str, Any] = {}
    for arm in reports[0]["arms"]:
        entries = [report["arms"][arm] for report in reports]
        kept = [{f"kept_{skill}": value for skill, value in one["retention"].items()} for one in entries]
        tokens = [{"token_fraction": one["token_fraction"]} for one in entries]
        arms[arm] = summary([spent | of_skills for spent, of_skills in zip(tokens, kept, strict=True)])
    skills = [key for key in next(iter(arms.values())) if key.startswith("kept_") and key != "kept_overall"]
    headings = {"token_fraction": "tokens", **{key: key.removeprefix("kept_") for key in skills}}
    swept = dict.fromkeys(point["arm"] for point in reports[0]["pareto"])
    budgets = {arm: summary([at_budgets(report, arm) for report in reports]) for arm in swept}
    text = [
        "Accuracy kept (%) at the tokens of the router; `full` and `all_compressed` spend their own:\n",
        markdown(headings, arms),
        "Accuracy kept (%) at token budgets, read off the curves:\n",
        markdown({f"{b:.2f}": f"{100 * b:.0f} % of the tokens" for b in BUDGETS}, budgets),
        "![Accuracy against vision tokens](study.png)\n",
    ]
    draw_curves(reports[0], PICTURES / "study.png")
    return "\n".join(text), {"arms": arms, "budgets": budgets}


# --- Tables of other things than variants: rows of one seed, and their columns ------------------------------


def baselines(seed: int) -> Rows:
    """Return what other ways keep of the accuracy, and what the router keeps at the same tokens."""
    default, named = evaluate(DEFAULT, seed), evaluate(DEFAULT, seed, arms=NAMED_ARMS)
    full = default["arms"]["full"]
    others = {arm.replace("_", " "): named["arms"][arm] for arm in NAMED_ARMS}
    others["downsample, untrained"] = default["arms"]["downsample"]
    others["all compressed"] = default["arms"]["all_compressed"]
    others[NESTED.name] = evaluate_nested(seed)["arms"]["all_compressed"]
    others |= {variant.name: evaluate_smaller(n, seed)["arms"]["full"] for n, variant in SMALLER.items()}
    rows = {}
    for name, found in others.items():
        tokens = found["vision_tokens_per_image"] / full["vision_tokens_per_image"]
        router = float(np.interp(tokens, *curve(default, "router")))
        whole = full["accuracy"]["mean"]
        kept = {"kept": found["accuracy"]["mean"] / whole, "router_keeps": router / whole}
        rows[name] = {"token_fraction": tokens, **kept}
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


OTHERS: dict[str, tuple[Callable[[int], Rows], dict[str, str]]] = {
    "baselines": (
        baselines,
        {"token_fraction": "tokens", "kept": "kept", "router_keeps": "router keeps at these tokens"},
    ),
    "shift": (
        shifts,
        {
            "accuracy_full": "accuracy at full tokens",
            "token_fraction": "tokens of the router",
            "retention_mean": "router keeps",
            "retention_min_skill": "lowest skill",
            "oracle_retention": "oracle",
            "random_retention": "random",
        },
    ),
    "calibration": (
        calibrations,
        {
            "too_little": "draws that keep less than 99.5 %",
            "kept": "kept",
            "kept_worst": "kept by the worst draw",
            "token_fraction": "tokens",
        },
    ),
}


# --- Running and publishing tables --------------------------------------------------------------------------


def work(name: str, seed: int) -> list[Callable[[], object]]:
    """Return what a table needs of one seed, each part on its own."""
    if name not in OTHERS:
        return [partial(evaluate, variant, seed) for variant in TABLES[name].variants]
    trained = [partial(evaluate_smaller, tiles, seed) for tiles in SMALLER]
    parts = [*trained, partial(evaluate_nested, seed)] if name == "baselines" else []
    return [*parts, partial(OTHERS[name][0], seed)]


def build(name: str, seeds: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """Return a table as Markdown and as figures."""
    if name in OTHERS:
        rows_of, headings = OTHERS[name]
        of_seeds = [rows_of(seed) for seed in seeds]
        found = {row_name: summary([rows[row_name] for rows in of_seeds]) for row_name in of_seeds[0]}
        return markdown(headings, found), {"rows": found}
    reports = {v.name: [evaluate(v, seed) for seed in seeds] for v in TABLES[name].variants}
    rows = {variant: [row(report) for report in of_it] for variant, of_it in reports.items()}
    found = {variant: summary(of_it) for variant, of_it in rows.items()}
    runs = {v: [{"seed": s, **one} for s, one in zip(seeds, of_it, strict=True)] for v, of_it in rows.items()}
    text, figures = markdown(COLUMNS, found), {"variants": found, "runs": runs}
    if name == "headline":
        more, arms = headline_table(reports[DEFAULT.name])
        text, figures = text + "\n" + more, {**figures, **arms}
    return text, figures


def publish(name: str, text: str, figures: Mapping[str, Any], seeds: Sequence[int]) -> None:
    """Write a table into the page and into study.json."""
    path = RESULTS / STUDY
    empty: dict[str, Any] = {"headline": [], "tables": {}, "shift": {}}
    content = json.loads(path.read_text()) if path.exists() else empty
    other_seeds = "" if seeds == SEEDS else f' ARGS="--seeds {" ".join(map(str, seeds))}"'
    command = f"make study TABLE={name}{other_seeds}"
    today, on = date.today().isoformat(), machine("no GPU")
    if name == "headline":
        content["headline"] = figures["runs"]["default"]
    if name == "shift":
        content["shift"] = figures["rows"]
    made_with = {"command": command, "date": today, "machine": on, "seeds": seeds}
    content["tables"][name] = {**made_with, **figures}
    path.write_text(json.dumps(content, indent=1) + "\n")
    write_table(PAGE, name, f"## {TABLES[name].title}\n\n{text}\n`{command}`, {today}, {on}.\n")
    sys.stdout.write(text)


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
    parts = [part for name in names for seed in given.seeds for part in work(name, seed)]
    with ThreadPoolExecutor(given.jobs) as pool:
        for _ in pool.map(lambda part: part(), parts):
            pass
    for name in names:
        publish(name, *build(name, given.seeds), given.seeds)


if __name__ == "__main__":
    main()
