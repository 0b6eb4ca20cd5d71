"""report.json as a self-contained page and as a table for the terminal, and pictures of routed images."""

import base64
import io
import shlex
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import PIL.Image
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vico_pl.data.decode import IMAGE_TOKEN
from vico_pl.data.shards.inspect import read_samples
from vico_pl.data.shards.preview import render
from vico_pl.data.tiling import choose_grid, tile_image
from vico_pl.evaluation.evaluate import RoutedExample
from vico_pl.evaluation.metrics import NUM_RESAMPLES, SKILLS, is_correct
from vico_pl.evaluation.questions import NOTHING_RIGHT
from vico_pl.files import atomic_path
from vico_pl.inference.predictor import Predictor
from vico_pl.types import Image

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
KEPT, COMPRESSED = "#0072b2", "#4b5563"  # frame and title of a tile
DIM_TO = (74, 78, 88)  # compressed tiles fade towards it, light and dark pixels alike
CHARACTERS_PER_INCH = 11  # of a caption


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
    router, random = report["arms"]["router"], report["arms"]["random"]
    page = environment.get_template("report.html.j2").render(
        report=report,
        headline=_warning(report)
        or _fill("The router keeps {kept} of the accuracy with {spent} of the vision tokens.", router),
        comparison=_fill("Random tiles keep {kept} with {spent}.", random),
        columns=COLUMNS,
        arms=[_arm_row(report, arm) for arm in ARMS],
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
    """Return the arms as aligned lines of plain text, and a warning if nothing is right at full tokens."""
    lines = [["arm", "tokens", "per image", *COLUMNS, "95 % interval", "retention"]]
    for row in (_arm_row(report, arm) for arm in ARMS):
        values = [row["accuracy"][column]["value"] for column in COLUMNS]
        interval = row["accuracy"]["mean"]["interval"]
        lines.append(
            [row["label"], row["fraction"], row["tokens"], *values, interval, row["retention"]["value"]]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for name, *cells in lines]
    return "\n".join([*rows, *filter(None, [_warning(report)])])


@torch.no_grad()
def route_image(predictor: Predictor, image: Image) -> list[int]:
    """Return the ratio the router chooses for each tile of an image, the thumbnail last."""
    return predictor.choose_ratios(predictor.encode(tile_image(image, predictor.tiling))).tolist()


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
    predictor: Predictor, folder: Path, examples: Sequence[RoutedExample]
) -> list[tuple[RoutedExample, PIL.Image.Image]]:
    """Draw the examples of an evaluation in the order of the set."""
    wanted = {example.question.sample: example for example in examples}
    return [
        (wanted[position], routing_picture(predictor, sample.images[0], wanted[position].ratios))
        for position, sample in enumerate(read_samples(folder))
        if position in wanted
    ]


def _warning(report: dict[str, Any]) -> str:
    kept = report["arms"]["full"]["retention"]["mean"]
    return f"{NOTHING_RIGHT}." if kept is None else ""


def _fill(sentence: str, arm: dict[str, Any]) -> str:
    kept, spent = _percent(arm["retention"]["mean"]), f"{100 * arm['token_fraction']:.0f} %"
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
        "accuracy": {column: _cell(entry, "accuracy", column) for column in COLUMNS},
        "retention": _cell(entry, "retention", "mean"),
        "first_token": f"{entry['first_token_ms']:.1f} ms",
    }


def _cell(entry: dict[str, Any], key: str, column: str) -> dict[str, str]:
    interval = entry[f"{key}_ci"][column]
    text = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""
    return {"value": _percent(entry[key][column]), "interval": text}


def _gallery_card(example: RoutedExample, picture: PIL.Image.Image) -> dict[str, Any]:
    buffer, question = io.BytesIO(), example.question
    picture.save(buffer, "JPEG", quality=90)
    answers = {"full tokens": example.full_answer, "router": example.router_answer}
    return {
        "source": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "question": question.text.replace(IMAGE_TOKEN, "").strip(),
        "expected": question.expected,
        "answers": [(who, text, is_correct(text, question.expected)) for who, text in answers.items()],
        "fraction": f"{100 * example.token_fraction:.0f} %",
    }


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
    axes.set(xlabel="vision tokens (% of full tokens)", ylabel="accuracy, mean over skills (%)")
    for arm, style in ARMS.items():
        swept = [point for point in report["pareto"] if point["arm"] == arm]
        line = sorted((point["token_fraction"], point["accuracy_mean"]) for point in swept)
        axes.plot([x for x, _ in line], [y for _, y in line], color=style.colour, linewidth=1.3)
        entry = report["arms"][arm]
        settings: dict[str, Any] = {"fmt": style.marker, "markersize": 8, "markeredgecolor": INK}
        axes.errorbar(
            entry["token_fraction"],
            entry["accuracy"]["mean"],
            yerr=_whiskers(entry, "accuracy", ["mean"]),
            color=style.colour,
            label=style.label,
            **settings,
        )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, symbol=""))


def _draw_retention(axes: Axes, report: dict[str, Any]) -> None:
    """Draw for each skill a bar per arm; full tokens are the line at 100 %."""
    axes.set(ylabel="accuracy kept (% of full tokens)")
    axes.grid(visible=False, axis="x")
    full, *others = ARMS
    skills = [skill for skill in COLUMNS if report["arms"][full]["retention"][skill] is not None]
    width = 0.84 / len(others)
    for index, arm in enumerate(others):
        style, entry = ARMS[arm], report["arms"][arm]
        axes.bar(
            np.arange(len(skills)) + (index - (len(others) - 1) / 2) * width,
            [entry["retention"][skill] for skill in skills],
            0.9 * width,
            yerr=_whiskers(entry, "retention", skills),
            color=style.colour,
            ecolor=INK,
            label=style.label,
        )
    axes.axhline(1, color=ARMS[full].colour, linestyle="--", label=ARMS[full].label)
    axes.set_xticks(range(len(skills)), skills)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))


def _whiskers(entry: dict[str, Any], key: str, columns: Sequence[str]) -> np.ndarray:
    """Return the distances from values to the ends of their intervals, (2, columns)."""
    values = np.array([entry[key][column] for column in columns])
    low, high = np.reshape([entry[f"{key}_ci"][column] for column in columns], (-1, 2)).T
    return np.maximum(0.0, [values - low, high - values])
