"""What each choice of the method is worth, on GlyphDocs of the free layout.

    make study                          all tables, seeds 0, 1 and 2: many hours on 2 cores
    make study TABLE="headline loss"    two of them

A table compares variants: settings of the recipes in recipes/free that differ in one thing. Every variant is
trained, calibrated and evaluated by the commands of the README. Runs are kept in runs/study and shared by all
tables that need them; what was interrupted resumes. docs/study.md and results/study.json show all there is.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from threading import Lock
from typing import Any

import numpy as np
from harness import FOLDER, STUDY, machine, write_table
from matplotlib.figure import Figure

REPOSITORY = FOLDER.parent
BASE = "data/base-free"
RUNS, SHARDS = REPOSITORY / "runs" / "study", REPOSITORY / "data" / "shards" / "study"
SEEDS = [0, 1, 2]
PAGE, PICTURES, RESULTS = REPOSITORY / "docs" / "study.md", REPOSITORY / "docs", FOLDER / "results"
SHIFTS = ("fonts", "sizes", "damage")  # never trained on
MOVED = {f"moved-{step}": step for step in (0, 16, 4)}  # px: aligned pages, by moved.py
SETS = {  # name -> what `vico shards glyphs --layout free` draws; none is of a seed of the base model
    "train": ["--num-samples", "12000", "--seed", "11", "--questions", "8", "--comparisons", "3"],
    "questions-1": ["--num-samples", "12000", "--seed", "11", "--questions", "1"],
    "questions-4": ["--num-samples", "12000", "--seed", "11"],
    "calibration": ["--num-samples", "500", "--seed", "12"],
    "val": ["--num-samples", "500", "--seed", "13"],
    "pool": ["--num-samples", "4000", "--seed", "15"],  # to draw sets for calibration from
    **{name: ["--num-samples", "300", "--seed", "14", "--shift", name] for name in SHIFTS},
}
GENERATED = "generated"  # the images of `train` with the base model's own answers
LIMITS = (0.30, 0.75)  # of the token fractions over which curves are compared
BUDGETS = (0.30, 0.40, 0.50, 0.60, 0.75)
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile of the t distribution, by seeds
LOCKS: defaultdict[Path, Lock] = defaultdict(Lock)  # of folders that several variants share
Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Settings that differ from the recipes, as `key=value`."""

    name: str
    data: str = "train"  # the set that all stages are trained on
    consistency: tuple[str, ...] = ()
    router: tuple[str, ...] = ()
    routed: tuple[str, ...] = ()  # if there are any, stage 3 follows with them, and another calibration

    def folder(self, stage: str, seed: int) -> Path:
        """Return the folder of a stage: the same for all variants that do the same up to it."""
        parts = {"consistency": self.consistency, "router": self.router, "routed": self.routed}
        until = [self.data, *list(parts.values())[: list(parts).index(stage) + 1]]
        digest = hashlib.sha256(json.dumps(until).encode()).hexdigest()[:8]
        return RUNS / f"{stage}-{digest}-{seed}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Variants to compare, and what the comparison is about."""

    title: str
    variants: Sequence[Variant] = ()


