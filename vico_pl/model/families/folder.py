"""Model folders: open one of any family, load its model, save a model, write a folder in another layout.

config.json          the `ModelSpec`, or the configuration of another family, which is recognised by it
model.safetensors    weights, in numbered shards above 5 GB
tokenizer files      written by the tokenizer itself
processing.json      tiling and chat settings (ours; other families have them in their configuration)
calibration.json     routing threshold (takes precedence over that of a Flash configuration)
"""

import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico_pl.files import read_json, remove_leftovers, sync_files, write_json
from vico_pl.model.connector import FULL_RATIO, Connector
from vico_pl.model.families import FAMILIES
from vico_pl.model.families.base import (
    CALIBRATION_NAME,
    CONFIG_NAME,
    OURS,
    Family,
    FolderContents,
    Json,
    StoredTensors,
    name_dtypes,
    routing_rule,
    write_tensors,
)
from vico_pl.model.families.official import FLASH, INTERNVL, placeholder_id
from vico_pl.model.flops import build_without_weights
from vico_pl.model.router import RoutingRule, build_router
from vico_pl.model.vlm import ModelSpec, VisionLanguageModel
from vico_pl.tokens import PLACEHOLDER

MAX_PROBLEMS = 20  # a wrong layout has thousands
LAYOUTS = {family.name: family for family in FAMILIES}
VOCABULARY_FILES = ("tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    *("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)
# What an export copies from `--template`; the rest of a model is its own.
TEMPLATE_FILES = ("*.py", "*processor_config.json", *TOKENIZER_FILES)


_NO_CODE = (
    "the folder will have no remote code, without which released code and servers cannot load it; give "
    "--template the released model of the same size (flash: as OpenGVLab/InternVL3_5-1B-Flash)"
)


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model folder of any family, opened but not loaded."""

    path: Path
    family: Family
    contents: FolderContents
    tensors: StoredTensors


def open_folder(path: Path | str) -> ModelFolder:
    """Find out what a model folder holds, without reading its weights.

    Raises:
        ValueError: no model folder, no weights in it, or a layout that is not read.
    """
    path = Path(path)
    if not (path / CONFIG_NAME).is_file():
        remedy = "a model folder holds it, weights and a tokenizer"
        if (path / "model" / CONFIG_NAME).is_file():
            remedy = f"this is the folder of a run, whose model is {path}/model"
        elif path.suffix == ".ckpt":
            remedy = f"'vico export {path} FOLDER' makes a model folder of a checkpoint"
        raise ValueError(f"{path}: no {CONFIG_NAME}; {remedy}")
    config = read_json(path / CONFIG_NAME)
    family = _family_of(config, path / CONFIG_NAME)
    tensors = StoredTensors(path, family.stored_name)
    contents = _contents(family, path / CONFIG_NAME, config, tensors.names)
    contents = replace(contents, rule=_calibrated(path / CALIBRATION_NAME) or contents.rule)
    _check_depth(path, contents.spec, len(tensors.names))
    return ModelFolder(path=path, family=family, contents=contents, tensors=tensors)


def _contents(family: Family, path: Path, config: Json, names: set[str] | None) -> FolderContents:
    try:
        return family.read(path.parent, config, names)
    except (TypeError, KeyError, AttributeError) as error:  # settings of other types than a family has
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error


def _check_depth(path: Path, spec: ModelSpec, num_tensors: int) -> None:
    """Refuse a number of layers that would take hours to build, before the tensors are compared."""
    for part in (spec.vision, spec.language):
        for name in ("num_hidden_layers", "layers", "n_layer", "n_layers", "num_layers"):
            if isinstance(part.get(name), int) and part[name] > num_tensors:
                found = f"{name} is {part[name]}, but the folder holds {num_tensors} tensors"
                raise ValueError(f"{path / CONFIG_NAME}: {found}")


def read_shape(path: Path) -> tuple[ModelSpec, torch.dtype]:
    """Read a `config.json` of any family without tokenizer; returns the shape and the type of the weights.

    Raises:
        ValueError: the file is damaged or of no known family.
    """
    config = read_json(path)
    spec = _contents(_family_of(config, path), path, config, None).spec
    return spec, _stored_type(path.parent, config)


def load_model(
    path: Path | str,
    *,
    ratios: list[int] | None = None,
    router_heads: int | None = None,
    connector_start: str = "mean",
    dtype: torch.dtype | None = torch.float32,
) -> VisionLanguageModel:
    """Load a model; `ratios` and `router_heads` add connectors and a router that the folder lacks.

    Added connectors start as `connector_start`, one of `STARTS`, says: as about the mean of full tokens, if
    they are made of whole ones, or random. Weights get the type `dtype`; with None they keep the one they are
    stored in and remain views of the file.

    Raises:
        ValueError: the folder cannot be read, or its tensors do not fit; the message lists them.
    """
    folder = open_folder(path)
    stored = folder.contents.spec
    heads = stored.router_heads or router_heads
    if router_heads not in (None, heads):
        raise ValueError(f"{path}: its router has {heads} attention heads, not {router_heads}")
    spec = replace(stored, ratios=ratios or stored.ratios, router_heads=heads)
    new = tuple(f"connectors.by_ratio.{ratio}." for ratio in spec.ratios if ratio not in stored.ratios)
    new += ("router.",) if stored.router_heads is None else ()
    shapes = own_tensors(_build(path, spec, device="meta"))  # first without memory: the sizes may be absurd
    wanted = {name: tensor for name, tensor in shapes.items() if not name.startswith(new)}
    check_tensors(folder, wanted)
    model = _build(path, spec, device="cpu")
    state = folder.family.to_own(folder.tensors, wanted, dtype=dtype)
    model.load_state_dict(state, strict=False, assign=True)
    model.language.tie_weights()  # loading replaced one of the two
    _initialise_new(model, stored, connector_start, dtype or model.head.dtype)
    return model.eval()


def save_model(
    model: VisionLanguageModel,
    folder: Path,
    *,
    processing: Json | None = None,
    rule: RoutingRule | None = None,
) -> None:
    """Write a model in our layout, the configuration last: a folder with a configuration is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    write_tensors({name: tensor.detach().cpu() for name, tensor in own_tensors(model).items()}, folder)
    contents = FolderContents(spec=model.spec, processing=processing, rule=rule)
    config = OURS.write(folder, contents, str(model.head.dtype))
    sync_files(folder)
    write_json(config, folder / CONFIG_NAME, indent=2)


