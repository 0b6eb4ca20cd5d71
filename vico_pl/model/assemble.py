"""A model assembled from parts: randomly initialised from a description, or pretrained by name.

    vision:    {open_clip: ViT-SO400M-14-SigLIP-384, pretrained: webli, image_size: 448}
    language:  {path: Qwen/Qwen3-0.6B}

The connectors between them are randomly initialised; stage `pretrain` trains them first.
"""

from typing import Any

import open_clip
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from vico_pl.model.vlm import ModelSpec, VisionLanguageModel


def assemble_model(
    vision: dict[str, Any],
    language: dict[str, Any],
    *,
    ratios: list[int],
    vocab_size: int,
    placeholder_id: int,
) -> VisionLanguageModel:
    """Build a model from descriptions of its parts; a named part is loaded with its weights.

    The embeddings of a pretrained language model grow to the size of the tokenizer.

    Raises:
        ValueError: a part cannot be loaded.
    """
    tower, language_model = None, None
    if "open_clip" in vision:
        _check_settings("vision", vision, "open_clip", "pretrained", "image_size")
        vision, tower = _pretrained_tower(vision)
    if "path" in language:
        _check_settings("language", language, "path", "revision")
        language_model = _pretrained_language_model(language, vocab_size)
        language = language_model.config.to_dict()
    else:
        language = {**language, "vocab_size": vocab_size}
    spec = ModelSpec(vision=vision, language=language, ratios=ratios, placeholder_id=placeholder_id)
    model = VisionLanguageModel(spec)
    if tower is not None:
        state = tower.state_dict()  # with weights of the pooled embedding, which are not needed
        own = model.vision.tower
        own.load_state_dict({name: state[name] for name in own.state_dict()})
    if language_model is not None:
        model.language = language_model
    return model


def _check_settings(part: str, given: dict[str, Any], beside: str, *known: str) -> None:
    for name in given.keys() - {beside, *known}:
        raise ValueError(f"model.{part} has no setting '{name}' beside {beside}; expected {', '.join(known)}")


def _pretrained_tower(settings: dict[str, Any]) -> tuple[dict[str, Any], nn.Module]:
    """Return the description of an open_clip tower and the tower with its weights."""
    name, pretrained, image_size = (settings.get(key) for key in ("open_clip", "pretrained", "image_size"))
    known = open_clip.get_model_config(name)
    if known is None:
        raise ValueError(f"model.vision.open_clip is '{name}', which open_clip does not know")
    try:
        tower = open_clip.create_model(
            name,
            pretrained=pretrained,  # a tag or a file
            force_image_size=image_size,  # fits position embeddings to other tiles
            require_pretrained=pretrained is not None,
        ).visual
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.vision: open_clip has no weights '{pretrained}' for {name} ({reason})"
        ) from error
    config = {
        **known["vision_cfg"],
        "image_mean": list(tower.preprocess_cfg["mean"]),
        "image_std": list(tower.preprocess_cfg["std"]),
        "quick_gelu": known.get("quick_gelu", False),
    }
    return config | ({"image_size": image_size} if image_size else {}), tower


def _pretrained_language_model(settings: dict[str, Any], vocab_size: int) -> PreTrainedModel:
    """Load a causal language model of transformers in float32; code of the folder never runs."""
    path, revision = settings["path"], settings.get("revision")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model.language.path {path}: no language model to load ({reason})") from error
    if vocab_size > model.config.vocab_size:
        model.resize_token_embeddings(vocab_size)
    return model
