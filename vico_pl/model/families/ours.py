"""Our own layout: `config.json` is the `ModelSpec`, tensors are named as in our modules."""

import json
from dataclasses import asdict
from pathlib import Path

from vico_pl.model.families.layout import CONFIG_NAME, Contents, Json, Layout
from vico_pl.model.families.pieces import Piece, Shapes
from vico_pl.model.router import RoutingRule
from vico_pl.model.vlm import ModelSpec

PROCESSING_NAME = "processing.json"  # tiling and chat settings
CALIBRATION_NAME = "calibration.json"  # routing threshold, and the curve it was chosen from
FORMAT = "vico_pl"


def read(folder: Path, config: Json, names: set[str]) -> Contents:
    """Read a folder that we wrote."""
    try:
        spec = ModelSpec(**{key: value for key, value in config.items() if key != "format"})
    except TypeError as error:  # keys missing or unknown
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    processing = folder / PROCESSING_NAME
    return Contents(spec=spec, processing=read_json(processing) if processing.exists() else None, rule=None)


def write(folder: Path, contents: Contents, dtype: str) -> Json:
    """Write what lies beside the weights; a calibration that came along keeps its curve."""
    if contents.processing is not None:
        write_json(contents.processing, folder / PROCESSING_NAME)
    if contents.rule is not None and not (folder / CALIBRATION_NAME).exists():
        write_json(asdict(contents.rule), folder / CALIBRATION_NAME)
    return {"format": FORMAT, **asdict(contents.spec)}


def read_json(path: Path) -> Json:
    """Read a JSON object.

    Raises:
        ValueError: the file holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


def write_json(content: Json, path: Path) -> None:
    """Write a JSON object in one step."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_rule(folder: Path) -> RoutingRule | None:
    """Read the threshold that `vico calibrate` wrote into a folder of any layout.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / CALIBRATION_NAME
    if not path.exists():
        return None
    content = read_json(path)
    threshold, relative = content.get("threshold"), content.get("relative_threshold")
    if not isinstance(threshold, float | int) or not isinstance(relative, float | int | None):
        raise ValueError(f"{path}: its threshold is {threshold!r}, no number; run 'vico calibrate' again")
    return RoutingRule(threshold=float(threshold), relative_threshold=relative)


def _pieces(own: Shapes) -> list[Piece]:
    return [Piece(name, name) for name in own]


OURS = Layout(
    name="ours",
    recognises=lambda config: config.get("format") == FORMAT,
    read=read,
    pieces=_pieces,
    reduce=lambda contents: contents,
    write=write,
)