def export(
    source: Path, output: Path, *, layout: str, template: Path | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write the model of `source` to `output`; its configuration comes last and marks a complete folder.

    No model is built and no value changes, unless `dtype` asks for another type. `template` is a released
    folder whose remote code and tokenizer go along, as servers want them.

    Raises:
        ValueError: the layout cannot hold the model, the template is of another, a folder cannot be read, or
            `output` is not empty.
    """
    folder = open_folder(source)
    if layout not in LAYOUTS:
        raise ValueError(f"layout is '{layout}'; expected one of {', '.join(LAYOUTS)}")
    target = LAYOUTS[layout]
    contents = target.reduce(folder.contents)
    code = {} if template is None else _remote_code(template, folder, layout)
    own_files = (*TOKENIZER_FILES, *([CALIBRATION_NAME] if target is OURS else []))  # with its curve
    files = _files(folder.path, own_files) + ([] if template is None else _files(template, TEMPLATE_FILES))
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output}: not empty; name a new folder")
    if target.takes_remote_code and not code:
        warnings.warn(_NO_CODE, stacklevel=2)
    if contents.spec.router_heads is not None and contents.rule is None:
        uncalibrated = f"{source}: its router has no threshold, so every tile will keep full tokens"
        warnings.warn(f"{uncalibrated}; run 'vico calibrate' first", stacklevel=2)
    check_tensors(folder, own_tensors(_build(source, folder.contents.spec, device="meta")))
    kept = own_tensors(_build(source, contents.spec, device="meta"))
    state = folder.family.to_own(folder.tensors, kept, dtype=dtype)
    output.mkdir(parents=True, exist_ok=True)
    _check_calibration(folder.path / CALIBRATION_NAME, contents, name_dtypes(state.values()))
    write_tensors(target.to_stored(state), output)
    for file in files:
        shutil.copyfile(file, output / file.name)
    # The output layer, or what it is tied to, stands for the whole model.
    heads = (state[name] for name in state if name.endswith(("lm_head.weight", "embed_tokens.weight")))
    config = target.write(output, contents, str(next(heads).dtype).removeprefix("torch."))
    sync_files(output)
    write_json(config | (code if target.takes_remote_code else {}), output / CONFIG_NAME, indent=2)


def own_tensors(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Return the state without second names of one tensor, such as a head that is tied to the embeddings."""
    state = model.state_dict(keep_vars=True)
    first_names = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: tensor for name, tensor in state.items() if first_names[id(tensor)] == name}


def check_tensors(folder: ModelFolder, own: Mapping[str, Tensor]) -> None:
    """Compare a folder's tensors with those of a model, whose values do not count.

    Raises:
        ValueError: some are missing, unknown or of another shape; the message lists them.
    """
    wanted, found = folder.family.stored_shapes(own), folder.tensors.names
    problems = [f"missing {name}" for name in wanted.keys() - found]
    problems += [f"unknown {name}" for name in found - wanted.keys() if not _is_tied_head(folder, name)]
    shapes = {name: folder.tensors.shape(name) for name in wanted.keys() & found}
    differing = [(name, shape) for name, shape in shapes.items() if shape != wanted[name]]
    problems += [f"{name} has shape {list(s)}, expected {list(wanted[name])}" for name, s in differing]
    if problems:
        listed = "; ".join(sorted(problems)[:MAX_PROBLEMS])
        rest = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        raise ValueError(f"{folder.path}: {len(problems)} tensors do not fit: {listed}{rest}")


