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
        _check_settings("vision", vision, beside="open_clip", known=("pretrained", "image_size"))
        vision, tower = pretrained_tower(
            vision["open_clip"],
            pretrained=vision.get("pretrained"),
            image_size=vision.get("image_size"),
        )
    if "path" in language:
        _check_settings("language", language, beside="path", known=("revision",))
        language_model = pretrained_language_model(
            language["path"], revision=language.get("revision"), vocab_size=vocab_size
        )
        language = language_model.config.to_dict()
    else:
        language = {**language, "vocab_size": vocab_size}
    model = VisionLanguageModel(
        ModelSpec(vision=vision, language=language, ratios=ratios, placeholder_id=placeholder_id)
    )
    if tower is not None:
        _load_tower(model.vision.tower, tower)
    if language_model is not None:
        model.language = language_model
    return model


def pretrained_tower(
    name: str, *, pretrained: str | None = None, image_size: int | None = None
) -> tuple[dict[str, Any], nn.Module]:
    """Return the description of an open_clip tower and the tower with its weights.

    `pretrained` is one of open_clip's tags or a file; `image_size` fits position embeddings to other tiles.

    Raises:
        ValueError: open_clip does not know the name or the tag, or cannot fetch the weights.
    """
    known = open_clip.get_model_config(name)
    if known is None:
        raise ValueError(f"model.vision.open_clip is '{name}', which open_clip does not know")
    try:
        clip = open_clip.create_model(
            name,
            pretrained=pretrained,
            force_image_size=image_size,
            require_pretrained=pretrained is not None,
        )
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.vision: open_clip has no weights '{pretrained}' for {name} ({reason})"
        ) from error
    config = dict(known["vision_cfg"])
    seen = clip.visual.preprocess_cfg
    config |= {
        "image_size": image_size or config["image_size"],
        "image_mean": list(seen["mean"]),
        "image_std": list(seen["std"]),
        "quick_gelu": known.get("quick_gelu", False),
    }
    return config, clip.visual


def pretrained_language_model(path: str, *, revision: str | None, vocab_size: int) -> PreTrainedModel:
    """Load a causal language model of transformers in float32; code of the folder never runs.

    Raises:
        ValueError: there is none at `path`.
    """
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


def _check_settings(part: str, given: dict[str, Any], *, beside: str, known: tuple[str, ...]) -> None:
    for name in given.keys() - {beside, *known}:
        raise ValueError(f"model.{part} has no setting '{name}' beside {beside}; expected {', '.join(known)}")


def _load_tower(tower: nn.Module, pretrained: nn.Module) -> None:
    """Copy the weights that compute patch features; those of the pooled embedding are not needed."""
    state = pretrained.state_dict()
    missing = tower.state_dict().keys() - state.keys()
    assert not missing, f"open_clip built a tower without {sorted(missing)}"
    tower.load_state_dict({name: state[name] for name in tower.state_dict()})
