"""Opening model folders, reading models from them and writing them.

config.json          the `ModelSpec`, or the configuration of another family, which is recognised by it
model.safetensors    weights, in numbered shards above 5 GB
tokenizer files      written by the tokenizer itself
processing.json      tiling and chat settings (ours; other families have them in their configuration)
calibration.json     routing threshold (takes precedence over that of a Flash configuration)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from vico_pl.files import read_json, write_json
from vico_pl.model.connector import Connector
from vico_pl.model.families import FAMILIES
from vico_pl.model.families.base import (
    CONFIG_NAME,
    FORMAT,
    OURS,
    Contents,
    Family,
    Json,
    Shapes,
    TensorPart,
    assemble_own,
    read_rule,
    stored_shapes,
)
from vico_pl.model.families.tensors import StoredTensors, write_tensors
from vico_pl.model.router import build_router
from vico_pl.model.vlm import ModelSpec, VisionLanguageModel

MAX_PROBLEMS = 20  # a wrong layout has thousands


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model folder of any family, opened but not loaded."""

    path: Path
    family: Family
    contents: Contents
    tensors: StoredTensors


def open_folder(path: Path | str) -> ModelFolder:
    """Find out what a model folder holds, without reading its weights.

    Raises:
        ValueError: no model folder, no weights in it, or a layout that is not read.
    """
    path = Path(path)
    if not (path / CONFIG_NAME).is_file():
        raise ValueError(
            f"{path}: no {CONFIG_NAME}; a model folder holds {CONFIG_NAME}, weights and a tokenizer"
        )
    config = read_json(path / CONFIG_NAME)
    family = _family_of(config, path / CONFIG_NAME)
    tensors = StoredTensors(path, family.stored_name)
    contents = family.read(path, config, tensors.names)
    contents = replace(contents, rule=read_rule(path) or contents.rule)
    return ModelFolder(path=path, family=family, contents=contents, tensors=tensors)


def read_shape(path: Path) -> tuple[ModelSpec, torch.dtype]:
    """Read a `config.json` of any family without tokenizer; returns the shape and the type of the weights.

    Raises:
        ValueError: the file is damaged or of no known family.
    """
    config = read_json(path)
    spec = _family_of(config, path).read(path.parent, config, None).spec
    return spec, _stored_type(path.parent, config)


def _family_of(config: Json, path: Path) -> Family:
    for family in FAMILIES:
        if family.recognises(config):
            return family
    raise ValueError(
        f"{path}: its 'architectures' is {config.get('architectures')}; expected vico_pl's "
        "own format, InternVLChatModel or InternVLForConditionalGeneration"
    )


def _stored_type(folder: Path, config: Json) -> torch.dtype:
    named = config.get("torch_dtype") or config.get("dtype")
    if named is not None:
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(named), torch.float32)
    if config.get("format") == FORMAT and any(folder.glob("*.safetensors")):
        tensors = StoredTensors(folder)
        return tensors[min(tensors.names)].dtype
    return torch.float32


def load_model(
    path: Path | str,
    *,
    ratios: list[int] | None = None,
    router_heads: int | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> VisionLanguageModel:
    """Load a model; `ratios` and `router_heads` add connectors and a router that the folder lacks.

    Weights get the type `dtype`; with None they keep the one they are stored in and remain views of the file.

    Raises:
        ValueError: the folder cannot be read, or its tensors do not fit; the message lists them.
    """
    folder = open_folder(path)
    stored = folder.contents.spec
    heads = stored.router_heads or router_heads
    if router_heads not in (None, heads):
        raise ValueError(f"{path}: its router has {heads} attention heads, not {router_heads}")
    spec = replace(stored, ratios=ratios or stored.ratios, router_heads=heads)
    with naming(path), no_init_weights():  # untouched memory is never allocated
        model = VisionLanguageModel(spec)
    model.language.tie_weights()  # initialisation would have done it
    new = _new_parts(stored, spec)
    wanted = {k: tuple(v.shape) for k, v in own_tensors(model).items() if not k.startswith(new)}
    parts = folder.family.parts(wanted)
    check_tensors(folder, parts, wanted)
    state = assemble_own(parts, wanted, folder.tensors.__getitem__, dtype=dtype)
    model.load_state_dict(state, strict=False, assign=True)
    model.language.tie_weights()  # loading replaced one of the two
    _initialise(model, new, dtype or model.head.dtype)
    return model.eval()


def save_model(model: VisionLanguageModel, folder: Path, *, processing: Json | None = None) -> None:
    """Write a model in our layout, the configuration last: a folder with a configuration is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    state = {name: tensor.detach().cpu() for name, tensor in own_tensors(model).items()}
    write_tensors(state, folder)
    contents = Contents(spec=model.spec, processing=processing, rule=None)
    write_json(OURS.write(folder, contents, str(model.head.dtype)), folder / CONFIG_NAME, indent=2)


def own_tensors(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Return the state without second names of one tensor, such as a head that is tied to the embeddings."""
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor
    return state


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Prefix errors with the folder whose model cannot be built."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_tensors(folder: ModelFolder, parts: list[TensorPart], own: Shapes) -> None:
    """Compare a folder's tensors with those of a model.

    Raises:
        ValueError: some are missing, unknown or of another shape; the message lists them.
    """
    wanted, found = stored_shapes(parts, own), folder.tensors.names
    problems = [f"missing {name}" for name in wanted.keys() - found]
    problems += [f"unknown {name}" for name in found - wanted.keys() if not _is_tied_head(folder, name)]
    problems += [
        f"{name} has shape {list(folder.tensors.shape(name))}, expected {list(wanted[name])}"
        for name in wanted.keys() & found
        if folder.tensors.shape(name) != wanted[name]
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:MAX_PROBLEMS])
        rest = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        raise ValueError(f"{folder.path}: {len(problems)} tensors do not fit: {listed}{rest}")


def _is_tied_head(folder: ModelFolder, name: str) -> bool:
    """Say whether a tensor repeats the embeddings that the output layer is tied to, as some files do."""
    if not name.endswith("lm_head.weight") or not folder.contents.spec.language.get("tie_word_embeddings"):
        return False
    tensors, embeddings = folder.tensors, name.replace("lm_head.weight", "model.embed_tokens.weight")
    return embeddings in tensors.names and torch.equal(tensors[name], tensors[embeddings])


def _new_parts(stored: ModelSpec, wanted: ModelSpec) -> tuple[str, ...]:
    """Return prefixes of the parts that a folder lacks: they are randomly initialised."""
    new_ratios = [ratio for ratio in wanted.ratios if ratio not in stored.ratios]
    connectors = [f"connectors.by_ratio.{ratio}." for ratio in new_ratios]
    return (*connectors, *(["router."] if stored.router_heads is None else []))


def _initialise(model: VisionLanguageModel, prefixes: tuple[str, ...], dtype: torch.dtype) -> None:
    """Initialise the parts that were built without weights."""
    vision_width, language_width = model.vision.width, model.language.config.hidden_size
    for ratio in model.ratios:
        if f"connectors.by_ratio.{ratio}." in prefixes:
            connector = Connector(ratio, vision_width=vision_width, language_width=language_width)
            model.connectors.by_ratio[str(ratio)] = connector.to(dtype)
    heads = model.spec.router_heads
    if "router." in prefixes and heads is not None:
        # Always float32: it is small, and alone in being trained in stage 2.
        model.router = build_router(
            model.spec.router, vision_width, num_ratios=len(model.ratios), num_heads=heads
        )
