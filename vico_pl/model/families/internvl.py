"""What InternVL's layouts share: configs for transformers 4 and 5, the language model's tensors."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vico_pl.model.families.base import Contents, Json, Shape, TensorPart
from vico_pl.model.vlm import ModelSpec
from vico_pl.tokens import PLACEHOLDER, load_tokenizer, token_id

LANGUAGE_MODELS = {  # architecture -> model_type of transformers
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")


def placeholder_id(folder: Path) -> int:
    """Look up the id of the token that stands for a tile: it differs between families.

    Raises:
        ValueError: the folder has no tokenizer, or it lacks the token.
    """
    return token_id(load_tokenizer(folder, required=[PLACEHOLDER]), PLACEHOLDER)


def for_both_generations(language: Json, dtype: str) -> Json:
    """Return a language model's config that servers on transformers 4 understand as well as version 5.

    Version 5 writes `rope_parameters`; version 4 passes over that and would silently take its default
    `rope_theta`. The same holds for `dtype` and `torch_dtype`. Servers choose their class by `architectures`.
    """
    config = {**language, "dtype": dtype, "torch_dtype": dtype}
    kinds = {kind: architecture for architecture, kind in LANGUAGE_MODELS.items()}
    config["architectures"] = [kinds[config["model_type"]]]
    rope: dict[str, Any] = dict(config.get("rope_parameters") or {})
    if rope:
        config.setdefault("rope_theta", rope.pop("rope_theta"))
        scaled = rope.get("rope_type", "default") != "default"
        config.setdefault("rope_scaling", rope if scaled else None)
    return config


def language_parts(name: str, shape: Shape, prefix: str) -> Iterator[TensorPart]:
    """Map a tensor of the language model; stored mixtures of experts keep each expert apart."""
    stored = prefix + name.removeprefix("language.")
    match = EXPERTS.match(stored)
    if match is None:
        yield TensorPart(name, stored)
        return
    base, kind = match.groups()
    for expert in range(shape[0]):
        if kind == "down_proj":
            yield TensorPart(name, f"{base}.{expert}.down_proj.weight", at=(expert,))
            continue
        half = shape[1] // 2
        yield TensorPart(name, f"{base}.{expert}.gate_proj.weight", at=(expert, slice(0, half)))
        yield TensorPart(name, f"{base}.{expert}.up_proj.weight", at=(expert, slice(half, None)))


def base_model(contents: Contents) -> Contents:
    """Leave out what Flash adds.

    Raises:
        ValueError: InternVL's layouts cannot hold the model.
    """
    check_parts(contents.spec)
    return replace(contents, spec=replace(contents.spec, ratios=[4], router_heads=None), rule=None)


def check_parts(spec: ModelSpec) -> None:
    """Refuse towers and language models that InternVL's layouts have no names for."""
    if spec.vision.get("model_type") != "internvl_vision":
        raise ValueError("InternVL's layouts hold InternViT towers alone; this model's tower is of open_clip")
    kind, known = spec.language["model_type"], LANGUAGE_MODELS.values()
    if kind not in known:
        raise ValueError(f"InternVL's layouts hold language models of {', '.join(known)}; this one is {kind}")
