"""The causal language model, and attention that keeps packed samples apart.

Samples are concatenated into one sequence and must not attend to each other. transformers can infer the
boundaries from position ids, but leaks silently with `use_cache=True` or an all-ones mask; so they are
passed explicitly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int32, Int64
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
# the model folder, which must never run: transformers offers to run it even if it knows the model type.
_NOT_OF_THE_SHAPE = {
    "auto_map",
    "model_type",
    "torch_dtype",
    "dtype",
    "attn_implementation",
    "transformers_version",
    "use_cache",
}


def build_language_model(config: dict[str, Any]) -> PreTrainedModel:
    """Build a causal language model with random float32 weights from a transformers config with `model_type`.

    The config may come from a checkpoint, of transformers 4 too; keys that do not describe the shape are
    ignored.

    Raises:
        ValueError: transformers knows no such model, or packed attention cannot run it.
    """
    settings = {k: v for k, v in config.items() if not k.startswith("_") and k not in _NOT_OF_THE_SHAPE}
    try:
        language_config = AutoConfig.for_model(config["model_type"], **settings)
    except (KeyError, StrictDataclassError) as error:
        raise ValueError(f"language model: {' '.join(str(error).split())}") from error
    if type(language_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = config["model_type"]
        raise ValueError(f"language model: model_type is '{kind}', no causal language model of transformers")
    _check_attention(language_config)
    return AutoModelForCausalLM.from_config(language_config, attn_implementation="sdpa", dtype=torch.float32)


KeyValues = dict[int, tuple[Tensor, Tensor]]  # layer -> keys and values, each (1, heads, S, width)


@dataclass(frozen=True, kw_only=True)
class Prefixes:
    """Tokens before segments, from an earlier pass that kept their keys and values."""

    kept: KeyValues
    starts: list[int]  # place in that pass of each segment's first token
    lengths: list[int]

    def before(self, pieces: Sequence[Tensor], kept: Tensor) -> list[Tensor]:
        """Put the prefix of each segment before its piece, along the tokens."""
        ranges = zip(pieces, self.starts, self.lengths, strict=True)
        return [torch.cat([kept.narrow(2, start, length), piece], 2) for piece, start, length in ranges]


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
        keys, values = (list(x.split(self.lengths, dim=2)) for x in (key, value))
        if self.prefixes is None:
            return keys, values
        kept_key, kept_value = self.prefixes.kept[layer]
        return self.prefixes.before(keys, kept_key), self.prefixes.before(values, kept_value)


def set_packed_attention(model: PreTrainedModel, name: str) -> None:
    """Choose the attention of packed samples, `sdpa` (default) or `flash`."""
    model.packed_attention = PACKED_ATTENTION[name]  # type: ignore[assignment]  # nn.Module: or a tensor


def check_flash_attention(device: torch.device) -> None:
    """Check that attention `flash` can run on a device.

    Raises:
        ValueError: it cannot; the message says what to do.
    """
    if device.type != "cuda":
        raise ValueError(
            f"model.attention is 'flash', which runs on CUDA devices, but this run is on {device.type}; "
            "set model.attention=sdpa"
        )
    if find_spec("flash_attn") is None:
        raise ValueError(
            "model.attention is 'flash', but flash-attn is not installed; "
            "pip install flash-attn, or set model.attention=sdpa"
        )


def run_packed(
    model: PreTrainedModel,
    embeddings: Float[Tensor, "S D"],
    position_ids: Int64[Tensor, " S"],
    segment_lengths: list[int],
    *,
    keep: KeyValues | None = None,
    prefixes: Prefixes | None = None,
) -> Float[Tensor, "S D"]:
    """Run concatenated samples; returns the hidden states after the final norm.

    Equal to running them one by one (tested to 1e-5). `keep` is filled with the keys and values of all
    layers. With `prefixes`, segments continue from tokens whose keys and values an earlier call kept, as
    if they had been run together; position ids continue too.
    """
    model.set_attn_implementation(getattr(model, "packed_attention", PACKED_ATTENTION["sdpa"]))
    bounds = torch.tensor([0, *accumulate(segment_lengths)], dtype=torch.int32, device=embeddings.device)
    output = model.base_model(
        inputs_embeds=embeddings[None],
        position_ids=position_ids[None],
        use_cache=False,
        segments=Segments(lengths=segment_lengths, bounds=bounds, keep=keep, prefixes=prefixes),
    )
    return output.last_hidden_state[0] * logit_scale(model.config)


def logit_scale(config: PreTrainedConfig) -> float:
    """Return the factor of the logits (Cohere, Granite): hidden states are multiplied by it instead."""
    return getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)


@torch.compiler.disable
def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment and its prefix; the shape of a transformers attention function.

    query is (1, heads, S, width); key and value may have fewer heads.
    """
    queries, visible = query.split(segments.lengths, dim=2), segments.visible(module, key, value)
    pieces = []
    for q, k, v in zip(queries, *visible, strict=True):
        mask = _mask(q, k, sliding_window)
        piece = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        pieces.append(piece)
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _mask(query: Tensor, key: Tensor, window: int | None) -> Tensor | None:
    """Return what the last queries of all keys see, at most `window` keys up to their own; None: causal."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if window is not None and window < num_keys:
        distance = torch.arange(num_keys - num_queries, num_keys, device=key.device)[:, None]
        distance = distance - torch.arange(num_keys, device=key.device)
        return (distance >= 0) & (distance < window)
    return None if num_queries == num_keys else causal_lower_right(num_queries, num_keys)


@torch.compiler.disable
def flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same in one kernel for all segments, that of the flash-attn package."""
    keys, values = segments.visible(module, key, value)
    ends, key_bounds = list(accumulate(k.shape[2] for k in keys)), segments.bounds
    if segments.prefixes is not None:
        key, value = torch.cat(keys, 2), torch.cat(values, 2)
        key_bounds = key_bounds.new_tensor([0, *ends])
    # Under autocast a norm leaves query and key in float32, which the kernel does not take; value is half.
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # S heads width
    output = import_module("flash_attn").flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=segments.bounds,
        cu_seqlens_k=key_bounds,
        max_seqlen_q=max(segments.lengths),
        max_seqlen_k=max(x.shape[2] for x in keys),
        dropout_p=dropout,
        softmax_scale=scaling,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        causal=True,  # the last query sees the last key: what is shorter are the queries
    )
    return output[None], None


def _check_attention(config: PreTrainedConfig) -> None:
    """Refuse models whose attention is not plainly causal: packed, they would be silently wrong."""
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if getattr(config, "attn_logit_softcapping", None):
        kinds.add("soft-capped attention")
    if kinds:
        raise ValueError(
            f"language model: {config.model_type} has layers of {', '.join(sorted(kinds))}; "
            "packed samples run through causal attention over all tokens alone"
        )


def _no_mask(*_: Any, **__: Any) -> None:
    """Build no mask: the attention functions use boundaries instead."""


for _name, _function in (("sdpa", segment_attention), ("flash", flash_attention)):
    AttentionInterface.register(PACKED_ATTENTION[_name], _function)
    AttentionMaskInterface.register(PACKED_ATTENTION[_name], _no_mask)
