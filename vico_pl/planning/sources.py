"""Where the shape of a recipe's model is found: a folder, the Hub's cache, parts, or the released sizes.

Nothing is fetched and no weights are read.
"""

from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import try_to_load_from_cache

from vico_pl.files import read_json
from vico_pl.model.families.base import CONFIG_NAME
from vico_pl.model.families.folder import read_shape
from vico_pl.model.families.hub import is_hub_id, split_revision
from vico_pl.model.vlm import ModelSpec
from vico_pl.planning.models import ModelSource
from vico_pl.stages.settings import ModelConfig
from vico_pl.tokens import SPECIAL_TOKENS

INTERN_VIT_300M = {
    "model_type": "internvl_vision",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "attention_bias": True,
    "image_size": 448,
    "patch_size": 14,
}
INTERN_VIT_6B = {
    **INTERN_VIT_300M,
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "attention_bias": False,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
}


def _qwen3(
    hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int = 8
) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    }


_EXPERTS = {
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
# InternVL3.5 as released: vision tower and language model.
RELEASED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1b": (INTERN_VIT_300M, _qwen3(1024, 3072, 28, 16)),
    "2b": (INTERN_VIT_300M, _qwen3(2048, 6144, 28, 16)),
    "4b": (INTERN_VIT_300M, _qwen3(2560, 9728, 36, 32)),
    "8b": (INTERN_VIT_300M, _qwen3(4096, 12288, 36, 32)),
    "14b": (INTERN_VIT_300M, _qwen3(5120, 17408, 40, 40)),
    "38b": (INTERN_VIT_6B, _qwen3(5120, 25600, 64, 64)),
    "30b-a3b": (INTERN_VIT_300M, {**_qwen3(2048, 6144, 48, 32, 4), **_EXPERTS}),
}
# Language models that recipes start from, as released: their embeddings are tied.
LANGUAGE = {"Qwen/Qwen3-0.6B": {**RELEASED["1b"][1], "tie_word_embeddings": True}}


def find_model(config: ModelConfig, shape: str | None = None) -> ModelSource:
    """Find the shape of the model that a recipe starts from, or that of a released size.

    Raises:
        ValueError: it cannot be found without fetching it.
    """
    if shape is not None:
        return _released(shape, f"InternVL3.5 {shape}")
    if config.path is None:
        return _from_parts(config)
    candidates = [path for path in (config.path, config.reference) if path is not None]
    for path in candidates:
        found = _named(path)
        if found is not None:
            return found
    raise ValueError(
        f"{config.path}: its shape is not known here; fetch its {CONFIG_NAME}, set model.path to a folder, "
        f"or say --shape {'|'.join(RELEASED)}"
    )


def _named(path: str) -> ModelSource | None:
    file = Path(path) / CONFIG_NAME
    if file.is_file():
        return _read(file, name=path)
    if not is_hub_id(path):
        return None
    name, revision = split_revision(path)
    cached = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
    if isinstance(cached, str):
        return _read(Path(cached), name=f"{path} (cached)")
    size = name.removeprefix("OpenGVLab/InternVL3_5-").lower()
    return _released(size, f"{path} (as released)") if size in RELEASED else None


def _read(file: Path, *, name: str) -> ModelSource:
    spec, dtype = read_shape(file)
    return ModelSource(name=name, spec=spec, dtype=dtype)


def _released(shape: str, name: str) -> ModelSource:
    if shape not in RELEASED:
        raise ValueError(f"--shape is '{shape}'; expected one of {', '.join(RELEASED)}")
    vision, language = RELEASED[shape]
    spec = ModelSpec(vision=vision, language=language, ratios=[4], placeholder_id=0)
    return ModelSource(name=name, spec=spec, dtype=torch.bfloat16)


def _from_parts(config: ModelConfig) -> ModelSource:
    """Stage `pretrain` puts a model together; pretrained parts have float32 weights there."""
    vision, language = dict(config.vision), dict(config.language)
    if "open_clip" in vision:
        vision = _open_clip_shape(vision["open_clip"], vision.get("image_size"))
    if "path" in language:
        language = _language_shape(language["path"])
    else:
        language["vocab_size"] = max(config.vocab_size, len(SPECIAL_TOKENS))
    spec = ModelSpec(vision=vision, language=language, ratios=config.ratios, placeholder_id=0)
    return ModelSource(name="the parts that the recipe names", spec=spec, dtype=torch.float32)


def _open_clip_shape(name: str, image_size: int | None) -> dict[str, Any]:
    known = open_clip.get_model_config(name)
    if known is None:
        raise ValueError(f"model.vision.open_clip is '{name}', which open_clip does not know")
    shape = dict(known["vision_cfg"])
    return {**shape, "image_size": image_size or shape["image_size"]}


def _language_shape(path: str) -> dict[str, Any]:
    if (Path(path) / CONFIG_NAME).is_file():
        return read_json(Path(path) / CONFIG_NAME)
    cached = try_to_load_from_cache(path, CONFIG_NAME) if is_hub_id(path) else None
    if isinstance(cached, str):
        return read_json(Path(cached))
    if path not in LANGUAGE:
        raise ValueError(
            f"model.language.path {path}: its shape is not known here; fetch its {CONFIG_NAME} first"
        )
    return LANGUAGE[path]
