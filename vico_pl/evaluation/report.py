"""report.json as a self-contained page and as a table for the terminal, and pictures of routed images."""

import base64
import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import PIL.Image
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vico_pl.data.decode import IMAGE_TOKEN
from vico_pl.data.shards.preview import render
from vico_pl.data.tiling import choose_grid, tile_image
from vico_pl.evaluation.answering import Result
from vico_pl.evaluation.evaluate import RoutedExample
from vico_pl.evaluation.metrics import MEAN, NUM_RESAMPLES
from vico_pl.evaluation.questions import Measure, QuestionSet
from vico_pl.files import atomic_path
from vico_pl.inference.predictor import Predictor
from vico_pl.types import Image

NOTHING = "\N{EN DASH}"
SERVING = {"prefill_gflops": "prefill GFLOPs", "kv_cache_mib": "KV cache MiB"}  # keys of an arm, columns
COSTS = ("first token", *SERVING.values())
MAX_COLUMNS = 8  # groups in the terminal's table; the page has all
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
KEPT, COMPRESSED = "#0072b2", "#4b5563"  # frame and title of a tile
DIM_TO = (74, 78, 88)  # compressed tiles fade towards it, light and dark pixels alike
CHARACTERS_PER_INCH = 11  # of a caption


class ArmStyle(NamedTuple):
    """Name and style of an arm in table, page and plots; markers are hollow, as arms may coincide."""

    label: str
    colour: str  # from the palette of Okabe and Ito, safe for colour-blind readers
    marker: str
    meaning: str


ARMS = {  # in the order of the table
    "full": ArmStyle("full tokens", "#808080", "*", "every tile at full tokens"),
    "reference": ArmStyle("reference", "#6b4c9a", "P", "another model, every tile at full tokens"),
    "router": ArmStyle("router", "#0072b2", "o", "the trained router chooses"),
    "oracle": ArmStyle("oracle", "#009e73", "D", "chooses by the measured harm to the known answers"),
    "greedy_oracle": ArmStyle(
        "greedy oracle", "#117733", "d", "chooses by the harm that a tile adds to those before it"
    ),
    "pixel_detail": ArmStyle("pixel detail", "#d55e00", "s", "tiles with the most edges keep full tokens"),
    "statistics": ArmStyle(
        "statistics", "#882255", "h", "as colour, edges and place of tiles predict the oracle"
    ),
    "downsample": ArmStyle("downsample", "#56b4e9", "v", "a smaller image, all of its tiles at full tokens"),
    "average_pooling": ArmStyle(
        "average pooling", "#8c510a", "p", "full tokens, averaged where it compresses"
    ),
    "fastv": ArmStyle("FastV", "#000000", "X", "from the third layer on, the tokens of most attention"),
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
        headline=_headline(report),
        comparison=_fill("Random tiles keep {kept} with {spent}.", report["arms"].get("random")),
        columns=_columns(report),
        costs=COSTS,
        arms=[_arm_row(report, arm) for arm in _arms(report)],
        pareto=_plot(_draw_pareto, report, title="Accuracy against vision tokens"),
        retention=_plot(_draw_retention, report, title="Retention per group"),
        gallery=[_gallery_card(example, picture) for example, picture in gallery],
        num_resamples=NUM_RESAMPLES,
        is_scored=report["measure"] == Measure.SCORES,
        versions=", ".join(f"{name} {of_it}" for name, of_it in [*report["made_with"].items()][2:] if of_it),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def format_table(report: dict[str, Any]) -> str:
    """Return the arms as aligned lines of plain text."""
    columns = _columns(report)
    shown = columns if len(columns) <= MAX_COLUMNS else columns[-2:]
    lines = [["arm", "tokens", "per image", *shown, "95 % interval", "retention", *COSTS]]
    for row in (_arm_row(report, arm) for arm in _arms(report)):
        values = [row["accuracy"][column]["value"] for column in shown]
        interval, kept = row["accuracy"][MEAN]["interval"], row["retention"]["value"]
        cells = [row["label"], row["fraction"], row["tokens"], *values, interval, kept, *row["costs"]]
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for name, *cells in lines]
    left_out = report["num_left_out"] or 0  # None: not known
    notes = [f"{left_out} records are left out: unusable, or too long for the model"] * (left_out > 0)
    return "\n".join([*rows, f"Accuracy: {report['measure']}.", *notes])