def _family_of(config: Json, path: Path) -> Family:
    family = next((family for family in FAMILIES if family.recognises(config)), None)
    if family is None:
        found, known = config.get("architectures"), ", ".join(LAYOUTS)
        raise ValueError(f"{path}: its 'architectures' is {found}; expected a model in the layout {known}")
    return family


def _calibrated(path: Path) -> RoutingRule | None:
    """Read the threshold that `vico calibrate` wrote into a folder of any family."""
    if not path.is_file():
        return None
    content = read_json(path)
    return routing_rule(path, content.get("threshold"), content.get("relative_threshold"))


def _check_calibration(file: Path, contents: FolderContents, written: str) -> None:
    """Warn of a threshold chosen from scores of another type than the weights that are written."""
    made_in = read_json(file).get("dtype", written) if file.is_file() else written
    if contents.rule is not None and made_in != written:
        differs = f"{file}: the threshold was chosen with weights of {made_in}, this export has {written}"
        warnings.warn(
            f"{differs}, which may route some tiles otherwise; calibrate with --dtype", stacklevel=3
        )


def _stored_type(folder: Path, config: Json) -> torch.dtype:
    named = config.get("torch_dtype") or config.get("dtype")
    if named is not None:
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(named), torch.float32)
    if OURS.recognises(config) and any(folder.glob("*.safetensors")):
        tensors = StoredTensors(folder)
        return tensors[min(tensors.names)].dtype
    return torch.float32


def _is_tied_head(folder: ModelFolder, name: str) -> bool:
    """Say whether a tensor repeats the embeddings that the output layer is tied to, as some files do."""
    if not name.endswith("lm_head.weight") or not folder.contents.spec.language.get("tie_word_embeddings"):
        return False
    tensors, embeddings = folder.tensors, name.replace("lm_head.weight", "model.embed_tokens.weight")
    return embeddings in tensors.names and torch.equal(tensors[name], tensors[embeddings])


def _build(path: Path | str, spec: ModelSpec, *, device: str) -> VisionLanguageModel:
    try:
        model = build_without_weights(spec, device=device)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model.language.tie_weights()  # initialisation would have done it
    return model


def _initialise_new(model: VisionLanguageModel, stored: ModelSpec, start: str, dtype: torch.dtype) -> None:
    vision_width, language_width = model.vision.width, model.language.config.hidden_size
    connectors: Any = model.connectors.by_ratio
    full = connectors[str(FULL_RATIO)]
    for ratio in model.ratios:
        if ratio not in stored.ratios:
            connector = Connector(ratio, vision_width=vision_width, language_width=language_width)
            if start == "mean" and connector.factor % full.factor == 0:
                connector.start_as_mean(full)
            connectors[str(ratio)] = connector.to(dtype)
    heads, num_ratios = model.spec.router_heads, len(model.ratios)
    if stored.router_heads is None and heads is not None:
        # Always float32: it is small, and alone in being trained in stage 2.
        model.router = build_router(model.spec.router, vision_width, num_ratios=num_ratios, num_heads=heads)


def _files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files of a folder to copy; a link may lead out of a snapshot into the Hub's cache alone."""
    root = folder.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root
    files = [path for path in sorted(folder.iterdir()) if any(map(path.match, patterns))]
    for path in files:
        if not path.is_file() or not path.resolve().is_relative_to(root):
            raise ValueError(f"{path}: expected a plain file, or a link to one in there; put a copy there")
    return files


def _remote_code(template: Path, folder: ModelFolder, layout: str) -> Json:
    """Check that a template fits model and layout; return where its configuration names its code."""
    if not (template / CONFIG_NAME).is_file():
        takes = "--template takes a released model folder or its name on the Hub"
        raise ValueError(f"{template}: no {CONFIG_NAME}; {takes}")
    config = read_json(template / CONFIG_NAME)
    kind = _family_of(config, template / CONFIG_NAME).name
    if kind == FLASH.name and not any(key.startswith("flash_") for key in config):
        kind = INTERNVL.name
    if layout not in (kind, OURS.name):
        raise ValueError(f"{template}: its layout is {kind}; expected a template in the layout {layout}")
    if any((template / name).exists() for name in VOCABULARY_FILES):  # else the model's tokenizer is kept
        theirs, ours = placeholder_id(template), folder.contents.spec.placeholder_id
        if theirs != ours:
            raise ValueError(
                f"{template}: its tokenizer has {PLACEHOLDER} at {theirs}, the model at {ours}; "
                "take the template of the same family"
            )
    has_code = "auto_map" in config and any(template.glob("*.py"))
    return {"auto_map": config["auto_map"]} if has_code else {}
