"""Causal language models of transformers: built from a config, if they compute here what they compute there.

The losses take logits as hidden states times the head, and packed samples run through our own attention. An
architecture that caps its logits, adds a bias or attends in a way of its own would be trained on another
function without a word. So a tiny random copy of it is compared with transformers, one sample at a time.
"""

import json
from functools import lru_cache
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from vico_pl.model.packed import run_packed

# Keys of stored configs that describe how a model was run or saved, not its shape.
_NOT_OF_THE_SHAPE = {"torch_dtype", "dtype", "attn_implementation", "transformers_version", "use_cache"}


_LENGTHS = [23, 17]  # tokens of the samples that are compared
_HEADS, _MIN_LAYERS, _TOLERANCE = 4, 2, 1e-3
_MAX_PARAMETERS = 20_000_000  # of a copy; above it, the size is in settings that are not known here
# Sizes of a copy, where the architecture has them; all other settings are kept.
_SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 48,
    "num_hidden_layers": _MIN_LAYERS,
    "num_attention_heads": _HEADS,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
}
_NOT_COPIED = {"architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"}
_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}


def build_language_model(config: dict[str, Any]) -> PreTrainedModel:
    """Build a causal language model with random float32 weights from a transformers config with `model_type`.

    The config may come from a checkpoint, of transformers 4 too.

    Raises:
        ValueError: transformers knows no such model, or it does not compute here what it computes there.
    """
    # `auto_map` names code in the model folder, which must never run: transformers offers to run it even if
    # it knows the model type.
    ignored, kind = {*_NOT_OF_THE_SHAPE, "auto_map", "model_type"}, config["model_type"]
    settings = {k: v for k, v in config.items() if not k.startswith("_") and k not in ignored}
    try:
        language_config = AutoConfig.for_model(kind, **settings)
    except (KeyError, StrictDataclassError) as error:
        raise ValueError(f"language model: {' '.join(str(error).split())}") from error
    if type(language_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"language model: model_type is '{kind}', no causal language model of transformers")
    check_parity(language_config)
    return AutoModelForCausalLM.from_config(language_config, attn_implementation="sdpa", dtype=torch.float32)


def check_parity(config: PreTrainedConfig) -> None:
    """Compare the logits of packed samples with those of transformers' own forward pass.

    Raises:
        ValueError: they differ, or the architecture cannot run packed samples at all.
    """
    shrunk = json.dumps({"model_type": config.model_type, **_shrink(config)}, sort_keys=True, default=str)
    problem = _find_problem(shrunk)
    if problem is not None:
        kind = f"language model: model_type '{config.model_type}' with these settings"
        raise ValueError(f"{kind} is not supported: {problem}; docs/models.md lists the families that are")


def _shrink(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings of a copy with small sizes, which keeps how many query heads share a key."""
    settings = config.to_dict()
    kept = settings.keys() - _NOT_COPIED - _IDS
    small = {name: settings[name] for name in kept if not name.startswith("_")} | dict.fromkeys(_IDS)
    for name, size in _SMALL.items():
        name = config.attribute_map.get(name, name)
        if small.get(name) is not None:
            small[name] = size
    if small.get("num_key_value_heads") is not None:
        shared = config.num_attention_heads // config.num_key_value_heads
        small["num_key_value_heads"] = max(1, _HEADS // shared)
    if small.get("layer_types"):  # one layer of each kind
        kinds = list(dict.fromkeys(small["layer_types"])) * _MIN_LAYERS
        small["layer_types"] = kinds
        small[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kinds)
    return small


@lru_cache
def _find_problem(shrunk: str) -> str | None:
    """Return why a copy does not compute what transformers computes; None: it does."""
    settings = json.loads(shrunk)
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.device("meta"):
            parameters = AutoModelForCausalLM.from_config(config, attn_implementation="eager").parameters()
        if sum(parameter.numel() for parameter in parameters) > _MAX_PARAMETERS:
            return "no small copy can be made to compare it with transformers"
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            return _compare(_random_model(config))
    except Exception as error:  # each architecture fails in its own way
        return f"packed samples cannot run through it ({type(error).__name__}: {error})".replace("\n", " ")


def _random_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for parameter in model.parameters():  # all: the caller may have told transformers to leave them empty
        if parameter.ndim > 1:
            parameter.normal_(std=0.2)
        else:  # norms, and biases, which would not show at their usual zero
            parameter.normal_(mean=1.0, std=0.3)
    return model


def _compare(model: PreTrainedModel) -> str | None:
    if not model._can_set_attn_implementation():  # noqa: SLF001 - its only effect is a warning otherwise
        return "its attention is not transformers' common interface, so packed samples would see each other"
    samples = [torch.randint(model.config.vocab_size, (length,)) for length in _LENGTHS]
    expected = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in samples])
    if not _differ(_packed_logits(model, samples), expected):
        return None
    alone = torch.cat([_packed_logits(model, [ids]) for ids in samples])
    return _cause(model) if _differ(alone, expected) else "packed samples would see each other"


def _cause(model: PreTrainedModel) -> str:
    """Name the setting that makes logits differ, if it is a known one."""
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(model.config, name, None):
            return f"{name} is set, and losses take logits as hidden states times the head"
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        return "its output layer has a bias, and losses take logits as hidden states times the head"
    return "its logits are not hidden states times the head, or its attention is of another kind"


def _packed_logits(model: PreTrainedModel, samples: list[Tensor]) -> Tensor:
    embeddings = model.get_input_embeddings()(torch.cat(samples))
    states = run_packed(model, embeddings, [len(ids) for ids in samples])
    return states @ model.get_output_embeddings().weight.T


def _differ(found: Tensor, expected: Tensor) -> bool:
    """Say whether logits differ by more than rounding."""
    return not torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE)
