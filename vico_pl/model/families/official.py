"""The layouts of released InternVL checkpoints: `internvl` (base model) and `flash` (with routing).

`config.json` says `InternVLChatModel`; the folder's own Python files are never run, its parts are mapped onto
transformers' InternViT and language models. Which of the two layouts a folder has, its tensors tell: Flash
adds `mlp2` (the connector of ratio 16), `pooling_before_gating` and `gating` (the router).
"""

import re
import warnings
from functools import partial
from pathlib import Path

from vico_pl.model.families.base import CONFIG_NAME, Contents, Family, Json, Shape, Shapes, TensorPart
from vico_pl.model.families.internvl import (
    LANGUAGE_MODELS,
    base_model,
    check_parts,
    for_both_generations,
    language_parts,
    placeholder_id,
)
from vico_pl.model.router import RELEASED_HEADS, RoutingRule
from vico_pl.model.vlm import ModelSpec

ARCHITECTURE = "InternVLChatModel"
# Settings of InternViT: official name -> (name in transformers, official default).
VISION_KEYS = {
    "hidden_size": ("hidden_size", 3200),
    "intermediate_size": ("intermediate_size", 12800),
    "num_hidden_layers": ("num_hidden_layers", 48),
    "num_attention_heads": ("num_attention_heads", 25),
    "num_channels": ("num_channels", 3),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 14),
    "hidden_act": ("hidden_act", "gelu"),
    "norm_type": ("norm_type", "rms_norm"),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "qkv_bias": ("attention_bias", False),
    "qk_normalization": ("use_qk_norm", True),
    "initializer_factor": ("layer_scale_init_value", 0.1),
    "initializer_range": ("initializer_range", 0.02),
}
# Our names -> official ones, applied in order.
RENAMES = (
    (r"^vision\.tower\.embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^vision\.tower\.embeddings\.position_embeddings$", "vision_model.embeddings.position_embedding"),
    (
        r"^vision\.tower\.embeddings\.patch_embeddings\.projection\.",
        "vision_model.embeddings.patch_embedding.",
    ),
    (r"^vision\.tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"^(vision_model\..*)\.attention\.projection_layer\.", r"\1.attn.proj."),
    (r"^(vision_model\..*)\.attention\.[qkv]_proj\.", r"\1.attn.qkv."),
    (r"^(vision_model\..*)\.attention\.([qk]_norm)\.", r"\1.attn.\2."),
    (r"^(vision_model\..*)\.lambda_([12])$", r"\1.ls\2"),
    (r"^(vision_model\..*)\.layernorm_before\.", r"\1.norm1."),
    (r"^(vision_model\..*)\.layernorm_after\.", r"\1.norm2."),
    (r"^connectors\.by_ratio\.4\.mlp\.", "mlp1."),
    (r"^connectors\.by_ratio\.16\.mlp\.", "mlp2."),
    (r"^router\.", ""),
)
# What the chat templates of released code send as the system message.
SYSTEM_MESSAGES = {
    "internvl2_5": (
        "你是书生·万象，英文名是InternVL，"  # noqa: RUF001 - the commas of the original
        "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    )
}


def is_official(config: Json) -> bool:
    """Say whether a config.json is of these layouts."""
    return ARCHITECTURE in (config.get("architectures") or []) or config.get("model_type") == "internvl_chat"


def read(folder: Path, config: Json, names: set[str] | None) -> Contents:
    """Read a released checkpoint, or one that we exported."""
    problems = list(_problems(config))
    if problems:
        raise ValueError(f"{folder / CONFIG_NAME}: " + "; ".join(problems))
    vision = {
        ours: config["vision_config"].get(name, default) for name, (ours, default) in VISION_KEYS.items()
    }
    architecture = config["llm_config"]["architectures"][0]
    language = {**config["llm_config"], "model_type": LANGUAGE_MODELS[architecture]}
    if names is not None and "language_model.lm_head.weight" not in names:
        language.setdefault("tie_word_embeddings", True)
    has_router = any(name.startswith("gating.") for name in names or ())
    return Contents(
        spec=ModelSpec(
            vision={"model_type": "internvl_vision", **vision},
            language=language,
            ratios=[4, 16] if any(name.startswith("mlp2.") for name in names or ()) else [4],
            router_heads=RELEASED_HEADS if has_router else None,
            placeholder_id=0 if names is None else placeholder_id(folder),
        ),
        processing={"tiling": _tiling(config), "chat": {"system": SYSTEM_MESSAGES[config["template"]]}},
        rule=_rule(config) if has_router else None,
    )


def parts(own: Shapes) -> list[TensorPart]:
    """Map our tensors to official ones."""
    return [piece for name, shape in own.items() for piece in _parts_of(name, shape)]


def _parts_of(name: str, shape: Shape) -> list[TensorPart]:
    if name.startswith("language."):
        return list(language_parts(name, shape, "language_model."))
    stored = name
    for pattern, replacement in RENAMES:
        stored = re.sub(pattern, replacement, stored)
    match = re.search(r"\.attention\.([qkv])_proj\.", name)
    if match is None:
        return [TensorPart(name, stored)]
    start = "qkv".index(match.group(1)) * shape[0]
    return [TensorPart(name, stored, rows=(start, start + shape[0]))]


def _problems(config: Json) -> list[str]:
    """List everything in a configuration that we do not read."""
    problems = []
    if config.get("ps_version", "v1") != "v2":
        problems.append(
            f"ps_version is {config.get('ps_version')!r}: it transposes the patches; only 'v2' is read"
        )
    if config.get("select_layer", -1) != -1:
        problems.append(f"select_layer is {config['select_layer']}; only the last layer, -1, is read")
    if config.get("downsample_ratio", 0.5) != 0.5:
        problems.append(f"downsample_ratio is {config['downsample_ratio']}; expected 0.5")
    if config.get("template") not in SYSTEM_MESSAGES:
        problems.append(
            f"template is {config.get('template')!r}; expected one of {', '.join(SYSTEM_MESSAGES)}"
        )
    vision, language = config.get("vision_config"), config.get("llm_config")
    if not isinstance(vision, dict) or not isinstance(language, dict):
        return [*problems, "vision_config or llm_config is missing"]
    architectures = language.get("architectures")
    if not architectures or architectures[0] not in LANGUAGE_MODELS:
        problems.append(
            f"llm_config.architectures is {architectures}; expected one of {', '.join(LANGUAGE_MODELS)}"
        )
    tile_size = vision.get("image_size", VISION_KEYS["image_size"][1])
    forced = config.get("force_image_size") or tile_size
    if forced != tile_size:
        problems.append(f"force_image_size is {forced} but the position embeddings are of {tile_size} px")
    return problems


def _tiling(config: Json) -> Json:
    dynamic = config.get("dynamic_image_size", True)
    return {
        "tile_size": config["vision_config"].get("image_size", VISION_KEYS["image_size"][1]),
        "min_tiles": config.get("min_dynamic_patch", 1) if dynamic else 1,
        "max_tiles": config.get("max_dynamic_patch", 12) if dynamic else 1,
        "use_thumbnail": config.get("use_thumbnail", True),
    }


def _rule(config: Json) -> RoutingRule | None:
    if "flash_absolute_threshold" not in config:
        return None
    return RoutingRule(
        threshold=config["flash_absolute_threshold"],
        relative_threshold=config.get("flash_relative_threshold"),
    )


def _check_flash(contents: Contents) -> Contents:
    spec = contents.spec
    check_parts(spec)
    if spec.ratios != [4, 16]:
        raise ValueError(
            f"Flash has the ratios [4, 16], the model {spec.ratios}; export it with --layout ours"
        )
    if spec.router_heads != RELEASED_HEADS:
        had = "no router" if spec.router_heads is None else f"a router of {spec.router_heads} heads"
        raise ValueError(f"Flash needs a router of {RELEASED_HEADS} heads, the model has {had}")
    if contents.rule is None:
        raise ValueError(
            "Flash stores the routing threshold and the model has none; run 'vico calibrate' first"
        )
    return contents


def _write(folder: Path, contents: Contents, dtype: str, *, with_routing: bool) -> Json:
    spec = contents.spec
    tiling = (contents.processing or {}).get("tiling", {})
    tile_size = spec.vision["image_size"]
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": tiling.get("max_tiles", 12) > 1,
        "force_image_size": tile_size,
        "min_dynamic_patch": tiling.get("min_tiles", 1),
        "max_dynamic_patch": tiling.get("max_tiles", 12),
        "use_thumbnail": tiling.get("use_thumbnail", True),
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": _template(contents),
        "tie_word_embeddings": spec.language.get("tie_word_embeddings", False),
        "torch_dtype": dtype,
        "llm_config": for_both_generations(spec.language, dtype),
        "vision_config": _vision_config(spec.vision, dtype),
    }
    if with_routing and contents.rule is not None:
        config |= {
            "flash_mode": True,
            "flash_absolute_threshold": contents.rule.threshold,
            # 0: the quantile is the lowest gate of the call, which a strict comparison then never compresses.
            "flash_relative_threshold": contents.rule.relative_threshold or 0.0,
        }
    return config


def _vision_config(vision: Json, dtype: str) -> Json:
    stored = {name: vision.get(ours, default) for name, (ours, default) in VISION_KEYS.items()}
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        **stored,
        "dropout": 0.0,
        "drop_path_rate": 0.0,
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
    }


def _template(contents: Contents) -> str:
    system = (contents.processing or {}).get("chat", {}).get("system")
    for name, message in SYSTEM_MESSAGES.items():
        if message == system:
            return name
    template = next(iter(SYSTEM_MESSAGES))
    warnings.warn(
        f"the model was trained with the system message {system!r}, released code will send that of "
        f"'{template}'; train with data.chat.system as the base model has it",
        stacklevel=2,
    )
    return template


INTERNVL = Family(
    name="internvl",
    recognises=is_official,
    read=read,
    parts=parts,
    reduce=base_model,
    write=partial(_write, with_routing=False),
)
FLASH = Family(
    name="flash",
    recognises=is_official,
    read=read,
    parts=parts,
    reduce=_check_flash,
    write=partial(_write, with_routing=True),
)
