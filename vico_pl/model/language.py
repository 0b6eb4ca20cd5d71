"""Causal language models of transformers, built from a config and run on packed samples.

Packed samples are concatenated and must not attend to each other. transformers can infer the boundaries from
position ids, but leaks silently with `use_cache=True` or an all-ones mask; so they are passed explicitly.

The losses take logits as hidden states times the head. An architecture that caps its logits, adds a bias or
attends in a way of its own would be trained on another function without a word. So a tiny random copy of each
language model is compared with transformers, one sample at a time.
"""

import json
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int32
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

# What `model.attention` chooses from, and the names under which transformers knows our functions;
# one with "flash" in it transformers would take for its own.
PACKED_ATTENTION = {"sdpa": "vico_segments", "flash": "vico_varlen"}

# Keys of stored configs that describe how a model was run or saved, not its shape. `auto_map` names code in
# the folder, which must never run: transformers offers to run it even if it knows the model type.
_RUN_KEYS = {"torch_dtype", "dtype", "attn_implementation", "transformers_version", "use_cache", "auto_map"}

# Sizes of a copy that is compared with transformers, where the architecture has them; all else is kept.
_HEADS, _MIN_LAYERS = 4, 2
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
_LENGTHS = [23, 17]  # tokens of the samples that are compared
_MAX_PARAMETERS = 20_000_000  # of a copy; above it, the size is in settings that are not known here

KeyValues = dict[int, tuple[Tensor, Tensor]]  # layer -> keys and values, each (1, heads, S, width)


@dataclass(frozen=True, kw_only=True)
class Prefixes:
    """Tokens before segments, from an earlier pass that kept their keys and values."""

    kept: KeyValues
    starts: list[int]  # place in that pass of each segment's first token
    lengths: list[int]


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Boundaries of concatenated samples, and the prefixes they continue.

    One object instead of lists: torch.compile would specialise on the length of every list it sees.
    """

    lengths: list[int]
    bounds: Int32[Tensor, " _"]  # 0 and the end of each; flash-attn's cu_seqlens
    keep: KeyValues | None = None  # filled layer by layer
    prefixes: Prefixes | None = None

    def visible(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the keys and values that each segment sees."""
        layer = cast("int", module.layer_idx)
        if self.keep is not None:
            self.keep[layer] = (key, value)
        pieces = [list(x.split(self.lengths, dim=2)) for x in (key, value)]
        if self.prefixes is not None:
            ranges = list(zip(self.prefixes.starts, self.prefixes.lengths, strict=True))
            for own, kept in zip(pieces, self.prefixes.kept[layer], strict=True):
                before = [kept.narrow(2, start, length) for start, length in ranges]
                own[:] = [torch.cat(both, 2) for both in zip(before, own, strict=True)]
        return pieces[0], pieces[1]


def run_packed(
    model: PreTrainedModel,
    embeddings: Float[Tensor, "S D"],
    lengths: list[int],
    *,
    keep: KeyValues | None = None,
    prefixes: Prefixes | None = None,
) -> Float[Tensor, "S D"]:
    """Run concatenated samples of these lengths; returns hidden states: times the head they are the logits.

    Equal to running them one by one (tested to 1e-5). `keep` is filled with the keys and values of all
    layers. With `prefixes`, segments continue from tokens whose keys and values an earlier call kept, as
    if they had been run together.
    """
    model.set_attn_implementation(getattr(model, "packed_attention", PACKED_ATTENTION["sdpa"]))
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=embeddings.device)
    first = [0] * len(lengths) if prefixes is None else prefixes.lengths
    positions = [torch.arange(start, start + length) for start, length in zip(first, lengths, strict=True)]
    output = model.base_model(
        inputs_embeds=embeddings[None],
        position_ids=torch.cat(positions).to(embeddings.device)[None],
        use_cache=False,
        segments=Segments(lengths=lengths, bounds=bounds, keep=keep, prefixes=prefixes),
    )
    states, scale = output.last_hidden_state[0], _logit_scale(model.config)
    return states if scale == 1 else states * scale


def _logit_scale(config: PreTrainedConfig) -> float:
    """Return the factor of the logits: Cohere multiplies them by a number, Granite divides them by one."""
    return getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)


def set_packed_attention(model: PreTrainedModel, name: str) -> None:
    """Choose the attention of packed samples, `sdpa` (default) or `flash`."""
    model.packed_attention = PACKED_ATTENTION[name]  # type: ignore[assignment]  # nn.Module: or a tensor


def check_flash_attention(device: torch.device) -> None:
    """Check that attention `flash` can run on a device.

    Raises:
        ValueError: it cannot; the message says what to do.
    """
    if device.type != "cuda":
        problem = f"which runs on CUDA devices, but this run is on {device.type}; set model.attention=sdpa"
    elif find_spec("flash_attn") is None:
        problem = "but flash-attn is not installed; pip install flash-attn, or set model.attention=sdpa"
    else:
        return
    raise ValueError(f"model.attention is 'flash', {problem}")


# Attention functions as transformers calls them: query is (1, heads, S, width), key and value may have fewer
# heads; `given` holds scaling, dropout and, in some layers of some models, the width of a sliding window.