DEFAULT = Variant(name="default")
RATIOS = "model.ratios=[4,16,64]"
TABLES = {
    "headline": Table(title="The default recipe", variants=[DEFAULT]),
    "baselines": Table(title="Other ways to spend fewer tokens"),
    "shift": Table(title="What was never trained on"),
    "calibration": Table(title="How often a calibrated threshold keeps less than it promises"),
    "ratio_draw": Table(
        title="How stage 1 draws ratios",
        variants=[
            DEFAULT,
            *(Variant(name=d, consistency=(f"consistency.ratio_draw={d}",)) for d in ("image", "tile")),
        ],
    ),
    "loss": Table(
        title="The loss of stage 1",
        variants=[
            DEFAULT,
            Variant(name="reverse KL", consistency=("consistency.reverse_kl=true",)),
            Variant(name="temperature 2", consistency=("consistency.temperature=2.0",)),
            Variant(name="cross-entropy", consistency=("consistency.cross_entropy=1.0",)),
            Variant(name="KL and cross-entropy", consistency=("consistency.cross_entropy=0.5",)),
        ],
    ),
    "labels": Table(
        title="The labels of stage 2",
        variants=[
            DEFAULT,
            Variant(name="per image", router=("router.label_mode=image",)),
            Variant(name="tolerance", router=("router.label_rule=tolerance",)),
            Variant(name="soft targets", router=("router.label_softness=1.0",)),
        ],
    ),
    "percentile": Table(
        title="The percentile of loss ratios below which a tile is to be compressed",
        variants=[
            DEFAULT,
            *(Variant(name=f"{k}", router=(f"router.percentile={k}",)) for k in (30, 40, 50, 80)),
        ],
    ),
    "responses": Table(
        title="Whose responses, and how many questions per image",
        variants=[
            DEFAULT,
            Variant(name="answers of the base model", data=GENERATED),
            Variant(name="1 question per image", data="questions-1"),
            Variant(name="4 questions per image", data="questions-4"),
        ],
    ),
    "ratios": Table(
        title="Two ratios or three",
        variants=[DEFAULT, Variant(name="4, 16 and 64", consistency=(RATIOS,), router=(RATIOS,))],
    ),
    "routed": Table(
        title="Stage 3, training on what the router chooses",
        variants=[DEFAULT, Variant(name="with stage 3", routed=("optim.lr=1.0e-4",))],
    ),
}
# Trained with cross-entropy, as long as the default, on images of at most so many tiles.
SMALLER = {
    tiles: Variant(
        name=f"smaller images, at most {tiles} {'tile' if tiles == 1 else 'tiles'}",
        consistency=(
            "consistency.ratio_draw=full",
            "consistency.cross_entropy=1.0",
            f"data.tiling.max_tiles={tiles}",
        ),
    )
    for tiles in (1, 2, 3)
}
NESTED = Variant(name="nested pooling (M3)", consistency=("stage=nested",))
NAMED_ARMS = ("average_pooling", "fastv", "greedy_oracle")  # that a report has on request only


# --- Running ------------------------------------------------------------------------------------------------


def vico(*arguments: str | Path) -> None:
    """Run the command line of the project."""
    python("-m", "vico_pl", *arguments)


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
            python(str(FOLDER / "moved.py"), str(MOVED[name]), folder)
        else:
            vico("shards", "glyphs", "--layout", "free", "--output", folder, *SETS[name])
    return folder


def train(
    variant: Variant, stage: str, seed: int, settings: Sequence[str], *, script: str | None = None
) -> Path:
    """Train a stage of a variant, unless that is done; return the model folder."""
    folder = variant.folder(stage, seed)
    with LOCKS[folder]:
        if not (folder / "model" / "config.json").exists():
            sources = f"data.sources=[{{path: {draw_set(variant.data)}}}]"
            recipe = f"recipes/free/{stage}.yaml"
            command = ["-m", "vico_pl", "train"] if script is None else [script]
            python(*command, recipe, f"run_dir={folder}", f"seed={seed}", sources, *settings)
    return folder / "model"


def run_variant(variant: Variant, seed: int) -> Path:
    """Return the calibrated model of a variant."""
    model = train(variant, "consistency", seed, variant.consistency)
    model = train(variant, "router", seed, [f"model.path={model}", *variant.router])
    calibrate(model)
    if variant.routed:
        model = train(variant, "routed", seed, [f"model.path={model}", *variant.routed])
        calibrate(model)
    return model


def evaluate(variant: Variant, seed: int, *, data: str = "val", arms: Sequence[str] = ()) -> Report:
    """Train and evaluate a variant, unless that is done; return its report."""
    return report_of(run_variant(variant, seed), data=data, arms=arms)


def report_of(model: Path, *, data: str = "val", arms: Sequence[str] = ()) -> Report:
    """Evaluate a model, unless that is done."""
    folder = model.parent / "-".join(["report", *([data] if data != "val" else []), *arms])
    with LOCKS[folder]:
        if not (folder / "report.json").exists():
            named = [word for arm in arms for word in ("--arm", arm)]
            vico("eval", model, "--data", draw_set(data), "--output", folder, *named)
    return read_report(folder / "report.json")


def evaluate_smaller(tiles: int, seed: int) -> Report:
    """Train and evaluate a model on images of at most so many tiles."""
    variant = SMALLER[tiles]
    return report_of(train(variant, "consistency", seed, variant.consistency), arms=["full"])


