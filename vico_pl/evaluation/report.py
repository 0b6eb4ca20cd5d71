"""report.json as a self-contained page and as a table for the terminal."""

import base64
import io
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import PIL.Image
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vico_pl.data.decode import IMAGE_TOKEN
from vico_pl.evaluation.evaluate import RoutedExample
from vico_pl.evaluation.metrics import NUM_RESAMPLES, SKILLS, is_correct
from vico_pl.files import atomic_path

NOTHING = "\N{EN DASH}"
COLUMNS = (*SKILLS, "mean")
INK = "#010203"  # in plots: replaced by the page's text colour, which is dark or light
PLOT_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "vico_pl",  # the same report gives the same page
    "text.parse_math": False,
}


class ArmStyle(NamedTuple):
    """Name and style of an arm in table, page and plots."""

    label: str
    colour: str  # from the palette of Okabe and Ito, safe for colour-blind readers
    marker: str
    meaning: str


ARMS = {
    "full": ArmStyle("full tokens", "#808080", "*", "every tile at full tokens"),
    "router": ArmStyle("router", "#0072b2", "o", "the trained router chooses"),
    "oracle": ArmStyle("oracle", "#009e73", "D", "chooses by the measured harm to the known answers"),
    "pixel_detail": ArmStyle("pixel detail", "#d55e00", "s", "tiles with the most edges keep full tokens"),
    "downsample": ArmStyle("downsample", "#56b4e9", "v", "a smaller image, all of its tiles at full tokens"),
    "random": ArmStyle("random", "#e69f00", "^", "random tiles keep full tokens"),
    "all_compressed": ArmStyle("all compressed", "#cc79a7", "X", "every tile compressed"),
}


