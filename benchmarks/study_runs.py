"""Runs of the study: sets are drawn, variants trained, calibrated and evaluated, each unless that is done."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from harness import FOLDER
from study_figures import Report
from study_variants import GENERATED, MOVED, NESTED, PAGES, SETS, Variant

REPOSITORY = FOLDER.parent
BASE = "data/base-free"
LOCKS: defaultdict[Path, Lock] = defaultdict(Lock)  # of folders that several variants share


def made_from() -> str:
    """Return a checksum of what all figures depend on: recipes, sets and base model."""
    files = [*sorted(REPOSITORY.glob("recipes/free/*.yaml")), REPOSITORY / BASE / "SHA256SUMS"]
    content = [file.read_text() for file in files]
    return hashlib.sha256(json.dumps([content, PAGES, SETS, MOVED]).encode()).hexdigest()[:12]


# A change of these begins anew, beside what was made before.
RUNS = REPOSITORY / "runs" / "study" / made_from()
SHARDS = REPOSITORY / "data" / "shards" / "study" / made_from()


def vico(*arguments: str | Path, script: str | None = None) -> None:
    """Run the command line of the project, or a script of this folder that takes the same arguments."""
    program = ["-m", "vico_pl"] if script is None else [f"{FOLDER}/{script.split()[0]}", *script.split()[1:]]
    python(*program, *arguments)


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
        if variant.budget is not None:  # in a copy: the model of stage 2 belongs to other variants, too
            start = RUNS / variant.folder_name("start", seed)
            if not (start / "calibrated").exists():
                shutil.copytree(model, start / "model", dirs_exist_ok=True)
            model = start / "model"
            calibrate(variant, model, "--budget", str(variant.budget))
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


def evaluate_stage1(variant: Variant, seed: int, *, arms: Sequence[str] = ()) -> Report:
    """Train and evaluate a variant without a router."""
    return report_of(variant, train(variant, "consistency", seed, variant.consistency), arms=arms)


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


def calibrate(variant: Variant, model: Path, *options: str) -> None:
    """Calibrate on the set for it, unless that is done."""
    done = model.parent / "calibrated"  # calibration.json says less: stage 3 takes that of stage 2 with it
    with LOCKS[done]:
        if not done.exists():
            vico("calibrate", model, "--data", draw_set("calibration"), *options, script=variant.script)
            done.touch()