def routing_picture(
    predictor: Predictor, image: Image, ratios: Sequence[int], *, caption: str = ""
) -> PIL.Image.Image:
    """Draw the tiles of an image, thumbnail last, compressed ones dimmed: the more, the coarser."""
    columns, rows = choose_grid(image.shape[2], image.shape[1], predictor.tiling)
    tiles = tile_image(image, predictor.tiling).permute(0, 2, 3, 1).cpu().numpy()
    full_ratio, num_patches = predictor.model.ratios[0], predictor.model.vision.num_patches
    has_thumbnail = len(tiles) > columns * rows
    side = 3 if columns <= 3 else 9 / columns  # inches
    size = (max((columns + has_thumbnail) * side, 4.5), rows * (side + 0.3) + 0.6)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    grid = figure.subplots(rows, columns + has_thumbnail, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    cells = [*grid[:, :columns].flat, *grid[:1, columns:].flat]
    for axes, tile, ratio in zip(cells, tiles, ratios, strict=True):
        colour = KEPT if ratio <= full_ratio else COMPRESSED
        weight = min(1.0, full_ratio / ratio) ** 0.6
        axes.imshow((weight * tile + (1 - weight) * np.array(DIM_TO)).astype(np.uint8))
        axes.set_axis_on()
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=colour, linewidth=4)
        axes.set_title(f"{num_patches // ratio} tokens", color=colour, fontweight="bold")
    if has_thumbnail:
        cells[-1].set_xlabel("thumbnail")
    spent, full = sum(num_patches // ratio for ratio in ratios), len(ratios) * (num_patches // full_ratio)
    lines = [f"{spent} of {full} vision tokens ({100 * spent / full:.0f} %); dimmed: compressed"]
    for line in caption.splitlines():
        lines += textwrap.wrap(line, int(CHARACTERS_PER_INCH * size[0]))
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize="medium", parse_math=False)
    return render(figure)


def build_gallery(
    questions: QuestionSet, examples: Sequence[RoutedExample]
) -> list[tuple[RoutedExample, PIL.Image.Image]]:
    """Draw the examples of an evaluation, in their order."""
    wanted = {example.question.sample for example in examples}
    images = {n: sample.images[0] for n, (sample, _) in enumerate(questions.samples()) if n in wanted}
    return [(e, routing_picture(questions.predictor, images[e.question.sample], e.ratios)) for e in examples]


def _arms(report: dict[str, Any]) -> list[str]:
    return [arm for arm in ARMS if arm in report["arms"]]


def _columns(report: dict[str, Any]) -> list[str]:
    """Return the groups and the means over groups and questions; one group is its own mean."""
    columns = [*report["arms"]["full"]["accuracy"]]
    return columns if len(columns) > 3 else [MEAN]


def _headline(report: dict[str, Any]) -> str:
    arms = report["arms"]
    if "router" in arms:
        return _fill(
            "The router keeps {kept} of the accuracy with {spent} of the vision tokens.", arms["router"]
        )
    right = f"At full tokens the accuracy is {_percent(arms['full']['accuracy'][MEAN])}."
    return right + _fill(" All tiles compressed keep {kept} of it with {spent}.", arms.get("all_compressed"))


def _fill(sentence: str, arm: dict[str, Any] | None) -> str:
    if arm is None:
        return ""
    kept, spent = _percent(arm["retention"][MEAN]), f"{100 * arm['token_fraction']:.0f} %"
    return sentence.format(kept=kept, spent=spent)


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f} %"


def _arm_row(report: dict[str, Any], arm: str) -> dict[str, Any]:
    entry = report["arms"][arm]
    return {
        "name": arm,
        **ARMS[arm]._asdict(),
        "tokens": f"{entry['vision_tokens_per_image']:.1f}",
        "fraction": _percent(entry["token_fraction"]),
        "accuracy": {column: _cell(entry, "accuracy", column) for column in entry["accuracy"]},
        "retention": _cell(entry, "retention", MEAN),
        "costs": [
            f"{entry['first_token_ms']:.1f} ms",
            *(f"{float(f'{entry[key]:.3g}'):,g}" for key in SERVING),
        ],
    }


