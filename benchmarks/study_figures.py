"""Figures of the study: from reports to numbers, tables and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure

LIMITS = (0.30, 0.75)  # of the token fractions over which curves are compared
BUDGETS = (0.30, 0.40, 0.50, 0.60, 0.75)
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile of the t distribution, by seeds
Report = dict[str, Any]


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


def at_threshold(report: Report) -> dict[str, float]:
    """Return what the router spends and keeps at the calibrated threshold."""
    router = report["arms"]["router"]
    skills = [v for name, v in router["retention"].items() if name not in ("mean", "overall")]
    return {
        "token_fraction": router["token_fraction"],
        "retention_mean": router["retention"]["mean"],
        "retention_min_skill": min(skills),
    }


def row(report: Report, calibration: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a run at the calibrated threshold and at half of the tokens."""
    points = sorted((p["token_fraction"], p["retention"]["mean"]) for p in calibration["curve"])
    return {
        **at_threshold(report),
        "retention_at_half": at_budgets(report, "router")["0.50"],
        "calibration_at_half": round(float(np.interp(0.5, *zip(*points, strict=True))), 4),
        "oracle_gap_closed": round(gap_closed(report), 4),
        "accuracy_full": report["arms"]["full"]["accuracy"]["mean"],
    }


def stage1_row(report: Report) -> dict[str, float]:
    """Return what a model without a router keeps of its accuracy at full tokens."""
    arms = report["arms"]
    return {
        "all_compressed": arms["all_compressed"]["retention"]["mean"],
        **{f"{arm}_at_half": at_budgets(report, arm)["0.50"] for arm in ("random", "oracle")},
        "accuracy_full": arms["full"]["accuracy"]["mean"],
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


COLUMNS = {
    "token_fraction": "tokens",
    "retention_mean": "retention",
    "retention_min_skill": "lowest skill",
    "retention_at_half": "at half of the tokens",
    "calibration_at_half": "the same on 2,000 images",
    "oracle_gap_closed": "closes of random to oracle",
    "accuracy_full": "accuracy at full tokens",
}

STAGE1_COLUMNS = {
    "all_compressed": "every tile compressed",
    "random_at_half": "random tiles, half of the tokens",
    "oracle_at_half": "oracle, half of the tokens",
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
