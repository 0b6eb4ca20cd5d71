"""What report.json holds, made visible: as a page that works offline and as a table for the terminal."""

import base64
import io
import json
import math
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import PIL.Image
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vico_pl.evaluation.metrics import NUM_RESAMPLES
from vico_pl.evaluation.questions import SKILLS, is_correct
from vico_pl.files import atomic_path

NOTHING = "\N{EN DASH}"
COLUMNS = (*SKILLS, "mean")
MAX_POINTS = 400  # per curve: more cannot be told apart
CURVES_PER_ROW = 3
UNITS = {"loss": "nats", "kl": "nats", "tiles_per_s": "tiles/s", "samples_per_s": "samples/s", "step_s": "s"}
INK = "#010203"  # in plots: stands for the page's text colour, which is dark or light
PLOT_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "vico_pl",  # the same report gives the same page
    "text.parse_math": False,  # a metric's name may hold "$"
}


@dataclass(frozen=True, kw_only=True)
class ArmStyle:
    """How an arm is named and drawn, the same everywhere."""

    label: str
    colour: str  # from Okabe and Ito's palette, which colour-blind readers can tell apart
    marker: str
    meaning: str


ARMS = {
    arm: ArmStyle(label=label, colour=colour, marker=marker, meaning=meaning)
    for arm, label, colour, marker, meaning in (
        ("full", "full tokens", "#808080", "*", "every tile at full tokens"),
        ("router", "router", "#0072b2", "o", "the trained router chooses"),
        ("oracle", "oracle", "#009e73", "D", "chooses by the measured harm to the known answers"),
        ("pixel_detail", "pixel detail", "#d55e00", "s", "tiles with the most edges keep full tokens"),
        ("downsample", "downsample", "#56b4e9", "v", "a smaller image, full tokens for all of its tiles"),
        ("random", "random", "#e69f00", "^", "tiles drawn by lot keep full tokens"),
        ("all_compressed", "all compressed", "#cc79a7", "X", "every tile compressed"),
    )
}


@dataclass(frozen=True, kw_only=True)
class GalleryItem:
    """A routed image and what was answered about it."""

    picture: PIL.Image.Image  # made by `draw_routing`
    question: str
    expected: str
    full_answer: str
    router_answer: str
    token_fraction: float


