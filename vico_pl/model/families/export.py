"""Writing a model folder in another layout, tensor by tensor: no model is built, no value changes."""

import shutil
from pathlib import Path

import torch

from vico_pl.files import read_json, write_json
from vico_pl.model.families import FAMILIES
from vico_pl.model.families.base import (
    CALIBRATION_NAME,
    CONFIG_NAME,
    OURS,
    Family,
    Json,
    Shapes,
    assemble_own,
    assemble_stored,
)
from vico_pl.model.families.folder import (
    ModelFolder,
    check_tensors,
    naming,
    open_folder,
    own_tensors,
)
from vico_pl.model.families.internvl import placeholder_id
from vico_pl.model.families.official import FLASH, INTERNVL
from vico_pl.model.families.tensors import write_tensors
from vico_pl.model.vlm import ModelSpec, VisionLanguageModel
from vico_pl.tokens import PLACEHOLDER

LAYOUT_NAMES = tuple(layout.name for layout in FAMILIES)
# What `--template` does not copy: the new folder has its own.
NOT_OF_A_TEMPLATE = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    CONFIG_NAME,
    ".*",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def export(
    source: Path | str,
    output: Path,
    *,
    layout: str,
    template: Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the model of `source` to `output`; its configuration comes last and marks a complete folder.

    `template` is a released folder whose remote code and tokenizer go along, as servers want them. `dtype`
    None keeps every tensor's type.

    Raises:
        ValueError: the layout cannot hold the model, a folder cannot be read, or `output` is not empty.
    """
    folder, target = open_folder(source), _layout(layout)
    contents = target.reduce(folder.contents)
    if template is not None:
        _check_template(template, folder)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output}: not empty; name a new folder")
    with naming(source):
        everything, kept = shapes_of(folder.contents.spec), shapes_of(contents.spec)
    check_tensors(folder, folder.family.parts(everything), everything)
    state = assemble_own(folder.family.parts(kept), kept, folder.tensors.__getitem__, dtype=dtype)
    output.mkdir(parents=True, exist_ok=True)
    write_tensors(assemble_stored(target.parts(kept), state), output)
    _copy_companions(folder, output, template, with_calibration=target is OURS)
    config = target.write(output, contents, _type_name(state))
    if template is not None and target in (FLASH, INTERNVL):
        config |= _auto_map(template)
    write_json(config, output / CONFIG_NAME, indent=2)


def shapes_of(spec: ModelSpec) -> Shapes:
    """Return the shapes of all tensors of a model, which is not built for that."""
    with torch.device("meta"):
        model = VisionLanguageModel(spec)
    return {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()}


def _layout(name: str) -> Family:
    for layout in FAMILIES:
        if layout.name == name:
            return layout
    raise ValueError(f"layout is '{name}'; expected one of {', '.join(LAYOUT_NAMES)}")


def _check_template(template: Path, folder: ModelFolder) -> None:
    if not (template / CONFIG_NAME).is_file():
        raise ValueError(f"{template}: no {CONFIG_NAME}; --template takes a released model folder")
    if not any((template / name).exists() for name in TOKENIZER_FILES[:2]):
        return  # it keeps the model's tokenizer
    theirs, ours = placeholder_id(template), folder.contents.spec.placeholder_id
    if theirs != ours:
        raise ValueError(
            f"{template}: its tokenizer has {PLACEHOLDER} at {theirs}, the model at {ours}; "
            "take the template of the same family"
        )


def _auto_map(template: Path) -> Json:
    """Return where a template's configuration names its remote code."""
    config = read_json(template / CONFIG_NAME)
    return {"auto_map": config["auto_map"]} if "auto_map" in config else {}


def _copy_companions(
    folder: ModelFolder, output: Path, template: Path | None, *, with_calibration: bool
) -> None:
    for name in (*TOKENIZER_FILES, *([CALIBRATION_NAME] if with_calibration else [])):  # with its curve
        if (folder.path / name).is_file():
            shutil.copyfile(folder.path / name, output / name)
    if template is not None:
        shutil.copytree(
            template, output, ignore=shutil.ignore_patterns(*NOT_OF_A_TEMPLATE), dirs_exist_ok=True
        )


def _type_name(state: dict[str, torch.Tensor]) -> str:
    """Return the type of the output layer or embeddings, which stands for the model's."""
    names = [name for name in state if name.endswith(("lm_head.weight", "embed_tokens.weight"))]
    return str(state[names[0]].dtype).removeprefix("torch.")
