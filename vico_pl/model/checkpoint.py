"""Model folders: what one stage hands to the next.

config.json          the `ModelSpec`
model.safetensors    weights under our own names (the only place that will know foreign ones)
tokenizer files      written by the tokenizer itself
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vico_pl.model.vlm import ModelSpec, VisionLanguageModel

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
PROCESSING_NAME = "processing.json"
FORMAT = "vico_pl"


def save_model(model: VisionLanguageModel, folder: Path) -> None:
    """Write the weights, then the configuration: a folder with a configuration is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in _own_tensors(model).items()}
    temporary = folder / f".{WEIGHTS_NAME}.partial"
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.replace(folder / WEIGHTS_NAME)
    temporary = folder / f".{CONFIG_NAME}.partial"
    temporary.write_text(json.dumps({"format": FORMAT, **asdict(model.spec)}, indent=2) + "\n")
    temporary.replace(folder / CONFIG_NAME)


def read_spec(folder: Path | str) -> ModelSpec:
    """Read what a model folder holds.

    Raises:
        ValueError: no model folder, no weights in it, or a layout that this version does not read.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder}: no {name}; a model folder holds {CONFIG_NAME}, {WEIGHTS_NAME} and a tokenizer"
            )
    try:
        content = json.loads((folder / CONFIG_NAME).read_text())
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"not in vico_pl's layout (key 'format' is not '{FORMAT}')")
        return ModelSpec(**content)
    except (ValueError, TypeError) as error:  # no JSON; keys missing or unknown
        raise ValueError(f"{folder}/{CONFIG_NAME}: {error}") from error


def load_model(
    folder: Path | str, *, ratios: list[int] | None = None, router_heads: int | None = None
) -> VisionLanguageModel:
    """Read a model; `ratios` and `router_heads` add connectors and a router that the folder has not yet.

    Raises:
        ValueError: the folder cannot be read, or its tensors do not fit; the message lists them all.
    """
    stored = read_spec(folder)
    heads = stored.router_heads or router_heads
    if router_heads not in (None, heads):
        raise ValueError(f"{folder}: its router has {heads} attention heads, not {router_heads}")
    spec = replace(stored, ratios=ratios or stored.ratios, router_heads=heads)
    model = VisionLanguageModel(spec)
    state = _read_weights(Path(folder) / WEIGHTS_NAME)
    _check_tensors(state, _own_tensors(model), folder, fresh=_fresh_parts(stored, spec))
    model.load_state_dict(state, strict=False)
    return model.eval()


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: no readable weights ({error})") from error


def _own_tensors(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """Return the state without second names of one tensor, such as a head that is tied to the embeddings."""
    seen: set[int] = set()
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            state[name] = tensor
    return state


def _fresh_parts(stored: ModelSpec, wanted: ModelSpec) -> tuple[str, ...]:
    """Return prefixes of the parts that a folder does not claim to have: they begin fresh."""
    new_ratios = [ratio for ratio in wanted.ratios if ratio not in stored.ratios]
    connectors = [f"connectors.by_ratio.{ratio}." for ratio in new_ratios]
    return (*connectors, *(["router."] if stored.router_heads is None else []))


def _check_tensors(
    found: dict[str, torch.Tensor],
    wanted: dict[str, torch.Tensor],
    folder: Path | str,
    *,
    fresh: tuple[str, ...],
) -> None:
    missing = [name for name in wanted.keys() - found.keys() if not name.startswith(fresh)]
    problems = [f"missing {name}" for name in missing]
    problems += [f"unknown {name}" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {list(found[name].shape)}, expected {list(wanted[name].shape)}"
        for name in found.keys() & wanted.keys()
        if found[name].shape != wanted[name].shape
    ]
    if problems:
        raise ValueError(f"{folder}: {len(problems)} tensors do not fit: " + "; ".join(sorted(problems)))