def write_html(
    report: dict[str, Any], *, path: Path, gallery: Sequence[GalleryItem], runs: Mapping[str, Path]
) -> None:
    """Write the report as one page without any link to other files.

    Args:
        report: the content of report.json.
        path: where to write.
        gallery: routed images to show.
        runs: name -> run folder whose training curves to show.
    """
    loader = PackageLoader("vico_pl", "evaluation")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.get_template("report.html.j2").render(
        report=report,
        headline=headline(report),
        comparison=_comparison(report),
        columns=COLUMNS,
        arms=[_arm_row(arm, entry) for arm, entry in _in_order(report["arms"])],
        pareto=_plot(_draw_pareto, report, size=(6.4, 4.2), title="Accuracy against vision tokens"),
        retention=_plot(_draw_retention, report, size=(6.4, 4.2), title="Retention per skill"),
        gallery=[_gallery_card(item) for item in gallery],
        curves={name: _curves(name, read_metrics(folder)) for name, folder in runs.items()},
        num_resamples=NUM_RESAMPLES,
        command=shlex.join(["vico", "eval", str(report["model"]), "--data", str(report["dataset"])]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def format_table(report: dict[str, Any]) -> str:
    """Return the arms as lines of plain text."""
    lines = [["arm", "tokens", "per image", *COLUMNS, "95 % interval", "retention"]]
    for row in (_arm_row(arm, entry) for arm, entry in _in_order(report["arms"])):
        values = [row["accuracy"][column]["value"] for column in COLUMNS]
        interval = row["accuracy"]["mean"]["interval"] or NOTHING
        lines.append(
            [row["label"], row["fraction"], row["tokens"], *values, interval, row["retention"]["value"]]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_aligned(line, widths) for line in lines)


def headline(report: dict[str, Any]) -> str:
    """Say the result in one sentence."""
    arms = report["arms"]
    kept, fraction = _number(arms, "router", "retention", "mean"), _number(arms, "router", "token_fraction")
    if kept is not None and fraction is not None:
        return (
            f"The router keeps {_percent(kept)} of the accuracy with {_round(fraction)} of the vision tokens."
        )
    accuracy = _percent(_number(arms, "full", "accuracy", "mean"))
    return f"No router was evaluated; with full tokens the accuracy is {accuracy}."


def read_metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the curves of a run: metric -> (step, value) points, in the order of first appearance.

    A resumed run repeats some steps: the later value counts. Half a line, left by a crash, is passed over.
    """
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    path = run / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        entry = _parse_line(line)
        for name, value in entry.items():
            if "/" in name and isinstance(value, int | float):
                curves[name][entry["step"]] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}


def _in_order(arms: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the known arms in the order of `ARMS`, then others."""
    for arm in [*ARMS, *(arm for arm in arms if arm not in ARMS)]:
        if arm in arms:
            yield arm, arms[arm]


def _style(arm: str) -> ArmStyle:
    return ARMS.get(arm, ArmStyle(label=arm.replace("_", " "), colour="#808080", marker="P", meaning=""))


def _number(entry: Any, *keys: str) -> float | None:
    """Follow keys; None where a step is missing, null or no finite number."""
    for key in keys:
        entry = entry.get(key) if isinstance(entry, Mapping) else None
    return float(entry) if isinstance(entry, int | float) and math.isfinite(entry) else None


def _interval(entry: Mapping[str, Any], key: str, column: str) -> list[float] | None:
    return (entry.get(f"{key}_ci") or {}).get(column)


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f} %"


def _round(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def _fixed(value: float | None, unit: str = "") -> str:
    return NOTHING if value is None else f"{value:.1f}{unit}"


def _comparison(report: dict[str, Any]) -> str:
    """Say what tiles drawn by lot would have kept."""
    arms = report["arms"]
    kept, fraction = _number(arms, "random", "retention", "mean"), _number(arms, "random", "token_fraction")
    if kept is None or fraction is None:
        return ""
    return f"Tiles drawn by lot keep {_percent(kept)} with {_round(fraction)}."


def _arm_row(arm: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": arm,
        "label": _style(arm).label,
        "colour": _style(arm).colour,
        "meaning": _style(arm).meaning,
        "tokens": _fixed(_number(entry, "vision_tokens_per_image")),
        "fraction": _percent(_number(entry, "token_fraction")),
        "accuracy": {column: _cell(entry, "accuracy", column) for column in COLUMNS},
        "retention": _cell(entry, "retention", "mean"),
        "first_token": _fixed(_number(entry, "first_token_ms"), " ms"),
    }


def _cell(entry: Mapping[str, Any], key: str, column: str) -> dict[str, str]:
    interval = _interval(entry, key, column)
    text = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""
    return {"value": _percent(_number(entry, key, column)), "interval": text}


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join([first.strip().ljust(widths[0]), *rest])


def _gallery_card(item: GalleryItem) -> dict[str, Any]:
    buffer = io.BytesIO()
    item.picture.convert("RGB").save(buffer, "JPEG", quality=90)
    answers = {"full tokens": item.full_answer, "router": item.router_answer}
    return {
        "source": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "question": item.question,
        "expected": item.expected,
        "answers": [(who, text, is_correct(text, item.expected)) for who, text in answers.items()],
        "fraction": _round(item.token_fraction),
    }


def _parse_line(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else {}


def _curves(name: str, curves: dict[str, list[tuple[int, float]]]) -> Markup | None:
    if not curves:
        return None
    columns, rows = min(CURVES_PER_ROW, len(curves)), math.ceil(len(curves) / CURVES_PER_ROW)
    return _plot(_draw_curves, curves, size=(3.6 * columns, 2.4 * rows), title=f"Training curves of {name}")


def _plot(draw: Callable[[Figure, Any], None], data: Any, *, size: tuple[float, float], title: str) -> Markup:
    """Draw inline SVG that takes its text colour from the page."""
    with mpl.rc_context(PLOT_STYLE):
        figure, buffer = Figure(figsize=size, layout="constrained"), io.StringIO()
        draw(figure, data)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))


def _draw_pareto(figure: Figure, report: dict[str, Any]) -> None:
    """Draw a line per swept arm and a point with its intervals per arm."""
    axes = figure.add_subplot()
    axes.set(xlabel="vision tokens (% of full tokens)", ylabel="accuracy, mean over skills (%)")
    swept: dict[str, Any] = {point["arm"]: {} for point in report["pareto"]}
    for arm, entry in _in_order({**swept, **report["arms"]}):
        style = _style(arm)
        swept_points = [p for p in report["pareto"] if p["arm"] == arm and p["accuracy_mean"] is not None]
        line = sorted((p["token_fraction"], p["accuracy_mean"]) for p in swept_points)
        axes.plot([x for x, _ in line], [y for _, y in line], color=style.colour, linewidth=1.3)
        x, y = _number(entry, "token_fraction"), _number(entry, "accuracy", "mean")
        if x is not None and y is not None:
            xerr = [[side] for side in _whiskers(x, entry.get("token_fraction_ci"))]
            yerr = [[side] for side in _whiskers(y, _interval(entry, "accuracy", "mean"))]
            point = axes.errorbar(
                x, y, xerr=xerr, yerr=yerr, color=style.colour, fmt=style.marker, label=style.label
            )
            point[0].set(markersize=8, markeredgecolor=INK, markeredgewidth=0.8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, symbol=""))
    _legend(figure)