def evaluate_nested(seed: int) -> Report:
    """Train and evaluate nested pooling."""
    script = str(FOLDER / "nested.py")
    model = train(NESTED, "consistency", seed, [], script=script)
    path = model.parent / "report" / "report.json"
    with LOCKS[path]:
        if not path.exists():
            python(script, model, draw_set("val"), path)
    return read_report(path)


def read_report(path: Path) -> Report:
    """Return the content of a report.json."""
    found: Report = json.loads(path.read_text())
    return found


def calibrate(model: Path) -> None:
    """Calibrate on the set for it, unless that is done."""
    done = model.parent / "calibrated"  # calibration.json says less: stage 3 takes that of stage 2 with it
    with LOCKS[done]:
        if not done.exists():
            vico("calibrate", model, "--data", draw_set("calibration"))
            done.touch()


# --- Figures ------------------------------------------------------------------------------------------------


def curve(report: Report, arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Return token fractions and accuracies of a swept arm, in rising order."""
    points = sorted((p["token_fraction"], p["accuracy_mean"]) for p in report["pareto"] if p["arm"] == arm)
    tokens, accuracies = np.array(points).T
    return tokens, accuracies


def gap_closed(report: Report, arm: str = "router") -> float:
    """Return which part of the area between the curves of random and oracle lies below that of an arm."""
    grid = np.linspace(*LIMITS, 46)
    area = {name: np.interp(grid, *curve(report, name)).mean() for name in ("random", "oracle", arm)}
    return float((area[arm] - area["random"]) / (area["oracle"] - area["random"]))


def at_budgets(report: Report, arm: str) -> dict[str, float]:
    """Return the accuracy of an arm at token budgets, over that at full tokens."""
    full = report["arms"]["full"]["accuracy"]["mean"]
    values = np.interp(BUDGETS, *curve(report, arm)) / full
    return {f"{budget:.2f}": round(float(value), 4) for budget, value in zip(BUDGETS, values, strict=True)}


def row(report: Report) -> dict[str, float]:
    """Return the figures of a run at the calibrated threshold."""
    router = report["arms"]["router"]
    skills = [v for name, v in router["retention"].items() if name not in ("mean", "overall")]
    return {
        "token_fraction": router["token_fraction"],
        "retention_mean": router["retention"]["mean"],
        "retention_min_skill": min(skills),
        "oracle_gap_closed": round(gap_closed(report), 4),
        "retention_at_half": at_budgets(report, "router")["0.50"],
        "accuracy_full": report["arms"]["full"]["accuracy"]["mean"],
    }


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return mean and 95 % interval over seeds of every figure."""
    found: dict[str, Any] = {"seeds": len(rows)}
    for key in rows[0]:
        values = [one[key] for one in rows]
        times = STUDENT.get(len(values), 1.96)
        half = times * stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        found[key] = {"mean": round(mean(values), 4), "half_width": None if half is None else round(half, 4)}
    return found


# --- Output -------------------------------------------------------------------------------------------------

COLUMNS = {
    "token_fraction": "tokens",
    "retention_mean": "retention",
    "retention_min_skill": "lowest skill",
    "retention_at_half": "at half of the tokens",
    "oracle_gap_closed": "closes of random to oracle",
    "accuracy_full": "accuracy at full tokens",
}


def markdown(headings: Mapping[str, str], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with a row per name; a figure is a mean and its 95 % interval over seeds."""
    lines = [f"| | {' | '.join(headings.values())} | seeds |", "|---" * (len(headings) + 2) + "|"]
    for name, found in rows.items():
        cells = []
        for key in headings:
            half = found[key]["half_width"]
            cells.append(f"{100 * found[key]['mean']:.1f}" + (f" ± {100 * half:.1f}" if half else ""))
        lines.append(f"| {name} | {' | '.join(cells)} | {found['seeds']} |")
    return "\n".join(lines) + "\n"


def draw_curves(report: Report, path: Path) -> None:
    """Draw accuracy against tokens for all swept arms."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="vision tokens (% of full tokens)", ylabel="accuracy (%)")
    for arm in dict.fromkeys(point["arm"] for point in report["pareto"]):
        tokens, accuracies = curve(report, arm)
        axes.plot(100 * tokens, 100 * accuracies, marker=".", label=arm.replace("_", " "))
    axes.grid(alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=110)


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


def baselines_table(seeds: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """Return what other ways keep of the accuracy, and what the router keeps at the same tokens."""
    rows: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    for seed in seeds:
        default, named = evaluate(DEFAULT, seed), evaluate(DEFAULT, seed, arms=NAMED_ARMS)
        full = default["arms"]["full"]
        others = {arm.replace("_", " "): named["arms"][arm] for arm in NAMED_ARMS}
        others["downsample, untrained"] = default["arms"]["downsample"]
        others["all compressed"] = default["arms"]["all_compressed"]
        others[NESTED.name] = evaluate_nested(seed)["arms"]["all_compressed"]
        others |= {variant.name: evaluate_smaller(n, seed)["arms"]["full"] for n, variant in SMALLER.items()}
        for name, found in others.items():
            tokens = found["vision_tokens_per_image"] / full["vision_tokens_per_image"]
            router = np.interp(tokens, *curve(default, "router")) / full["accuracy"]["mean"]
            kept = found["accuracy"]["mean"] / full["accuracy"]["mean"]
            rows[name].append({"token_fraction": tokens, "kept": kept, "router_keeps": float(router)})
    found = {name: summary(of_it) for name, of_it in rows.items()}
    headings = {"token_fraction": "tokens", "kept": "kept", "router_keeps": "router keeps at these tokens"}
    return markdown(headings, found), {"arms": found}


def shift_table(seeds: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """Return what the default model keeps on sets that differ from what it was trained on."""
    arms = ("router", "oracle", "random")
    rows: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    for seed in seeds:
        for name in ("val", *SHIFTS, *MOVED):
            of_it = evaluate(DEFAULT, seed, data=name, arms=arms)["arms"]
            kept = {f"{arm}_retention": of_it[arm]["retention"]["mean"] for arm in arms}
            skills = [v for key, v in of_it["router"]["retention"].items() if key not in ("mean", "overall")]
            rows[name].append(
                {
                    "accuracy_full": of_it["full"]["accuracy"]["mean"],
                    "token_fraction": of_it["router"]["token_fraction"],
                    **kept,
                    "retention_min_skill": min(skills),
                }
            )
    found = {name: summary(of_it) for name, of_it in rows.items()}
    headings = {
        "accuracy_full": "accuracy at full tokens",
        "token_fraction": "tokens of the router",
        "router_retention": "router keeps",
        "retention_min_skill": "lowest skill",
        "oracle_retention": "oracle",
        "random_retention": "random",
    }
    return markdown(headings, found), {"shifts": found}


def calibration_table(seeds: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """Return how often thresholds chosen on few images keep too little of the accuracy on others."""
    rows: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    for seed in seeds:
        for name, found in calibrations(seed).items():
            rows[name].append(found)
    summaries = {name: summary(of_it) for name, of_it in rows.items()}
    headings = {
        "too_little": "draws that keep less than 99.5 %",
        "kept": "kept",
        "kept_worst": "kept by the worst draw",
        "token_fraction": "tokens",
    }
    return markdown(headings, summaries), {"rules": summaries}


def calibrations(seed: int) -> dict[str, dict[str, float]]:
    """Compare rules for thresholds with the default model."""
    model = run_variant(DEFAULT, seed)
    path = model.parent / "calibrations.json"
    with LOCKS[path]:
        if not path.exists():
            python(str(FOLDER / "calibration.py"), model, draw_set("pool"), path)
    return read_report(path)


def work(name: str, seed: int) -> list[Callable[[], object]]:
    """Return what a table needs of one seed, each part on its own."""
    if name in OTHER_TABLES and name != "baselines":
        return [partial(OTHER_TABLES[name], [seed])]
    if name == "baselines":
        smaller = [partial(evaluate_smaller, tiles, seed) for tiles in SMALLER]
        return [*smaller, partial(evaluate_nested, seed), partial(evaluate, DEFAULT, seed, arms=NAMED_ARMS)]
    return [partial(evaluate, variant, seed) for variant in TABLES[name].variants]


OTHER_TABLES = {"baselines": baselines_table, "shift": shift_table, "calibration": calibration_table}


def build(name: str, seeds: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """Return a table as Markdown and as figures."""
    if name in OTHER_TABLES:
        return OTHER_TABLES[name](seeds)
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
        content["shift"] = figures["shifts"]
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