@torch.compiler.disable
def segment_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Any, *, segments: Segments, **given: Any
) -> tuple[Tensor, None]:
    """Causal attention inside each segment and its prefix."""
    queries, visible = query.split(segments.lengths, dim=2), segments.visible(module, key, value)
    pieces = []
    for q, k, v in zip(queries, *visible, strict=True):
        mask = _mask(q, k, given.get("sliding_window"))
        piece = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=given.get("dropout", 0.0),
            is_causal=mask is None,
            scale=given.get("scaling"),
            enable_gqa=True,
        )
        pieces.append(piece)
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _mask(query: Tensor, key: Tensor, window: int | None) -> Tensor | None:
    """Return which keys the queries, the last tokens of all, see; None: all up to their own."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if window is not None and window < num_keys:
        places = torch.arange(num_keys, device=key.device)
        distance = places[-num_queries:, None] - places
        return (distance >= 0) & (distance < window)
    return None if num_queries == num_keys else causal_lower_right(num_queries, num_keys)


@torch.compiler.disable
def flash_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Any, *, segments: Segments, **given: Any
) -> tuple[Tensor, None]:
    """The same in one kernel for all segments, that of the flash-attn package."""
    keys, values = segments.visible(module, key, value)
    window = given.get("sliding_window")
    lengths, key_bounds = [k.shape[2] for k in keys], segments.bounds
    if segments.prefixes is not None:
        key, value = torch.cat(keys, 2), torch.cat(values, 2)
        key_bounds = key_bounds.new_tensor([0, *accumulate(lengths)])
    # Under autocast a norm leaves query and key in float32, which the kernel does not take; value is half.
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # S heads width
    output = import_module("flash_attn").flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=segments.bounds,
        cu_seqlens_k=key_bounds,
        max_seqlen_q=max(segments.lengths),
        max_seqlen_k=max(lengths),
        dropout_p=given.get("dropout", 0.0),
        softmax_scale=given.get("scaling"),
        window_size=(-1 if window is None else window - 1, -1 if window is None else 0),
        causal=True,  # the last query sees the last key: what is shorter are the queries
    )
    return output[None], None


for _name, _function in (("sdpa", segment_attention), ("flash", flash_attention)):
    AttentionInterface.register(PACKED_ATTENTION[_name], _function)
    AttentionMaskInterface.register(PACKED_ATTENTION[_name], lambda *_, **__: None)  # boundaries instead


def build_language_model(config: dict[str, Any]) -> PreTrainedModel:
    """Build a causal language model with random float32 weights from a transformers config with `model_type`.

    The config may come from a checkpoint, of transformers 4 too.

    Raises:
        ValueError: transformers knows no such model, or it does not compute here what it computes there.
    """
    settings = {k: v for k, v in config.items() if not k.startswith("_") and k not in _RUN_KEYS}
    try:
        language_config = AutoConfig.for_model(**settings)
    except (KeyError, StrictDataclassError) as error:
        raise ValueError(f"language model: {' '.join(str(error).split())}") from error
    if type(language_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = f"model_type is '{config['model_type']}'"
        raise ValueError(f"language model: {kind}, no causal language model of transformers")
    check_parity(language_config)
    return AutoModelForCausalLM.from_config(language_config, attn_implementation="sdpa", dtype=torch.float32)


def check_parity(config: PreTrainedConfig) -> None:
    """Compare the logits of packed samples with those of transformers' own forward pass.

    Raises:
        ValueError: they differ, or the architecture cannot run packed samples at all.
    """
    problem = _find_problem(json.dumps(_shrink(config), sort_keys=True, default=str))
    if problem is not None:
        kind = f"language model: model_type '{config.model_type}' with these settings"
        raise ValueError(f"{kind} is not supported: {problem}; docs/models.md lists the families that are")


def _shrink(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings of a copy with small sizes, which keeps how many query heads share a key."""
    ignored = {*_RUN_KEYS, "architectures"}
    small = {k: v for k, v in config.to_dict().items() if not k.startswith("_") and k not in ignored}
    small |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    for name, size in _SMALL.items():
        name = config.attribute_map.get(name, name)
        if small.get(name) is not None:
            small[name] = size
    if small.get("num_key_value_heads") is not None:
        shared = config.num_attention_heads // config.num_key_value_heads
        small["num_key_value_heads"] = max(1, _HEADS // shared)
    if small.get("layer_types"):  # one layer of each kind
        small["layer_types"] = list(dict.fromkeys(small["layer_types"])) * _MIN_LAYERS
        small[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(small["layer_types"])
    return small | {"model_type": config.model_type}


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
    for parameter in model.parameters():
        # All values are drawn, as the model may have none yet, and biases that begin at zero would not show.
        mean, std = (0.0, 0.2) if parameter.ndim > 1 else (1.0, 0.3)
        parameter.normal_(mean, std)
    return model


def _compare(model: PreTrainedModel) -> str | None:
    if not model._can_set_attn_implementation():  # noqa: SLF001 - its only effect is a warning otherwise
        return "its attention is not transformers' common interface, so packed samples would see each other"
    samples = [torch.randint(model.config.vocab_size, (length,)) for length in _LENGTHS]
    expected = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in samples])
    is_same = partial(torch.allclose, expected, rtol=1e-3, atol=1e-3)  # but for rounding
    if is_same(_packed_logits(model, samples)):
        return None
    if is_same(torch.cat([_packed_logits(model, [ids]) for ids in samples])):
        return "packed samples would see each other"
    head = "and losses take logits as hidden states times the head"
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(model.config, name, None):
            return f"{name} is set, {head}"
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        return f"its output layer has a bias, {head}"
    return "its logits are not hidden states times the head, or its attention is of another kind"


def _packed_logits(model: PreTrainedModel, samples: list[Tensor]) -> Tensor:
    embeddings = model.get_input_embeddings()(torch.cat(samples))
    states = run_packed(model, embeddings, [len(ids) for ids in samples])
    return states @ model.get_output_embeddings().weight.T
