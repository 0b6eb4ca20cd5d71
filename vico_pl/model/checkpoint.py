"""Model folders: what one stage hands to the next.

    config.json          the `ModelSpec`
    model.safetensors    weights under our own names (the only place that will know foreign ones)
    tokenizer files      written by the tokenizer itself
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vico_pl.model.vlm import ModelSpec, VisionLanguageModel

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT = "vico_pl"
NEW_PARTS = ("connectors.by_ratio.", "router.")  # may be absent from a starting checkpoint: they begin fresh


def save_model(model: VisionLanguageModel, folder: Path) -> None:
    """Write the weights, then the configuration: a folder with a configuration is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    temporary = folder / f".{WEIGHTS_NAME}.partial"
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.replace(folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps({"format": FORMAT, **asdict(model.spec)}, indent=2) + "\n")


def read_spec(folder: Path | str) -> ModelSpec:
    """Read what a model folder holds.

    Raises:
        ValueError: no model folder, no weights in it, or a layout that this version does not read.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name}; a model folder holds {CONFIG_NAME}, {WEIGHTS_NAME} and a tokenizer")
    content = json.loads((folder / CONFIG_NAME).read_text())
    if content.pop("format", None) != FORMAT:
        raise ValueError(f"{folder}/{CONFIG_NAME}: not in vico_pl's layout (key 'format' is not '{FORMAT}')")
    return ModelSpec(**content)


def load_model(
    folder: Path | str, *, ratios: list[int] | None = None, router_heads: int | None = None
) -> VisionLanguageModel:
    """Read a model; `ratios` and `router_heads` add connectors and a router that the folder may not have yet.

    Raises:
        ValueError: the folder cannot be read, or its tensors do not fit; the message lists them all.
    """
    spec = read_spec(folder)
    spec = replace(spec, ratios=ratios or spec.ratios, router_heads=router_heads or spec.router_heads)
    model = VisionLanguageModel(spec)
    state = load_file(Path(folder) / WEIGHTS_NAME)
    _check_tensors(state, model.state_dict(), folder)
    model.load_state_dict(state, strict=False)
    return model.eval()


def _check_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], folder: Path | str) -> None:
    missing = [name for name in wanted.keys() - found.keys() if not name.startswith(NEW_PARTS)]
    problems = [f"missing {name}" for name in missing]
    problems += [f"unknown {name}" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {list(found[name].shape)}, expected {list(wanted[name].shape)}"
        for name in found.keys() & wanted.keys()
        if found[name].shape != wanted[name].shape
    ]
    if problems:
        raise ValueError(f"{folder}: {len(problems)} tensors do not fit: " + "; ".join(sorted(problems)))
