"""The layouts of released InternVL checkpoints: `internvl` (base model) and `flash` (with routing).

`config.json` says `InternVLChatModel`; the folder's own Python files are never run, its parts are mapped onto
transformers' InternViT and language models. The tensors show which of the two layouts a folder has: Flash
adds `mlp2` (the connector of ratio 16), `pooling_before_gating` and `gating` (the router).

The second half is what all layouts of InternVL share: the language model's tensors and its configuration.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vico_pl.model.families.base import (
    CONFIG_NAME,
    Family,
    FolderContents,
    Json,
    Shape,
    TensorPart,
    routing_rule,
)
from vico_pl.model.router import RELEASED_HEADS
from vico_pl.model.vlm import ModelSpec
from vico_pl.tokens import PLACEHOLDER, load_tokenizer, token_id

ARCHITECTURE = "InternVLChatModel"
HEAD_NAME = "language_model.lm_head.weight"
LANGUAGE_MODELS = {  # architecture -> model_type of transformers
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
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
# Our names -> official ones, replaced in this order; names of the language model excepted.
RENAMES = {
    "vision.tower.": "vision_model.",
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection.": "embeddings.patch_embedding.",
    "encoder.layer.": "encoder.layers.",
    ".attention.projection_layer.": ".attn.proj.",
    ".attention.q_proj.": ".attn.qkv.",
    ".attention.k_proj.": ".attn.qkv.",
    ".attention.v_proj.": ".attn.qkv.",
    ".attention.": ".attn.",
    ".lambda_": ".ls",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    "connectors.by_ratio.4.mlp.": "mlp1.",
    "connectors.by_ratio.16.mlp.": "mlp2.",
    "router.": "",
}
# The chat template of the checkpoints that we read, and what released code sends as its system message.
TEMPLATE = "internvl2_5"
SYSTEM_MESSAGE = (
    "你是书生·万象，英文名是InternVL，"  # noqa: RUF001 - the commas of the original
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


def _read(folder: Path, config: Json, names: set[str] | None) -> FolderContents:
    if problems := "; ".join(_problems(config)):
        raise ValueError(f"{folder / CONFIG_NAME}: {problems}")
    modules = {name.partition(".")[0] for name in names or ()}
    language = dict(config["llm_config"])
    language["model_type"] = LANGUAGE_MODELS[language["architectures"][0]]
    if names is not None and HEAD_NAME not in names:
        language.setdefault("tie_word_embeddings", True)
    threshold, relative = (config.get(f"flash_{kind}_threshold") for kind in ("absolute", "relative"))
    rule = None if threshold is None else routing_rule(folder / CONFIG_NAME, threshold, relative)
    given = config["vision_config"]
    vision = {ours: given.get(name, default) for name, (ours, default) in VISION_KEYS.items()}
    return FolderContents(
        spec=ModelSpec(
            vision={"model_type": "internvl_vision", **vision},
            language=language,
            ratios=[4, 16] if "mlp2" in modules else [4],
            router_heads=RELEASED_HEADS if "gating" in modules else None,
            placeholder_id=0 if names is None else placeholder_id(folder),
        ),
        processing={"tiling": _tiling(config, vision["image_size"]), "chat": {"system": SYSTEM_MESSAGE}},
        rule=rule if "gating" in modules else None,
    )


def _problems(config: Json) -> Iterator[str]:
    # Version v1 of pixel unshuffle, which configurations without one mean, transposes the patches.
    given = {"ps_version": "v1", "template": None, **config}
    yield from unread(given, ps_version="v2", select_layer=-1, downsample_ratio=0.5, template=TEMPLATE)
    vision, language = config.get("vision_config"), config.get("llm_config")
    if not isinstance(vision, dict) or not isinstance(language, dict):
        yield "vision_config or llm_config is missing"
        return
    architectures = language.get("architectures")
    if not architectures or architectures[0] not in LANGUAGE_MODELS:
        yield f"llm_config.architectures is {architectures}; expected one of {', '.join(LANGUAGE_MODELS)}"
    tile_size = vision.get("image_size", VISION_KEYS["image_size"][1])
    if (forced := config.get("force_image_size") or tile_size) != tile_size:
        yield f"force_image_size is {forced} but the position embeddings are of {tile_size} px"


def _tiling(config: Json, tile_size: int) -> Json:
    dynamic = config.get("dynamic_image_size", True)
    return {
        "tile_size": tile_size,
        "min_tiles": config.get("min_dynamic_patch", 1) if dynamic else 1,
        "max_tiles": config.get("max_dynamic_patch", 12) if dynamic else 1,
        "use_thumbnail": config.get("use_thumbnail", True),
    }


def _check_flash(contents: FolderContents) -> FolderContents:
    spec = contents.spec
    base_model(contents)  # refuses what no layout of InternVL can hold
    if spec.ratios != [4, 16]:
        raise ValueError(f"Flash has the ratios [4, 16], the model {spec.ratios}; export with --layout ours")
    if spec.router_heads != RELEASED_HEADS:
        raise ValueError(f"router_heads of the model is {spec.router_heads}; Flash needs {RELEASED_HEADS}")
    if contents.rule is None:
        raise ValueError("Flash stores a routing threshold, the model has none; run 'vico calibrate' first")
    return contents


def _write(folder: Path, contents: FolderContents, dtype: str) -> Json:
    spec, processing = contents.spec, contents.processing or {}
    tiling, system = processing.get("tiling", {}), processing.get("chat", {}).get("system")
    if system != SYSTEM_MESSAGE:
        warnings.warn(
            f"the model was trained with the system message {system!r}, released code will send that of "
            f"'{TEMPLATE}'; train with data.chat.system as the base model has it",
            stacklevel=2,
        )
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": tiling.get("max_tiles", 12) > 1,
        "force_image_size": spec.vision["image_size"],
        "min_dynamic_patch": tiling.get("min_tiles", 1),
        "max_dynamic_patch": tiling.get("max_tiles", 12),
        "use_thumbnail": tiling.get("use_thumbnail", True),
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": TEMPLATE,
        "tie_word_embeddings": spec.language.get("tie_word_embeddings", False),
        "torch_dtype": dtype,
        "llm_config": for_both_generations(spec.language, dtype),
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            **{name: spec.vision.get(ours, default) for name, (ours, default) in VISION_KEYS.items()},
            **dict.fromkeys(("dropout", "drop_path_rate", "attention_dropout"), 0.0),
            "torch_dtype": dtype,
        },
    }
    if contents.rule is not None:
        config |= {
            "flash_mode": True,
            "flash_absolute_threshold": contents.rule.threshold,
            # 0: the quantile is the lowest gate of the call, which a strict comparison then never compresses.
            "flash_relative_threshold": contents.rule.relative_threshold or 0.0,
        }
    return config


def placeholder_id(folder: Path) -> int:
    """Look up the id of the token that stands for a tile: it differs between families.

    Raises:
        ValueError: the folder has no tokenizer, or it lacks the token.
    """
    return token_id(load_tokenizer(folder, required=[PLACEHOLDER]), PLACEHOLDER)


def unread(config: Json, **expected: Any) -> Iterator[str]:
    """Yield the settings that have another than the one value we read; one that is absent has that value."""
    for name, value in expected.items():
        if config.get(name, value) != value:
            yield f"{name} is {config[name]!r}; only {value!r} is read"


def for_both_generations(language: Json, dtype: str) -> Json:
    """Return a language model's config that servers on transformers 4 understand as well as version 5.

    Version 5 writes `rope_parameters`; version 4 passes over that and would silently take its default
    `rope_theta`. The same holds for `dtype` and `torch_dtype`. Servers choose their class by `architectures`.
    """
    kinds = {kind: architecture for architecture, kind in LANGUAGE_MODELS.items()}
    config = {**language, "dtype": dtype, "torch_dtype": dtype}
    config["architectures"] = [kinds[config["model_type"]]]
    rope: Json = dict(config.get("rope_parameters") or {})
    if rope:
        config.setdefault("rope_theta", rope.pop("rope_theta"))
        scaled = rope.get("rope_type", "default") != "default"
        config.setdefault("rope_scaling", rope if scaled else None)
    return config


def parts_of(name: str, shape: Shape, *, renames: Mapping[str, str]) -> Iterator[TensorPart]:
    """Map one of our tensors; `renames` are applied in their order outside the language model."""
    if name.startswith("language."):
        renames = {"language.": "language_model."}
    stored = name
    for ours, theirs in renames.items():
        stored = stored.replace(ours, theirs)
    fused = re.search(r"\.([qkv])_proj\.", name) if ".qkv." in stored else None
    if ".experts." in stored:
        yield from _expert_parts(name, stored, shape)
    elif fused is not None:
        start = "qkv".index(fused[1]) * shape[0]
        yield TensorPart(name, stored, rows=(start, start + shape[0]))
    else:
        yield TensorPart(name, stored)


def _expert_parts(name: str, stored: str, shape: Shape) -> Iterator[TensorPart]:
    """Map a tensor of all experts of a mixture, which are stored apart."""
    experts, kind = stored.rsplit(".", 1)
    projections = {"down_proj": slice(None)}
    if kind == "gate_up_proj":
        half = shape[1] // 2
        projections = {"gate_proj": slice(0, half), "up_proj": slice(half, None)}
    for expert in range(shape[0]):
        for projection, rows in projections.items():
            yield TensorPart(name, f"{experts}.{expert}.{projection}.weight", at=(expert, rows))


def base_model(contents: FolderContents) -> FolderContents:
    """Leave out what Flash adds.

    Raises:
        ValueError: InternVL's layouts cannot hold the model.
    """
    spec = contents.spec
    if spec.vision.get("model_type") != "internvl_vision":
        raise ValueError("InternVL's layouts hold InternViT towers alone; this model's tower is of open_clip")
    kind, known = spec.language["model_type"], LANGUAGE_MODELS.values()
    if kind not in known:
        raise ValueError(f"InternVL's layouts hold language models of {', '.join(known)}; this one is {kind}")
    return replace(contents, spec=replace(spec, ratios=[4], router_heads=None), rule=None)


INTERNVL = Family(
    name="internvl",
    marks=(ARCHITECTURE, "internvl_chat"),
    read=_read,
    parts_of=partial(parts_of, renames=RENAMES),
    reduce=base_model,
    write=_write,
    takes_remote_code=True,
)
FLASH = replace(INTERNVL, name="flash", reduce=_check_flash)