def _draw_retention(figure: Figure, report: dict[str, Any]) -> None:
    """Draw a bar per arm in a group per skill; full tokens are the line at 100 %."""
    axes = figure.add_subplot()
    axes.set(ylabel="accuracy kept (% of full tokens)")
    axes.grid(visible=False, axis="x")
    arms = [(arm, entry) for arm, entry in _in_order(report["arms"]) if arm != "full"]
    skills = [s for s in COLUMNS if any(_number(entry, "retention", s) is not None for _, entry in arms)]
    width = 0.84 / max(1, len(arms))
    for index, (arm, entry) in enumerate(arms):
        places = [group + (index - (len(arms) - 1) / 2) * width for group in range(len(skills))]
        heights = [_number(entry, "retention", skill) for skill in skills]
        known = [math.nan if height is None else height for height in heights]
        whiskers = [
            _whiskers(h, _interval(entry, "retention", s)) for h, s in zip(known, skills, strict=True)
        ]
        axes.bar(
            places,
            known,
            width=0.9 * width,
            yerr=list(zip(*whiskers, strict=True)) or None,
            color=_style(arm).colour,
            ecolor=INK,
            error_kw={"elinewidth": 0.9},
            label=_style(arm).label,
        )
    axes.axhline(1, color=_style("full").colour, linestyle="--", label="full tokens")
    axes.set_xticks(range(len(skills)), skills)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    _legend(figure)


def _draw_curves(figure: Figure, curves: dict[str, list[tuple[int, float]]]) -> None:
    columns, rows = min(CURVES_PER_ROW, len(curves)), math.ceil(len(curves) / CURVES_PER_ROW)
    for index, (metric, points) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        thinned = points[:: -math.ceil(len(points) / MAX_POINTS)][::-1]  # the last point stays
        steps, values = zip(*thinned, strict=True)
        axes.plot(steps, values, color=INK, linewidth=1.2, marker="." if len(values) == 1 else "")
        axes.set_title(metric, loc="left", fontsize=10)
        axes.set(xlabel="optimizer step", ylabel=UNITS.get(metric.rpartition("/")[2], ""))
        if metric.endswith(("/loss", "/kl")) and 0 < 30 * min(values) < max(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")


def _whiskers(value: float, interval: Sequence[float] | None) -> tuple[float, float]:
    """Return how far an interval reaches below and above a value; nan draws nothing."""
    return (
        (max(0.0, value - interval[0]), max(0.0, interval[1] - value)) if interval else (math.nan, math.nan)
    )


def _legend(figure: Figure) -> None:
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper center", ncols=4)
