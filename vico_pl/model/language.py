"""The causal language model, and attention that keeps packed samples apart.

Samples are concatenated into one sequence and must not attend to each other. transformers can infer the
boundaries from position ids, but leaks silently with `use_cache=True` or an all-ones mask; so they are
passed explicitly.
"""

from dataclasses import dataclass
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
# Keys of stored configs that describe how a model was run or saved, not its shape.
_NOT_OF_THE_SHAPE = {"torch_dtype", "dtype", "attn_implementation", "transformers_version", "use_cache"}


def build_language_model(config: dict[str, Any]) -> PreTrainedModel:
    """Build a causal language model with random float32 weights from a transformers config with `model_type`.

    The config may come from a checkpoint, of transformers 4 too.

    Raises:
        ValueError: transformers knows no such model, or packed attention cannot run it.
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
    _check_attention(language_config)
    return AutoModelForCausalLM.from_config(language_config, attn_implementation="sdpa", dtype=torch.float32)


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
    """Run concatenated samples of these lengths; returns the hidden states after the final norm.

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
    return output.last_hidden_state[0]


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
# heads; `given` holds scaling and dropout.


@torch.compiler.disable
def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _: Any,
    *,
    segments: Segments,
    **given: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment and its prefix."""
    queries, visible = query.split(segments.lengths, dim=2), segments.visible(module, key, value)
    pieces = []
    for q, k, v in zip(queries, *visible, strict=True):
        is_whole = q.shape[2] == k.shape[2]  # no prefix
        piece = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if is_whole else causal_lower_right(q.shape[2], k.shape[2]),
            dropout_p=given.get("dropout", 0.0),
            is_causal=is_whole,
            scale=given.get("scaling"),
            enable_gqa=True,
        )
        pieces.append(piece)
    return torch.cat(pieces, dim=2).transpose(1, 2), None


@torch.compiler.disable
def flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _: Any,
    *,
    segments: Segments,
    **given: Any,
) -> tuple[Tensor, None]:
    """The same in one kernel for all segments, that of the flash-attn package."""
    keys, values = segments.visible(module, key, value)
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
        causal=True,  # the last query sees the last key: what is shorter are the queries
    )
    return output[None], None


for _name, _function in (("sdpa", segment_attention), ("flash", flash_attention)):
    AttentionInterface.register(PACKED_ATTENTION[_name], _function)
    AttentionMaskInterface.register(PACKED_ATTENTION[_name], lambda *_, **__: None)  # boundaries instead
