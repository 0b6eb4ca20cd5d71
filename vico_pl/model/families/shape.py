"""What a `config.json` alone says of a model: its shape and type, without weights and tokenizer."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vico_pl.model.families.internvl import LANGUAGE_MODELS
from vico_pl.model.families.layout import Json
from vico_pl.model.families.native import HF
from vico_pl.model.families.official import VISION_KEYS, is_official
from vico_pl.model.families.ours import FORMAT, OURS, read_json
from vico_pl.model.vlm import ModelSpec

_STORED_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_shape(path: Path) -> tuple[ModelSpec, torch.dtype]:
    """Read a `config.json` of any layout; returns the shape and the type of the weights.

    The id of the placeholder is not known where the tokenizer has it: it is 0 then.

    Raises:
        ValueError: the file is damaged or of a layout that is not read.
    """
    config = read_json(path)
    try:
        return _spec(config), _stored_type(path.parent, config)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    except NotImplementedError as error:
        raise ValueError(f"{path}: its 'architectures' is {config.get('architectures')}; not read") from error


def _spec(config: Json) -> ModelSpec:
    if OURS.recognises(config):
        return ModelSpec(**{key: value for key, value in config.items() if key != "format"})
    if is_official(config):
        given, language = config["vision_config"], config["llm_config"]
        vision = {ours: given.get(name, default) for name, (ours, default) in VISION_KEYS.items()}
        language = {**language, "model_type": LANGUAGE_MODELS[language["architectures"][0]]}
    elif HF.recognises(config):
        vision, language = dict(config["vision_config"]), config["text_config"]
        for name in ("dtype", "torch_dtype"):
            vision.pop(name, None)
    else:
        raise NotImplementedError
    return ModelSpec(
        vision={**vision, "model_type": "internvl_vision"}, language=language, ratios=[4], placeholder_id=0
    )


def _stored_type(folder: Path, config: Json) -> torch.dtype:
    named: Any = config.get("torch_dtype") or config.get("dtype")
    if named is not None:
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(named), torch.float32)
    for path in sorted(folder.glob("*.safetensors")) if config.get("format") == FORMAT else ():
        with safe_open(path, framework="pt") as file:
            first = next(iter(file.keys()))
            return _STORED_TYPES.get(file.get_slice(first).get_dtype(), torch.float32)
    return torch.float32