def _cell(entry: dict[str, Any], key: str, column: str) -> dict[str, str]:
    interval = entry[f"{key}_ci"][column]
    text = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""
    return {"value": _percent(entry[key][column]), "interval": text}


def _gallery_card(example: RoutedExample, picture: PIL.Image.Image) -> dict[str, Any]:
    buffer, question = io.BytesIO(), example.question
    picture.save(buffer, "JPEG", quality=90)
    results, is_scored = {"full tokens": example.full, "router": example.router}, bool(question.metric)
    return {
        "source": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "question": question.prompt[-1].replace(IMAGE_TOKEN, "").strip(),
        "expected": " / ".join(dict.fromkeys(question.answers)),
        "results": [_result_row(who, result, is_scored=is_scored) for who, result in results.items()],
        "fraction": f"{100 * example.token_fraction:.0f} %",
    }


def _result_row(who: str, result: Result, *, is_scored: bool) -> dict[str, Any]:
    verdict = {1.0: "\N{CHECK MARK}", 0.0: "\N{BALLOT X} wrong"}.get(result.score, f"{result.score:.2f}")
    text = result.answer or "(no answer)" if is_scored else f"agreement {_percent(result.score)}"
    return {"who": who, "text": text, "verdict": verdict if is_scored else "", "is_right": result.score > 0.5}


def _plot(draw: Callable[[Axes, dict[str, Any]], None], report: dict[str, Any], *, title: str) -> Markup:
    """Draw inline SVG with the page's text colour."""
    with mpl.rc_context(PLOT_STYLE):
        figure, buffer = Figure(figsize=(6.4, 4.2), layout="constrained"), io.StringIO()
        draw(figure.add_subplot(), report)
        figure.legend(loc="outside upper center", ncols=4)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))


def _draw_pareto(axes: Axes, report: dict[str, Any]) -> None:
    """Draw a line per swept arm, and a point with its interval per arm."""
    axes.set(xlabel="vision tokens (% of full tokens)", ylabel="accuracy, mean over groups (%)")
    for arm in _arms(report):
        style, entry = ARMS[arm], report["arms"][arm]
        swept = [point for point in report["pareto"] if point["arm"] == arm]
        line = sorted((point["token_fraction"], point["accuracy_mean"]) for point in swept)
        axes.plot([x for x, _ in line], [y for _, y in line], color=style.colour, linewidth=1.3)
        axes.errorbar(
            entry["token_fraction"],
            entry["accuracy"][MEAN],
            yerr=_whiskers(entry, "accuracy", [MEAN]),
            color=style.colour,
            label=style.label,
            fmt=style.marker,
            markersize=7 if arm == "router" else 11,
            markeredgewidth=1.8,
            markerfacecolor=style.colour if arm == "router" else "none",
        )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, symbol=""))


def _draw_retention(axes: Axes, report: dict[str, Any]) -> None:
    """Draw for each group a bar per arm; the baseline is the line at 100 %."""
    baseline = "full" if report["reference"] is None else "reference"
    axes.set(ylabel=f"accuracy kept (% of {ARMS[baseline].label})")
    axes.grid(visible=False, axis="x")
    others = [arm for arm in _arms(report) if arm != baseline]
    groups = [g for g in _columns(report) if report["arms"][baseline]["retention"][g] is not None]
    width = 0.84 / max(1, len(others))
    for index, arm in enumerate(others):
        style, entry = ARMS[arm], report["arms"][arm]
        axes.bar(
            np.arange(len(groups)) + (index - (len(others) - 1) / 2) * width,
            [entry["retention"][group] for group in groups],
            0.9 * width,
            yerr=_whiskers(entry, "retention", groups),
            color=style.colour,
            ecolor=INK,
            label=style.label,
        )
    axes.axhline(1, color=ARMS[baseline].colour, linestyle="--", label=ARMS[baseline].label)
    axes.set_xticks(range(len(groups)), groups, rotation=30 if len(groups) > MAX_COLUMNS else 0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))


def _whiskers(entry: dict[str, Any], key: str, columns: Sequence[str]) -> np.ndarray:
    """Return the distances from values to the ends of their intervals, (2, columns)."""
    values = np.array([entry[key][column] for column in columns])
    low, high = np.reshape([entry[f"{key}_ci"][column] for column in columns], (-1, 2)).T
    return np.maximum(0.0, [values - low, high - values])
