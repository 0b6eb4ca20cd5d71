"""The layout of transformers' own InternVL, `hf`: base model only, as transformers has no Flash.

transformers stores it as `language_model.model.*`, `vision_tower.*`, `multi_modal_projector.*` and loads that
and the names of its modules alike (`model.language_model.*`, `lm_head.weight`); so do we.
"""

import re
from pathlib import Path

from vico_pl.files import read_json, write_json
from vico_pl.model.families.base import CONFIG_NAME, Contents, Family, Json, Shape, Shapes, TensorPart
from vico_pl.model.families.internvl import (
    LANGUAGE_MODELS,
    base_model,
    for_both_generations,
    language_parts,
    placeholder_id,
)
from vico_pl.model.vision import IMAGENET_MEAN, IMAGENET_STD
from vico_pl.model.vlm import ModelSpec

ARCHITECTURE = "InternVLForConditionalGeneration"
PROCESSOR_NAME = "preprocessor_config.json"
WHOLE_PROCESSOR_NAME = "processor_config.json"  # transformers 5 keeps the image processor in here
CONNECTOR_PARTS = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
MODULE_NAMES = (  # names of modules -> stored names
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", ""),
)


def recognises(config: Json) -> bool:
    """Say whether a config.json is of this layout."""
    return ARCHITECTURE in (config.get("architectures") or []) or config.get("model_type") == "internvl"


def stored_name(name: str) -> str:
    """Return the stored name of a tensor that may be named as a module.

    >>> stored_name("model.language_model.norm.weight"), stored_name("vision_tower.layernorm.bias")
    ('language_model.model.norm.weight', 'vision_tower.layernorm.bias')
    """
    for pattern, replacement in MODULE_NAMES:
        renamed = re.sub(pattern, replacement, name)
        if renamed != name:
            return renamed
    return name


def read(folder: Path, config: Json, names: set[str] | None) -> Contents:
    """Read a checkpoint of transformers."""
    problems = list(_problems(config))
    if problems:
        raise ValueError(f"{folder / CONFIG_NAME}: " + "; ".join(problems))
    has_head = names is None or "language_model.lm_head.weight" in names
    tied = config["text_config"].get("tie_word_embeddings", config.get("tie_word_embeddings", not has_head))
    vision = {k: v for k, v in config["vision_config"].items() if k not in ("dtype", "torch_dtype")}
    vision["image_size"] = _side(vision.get("image_size", 448))
    vision["patch_size"] = _side(vision.get("patch_size", 14))
    return Contents(
        spec=ModelSpec(
            vision={**vision, "model_type": "internvl_vision"},
            language={**config["text_config"], "tie_word_embeddings": tied},
            ratios=[4],
            router_heads=None,
            placeholder_id=0 if names is None else placeholder_id(folder),
        ),
        processing={"tiling": _tiling(folder, vision["image_size"]), "chat": {"system": None}},
        rule=None,
    )


def parts(own: Shapes) -> list[TensorPart]:
    """Map our tensors to those of transformers."""
    return [piece for name, shape in own.items() for piece in _parts_of(name, shape)]


def write(folder: Path, contents: Contents, dtype: str) -> Json:
    """Write the image processor; return the configuration."""
    spec = contents.spec
    tiling = (contents.processing or {}).get("tiling", {})
    side = spec.vision["image_size"]
    write_json(_processor(tiling, side), folder / PROCESSOR_NAME, indent=2)
    tied = spec.language.get("tie_word_embeddings", False)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "image_token_id": spec.placeholder_id,
        "image_seq_length": (side // spec.vision["patch_size"] // 2) ** 2,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": tied,
        "dtype": dtype,
        "torch_dtype": dtype,
        "text_config": for_both_generations({**spec.language, "tie_word_embeddings": tied}, dtype),
        "vision_config": {
            **spec.vision,
            "image_size": [side] * 2,
            "patch_size": [spec.vision["patch_size"]] * 2,
        },
    }


def _parts_of(name: str, shape: Shape) -> list[TensorPart]:
    if name.startswith("language."):
        return list(language_parts(name, shape, "language_model."))
    match = re.match(r"connectors\.by_ratio\.4\.mlp\.(\d)\.(.*)", name)
    if match is not None:
        return [TensorPart(name, f"multi_modal_projector.{CONNECTOR_PARTS[match.group(1)]}.{match.group(2)}")]
    return [TensorPart(name, name.replace("vision.tower.", "vision_tower.", 1))]


def _problems(config: Json) -> list[str]:
    problems = []
    if config.get("downsample_ratio", 0.5) != 0.5:
        problems.append(f"downsample_ratio is {config['downsample_ratio']}; expected 0.5")
    if config.get("vision_feature_layer", -1) != -1:
        problems.append(
            f"vision_feature_layer is {config['vision_feature_layer']}; only the last one, -1, is read"
        )
    for part in ("vision_config", "text_config"):
        if not isinstance(config.get(part), dict):
            return [*problems, f"{part} is missing"]
    kind = config["text_config"].get("model_type")
    known = LANGUAGE_MODELS.values()
    if kind not in known:
        problems.append(f"text_config.model_type is {kind!r}; expected one of {', '.join(known)}")
    if not config["vision_config"].get("use_mean_pooling", True):
        problems.append("use_mean_pooling is false: a final norm that InternVL's layouts have no place for")
    sizes = {name: config["vision_config"].get(name) for name in ("image_size", "patch_size")}
    return problems + [
        f"vision_config.{name} is {size}; tiles and patches must be square"
        for name, size in sizes.items()
        if isinstance(size, list) and len(set(size)) != 1
    ]


def _tiling(folder: Path, tile_size: int) -> Json:
    processor = _stored_processor(folder)
    return {
        "tile_size": tile_size,
        "min_tiles": processor.get("min_patches", 1),
        "max_tiles": processor.get("max_patches", 12),
        "use_thumbnail": True,
    }


def _stored_processor(folder: Path) -> Json:
    """Return the image processor's settings from where transformers looks first, or none."""
    whole, alone = folder / WHOLE_PROCESSOR_NAME, folder / PROCESSOR_NAME
    inner = read_json(whole).get("image_processor") if whole.exists() else None
    return inner or (read_json(alone) if alone.exists() else {})


def _processor(tiling: Json, side: int) -> Json:
    return {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "processor_class": "InternVLProcessor",
        "crop_to_patches": tiling.get("max_tiles", 12) > 1,
        "min_patches": tiling.get("min_tiles", 1),
        "max_patches": tiling.get("max_tiles", 12),
        "size": {"height": side, "width": side},
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "do_convert_rgb": True,
    }


def _side(size: int | list[int]) -> int:
    """Return the side of a square given as one number or two."""
    return size if isinstance(size, int) else size[0]


HF = Family(
    name="hf",
    recognises=recognises,
    stored_name=stored_name,
    read=read,
    parts=parts,
    reduce=base_model,
    write=write,
)