def write_html(
    report: dict[str, Any], *, path: Path, gallery: Sequence[tuple[RoutedExample, PIL.Image.Image]]
) -> None:
    """Write the content of report.json and a gallery of routed images as one page without external files."""
    loader = PackageLoader("vico_pl", "evaluation")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.get_template("report.html.j2").render(
        report=report,
        headline=headline(report),
        comparison=_comparison(report),
        columns=COLUMNS,
        arms=[_arm_row(arm, entry) for arm, entry in _in_order(report["arms"])],
        pareto=_plot(_draw_pareto, report, title="Accuracy against vision tokens"),
        retention=_plot(_draw_retention, report, title="Retention per skill"),
        gallery=[_gallery_card(example, picture) for example, picture in gallery],
        num_resamples=NUM_RESAMPLES,
        command=shlex.join(["vico", "eval", str(report["model"]), "--data", str(report["dataset"])]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def format_table(report: dict[str, Any]) -> str:
    """Return the arms as aligned lines of plain text."""
    lines = [["arm", "tokens", "per image", *COLUMNS, "95 % interval", "retention"]]
    for row in (_arm_row(arm, entry) for arm, entry in _in_order(report["arms"])):
        values = [row["accuracy"][column]["value"] for column in COLUMNS]
        interval = row["accuracy"]["mean"]["interval"] or NOTHING
        lines.append(
            [row["label"], row["fraction"], row["tokens"], *values, interval, row["retention"]["value"]]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([label.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for label, *cells in lines
    )


def headline(report: dict[str, Any]) -> str:
    """Return the result in one sentence."""
    arms = report["arms"]
    kept, fraction = _number(arms, "router", "retention", "mean"), _number(arms, "router", "token_fraction")
    if kept is None or fraction is None:
        accuracy = _percent(_number(arms, "full", "accuracy", "mean"))
        return f"No router was evaluated; with full tokens the accuracy is {accuracy}."
    return f"The router keeps {_percent(kept)} of the accuracy with {_round(fraction)} of the vision tokens."


def _comparison(report: dict[str, Any]) -> str:
    arms = report["arms"]
    kept, fraction = _number(arms, "random", "retention", "mean"), _number(arms, "random", "token_fraction")
    if kept is None or fraction is None:
        return ""
    return f"Random tiles keep {_percent(kept)} with {_round(fraction)}."


def _in_order(arms: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the known arms in the order of `ARMS`, then others."""
    for arm in [*ARMS, *(arm for arm in arms if arm not in ARMS)]:
        if arm in arms:
            yield arm, arms[arm]


def _style(arm: str) -> ArmStyle:
    return ARMS.get(arm, ArmStyle(arm.replace("_", " "), "#808080", "P", ""))


def _number(entry: Any, *keys: str) -> float | None:
    """Look up nested keys; None where one is missing, null or not finite."""
    for key in keys:
        entry = entry.get(key) if isinstance(entry, Mapping) else None
    return float(entry) if isinstance(entry, int | float) and math.isfinite(entry) else None


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f} %"


def _round(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def _fixed(value: float | None, unit: str = "") -> str:
    return NOTHING if value is None else f"{value:.1f}{unit}"


def _interval(entry: Mapping[str, Any], key: str, column: str) -> list[float] | None:
    return (entry.get(f"{key}_ci") or {}).get(column)


def _arm_row(arm: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": arm,
        **_style(arm)._asdict(),
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


def _gallery_card(example: RoutedExample, picture: PIL.Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    answers = {"full tokens": example.full_answer, "router": example.router_answer}
    return {
        "source": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "question": example.question.replace(IMAGE_TOKEN, "").strip(),
        "expected": example.expected,
        "answers": [(who, text, is_correct(text, example.expected)) for who, text in answers.items()],
        "fraction": _round(example.token_fraction),
    }


def _plot(draw: Callable[[Axes, dict[str, Any]], None], report: dict[str, Any], *, title: str) -> Markup:
    """Draw inline SVG with the page's text colour."""
    with mpl.rc_context(PLOT_STYLE):
        figure, buffer = Figure(figsize=(6.4, 4.2), layout="constrained"), io.StringIO()
        axes = figure.add_subplot()
        draw(axes, report)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper center", ncols=4)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))


def _draw_pareto(axes: Axes, report: dict[str, Any]) -> None:
    """Draw a line per swept arm, and a point with its intervals per arm."""
    axes.set(xlabel="vision tokens (% of full tokens)", ylabel="accuracy, mean over skills (%)")
    swept: dict[str, Any] = {point["arm"]: {} for point in report["pareto"]}
    for arm, entry in _in_order({**swept, **report["arms"]}):
        style = _style(arm)
        points = [p for p in report["pareto"] if p["arm"] == arm and p["accuracy_mean"] is not None]
        line = sorted((p["token_fraction"], p["accuracy_mean"]) for p in points)
        axes.plot([x for x, _ in line], [y for _, y in line], color=style.colour, linewidth=1.3)
        x, y = _number(entry, "token_fraction"), _number(entry, "accuracy", "mean")
        if x is not None and y is not None:
            xerr = [[side] for side in _whiskers(x, entry.get("token_fraction_ci"))]
            yerr = [[side] for side in _whiskers(y, _interval(entry, "accuracy", "mean"))]
            settings: dict[str, Any] = {"fmt": style.marker, "markersize": 8, "markeredgecolor": INK}
            axes.errorbar(x, y, xerr=xerr, yerr=yerr, color=style.colour, label=style.label, **settings)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, symbol=""))


def _draw_retention(axes: Axes, report: dict[str, Any]) -> None:
    """Draw for each skill a bar per arm; full tokens are the line at 100 %."""
    axes.set(ylabel="accuracy kept (% of full tokens)")
    axes.grid(visible=False, axis="x")
    arms = [(arm, entry) for arm, entry in _in_order(report["arms"]) if arm != "full"]
    skills = [s for s in COLUMNS if any(_number(entry, "retention", s) is not None for _, entry in arms)]
    width = 0.84 / max(1, len(arms))
    for index, (arm, entry) in enumerate(arms):
        style, known = _style(arm), [s for s in skills if _number(entry, "retention", s) is not None]
        places = [skills.index(skill) + (index - (len(arms) - 1) / 2) * width for skill in known]
        heights = [entry["retention"][skill] for skill in known]
        intervals = [_interval(entry, "retention", skill) for skill in known]
        whiskers = list(zip(*map(_whiskers, heights, intervals), strict=True)) or None
        axes.bar(
            places, heights, 0.9 * width, yerr=whiskers, color=style.colour, ecolor=INK, label=style.label
        )
    axes.axhline(1, color=_style("full").colour, linestyle="--", label="full tokens")
    axes.set_xticks(range(len(skills)), skills)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))


def _whiskers(value: float, interval: Sequence[float] | None) -> tuple[float, float]:
    """Return the distances from a value to its interval's ends; nan draws nothing."""
    if not interval:
        return math.nan, math.nan
    return max(0.0, value - interval[0]), max(0.0, interval[1] - value)
