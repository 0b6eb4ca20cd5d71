"""The causal language model, and attention that keeps packed samples apart.

Samples lie end to end in one sequence, so a sample must not see its neighbours. transformers can guess that
from position ids, but leaks silently with `use_cache=True` or an all-ones mask; here the boundaries are
passed explicitly.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

SEGMENT_ATTENTION = "vico_segments"
# Keys of stored configs that tell how a model was run or saved.
_NOT_OF_THE_SHAPE = {
    "model_type",
    "torch_dtype",
    "dtype",
    "attn_implementation",
    "transformers_version",
    "use_cache",
}


def build_language_model(config: dict[str, Any]) -> PreTrainedModel:
    """Build a causal language model with fresh float32 weights from a transformers config with `model_type`.

    The config may be as stored in a checkpoint, of transformers 4 too: what says nothing about the model's
    shape is passed over.
    """
    settings = {k: v for k, v in config.items() if not k.startswith("_") and k not in _NOT_OF_THE_SHAPE}
    language_config = AutoConfig.for_model(config["model_type"], **settings)
    return AutoModelForCausalLM.from_config(language_config, attn_implementation="sdpa", dtype=torch.float32)


def run_packed(
    model: PreTrainedModel,
    embeddings: Float[Tensor, "S D"],
    position_ids: Int64[Tensor, " S"],
    segment_lengths: list[int],
) -> Float[Tensor, "S D"]:
    """Run samples that lie end to end; returns the hidden states after the final norm.

    Equal to running them one by one (tested to 1e-5).
    """
    model.set_attn_implementation(SEGMENT_ATTENTION)
    output = model.base_model(
        inputs_embeds=embeddings[None],
        position_ids=position_ids[None],
        use_cache=False,
        segment_lengths=segment_lengths,
    )
    return output.last_hidden_state[0]


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_lengths: list[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment; the shape of a transformers attention function.

    query is (1, heads, S, width); key and value may have fewer heads.
    """
    pieces = [
        scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
        )
        for q, k, v in zip(*(x.split(segment_lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Segment attention needs no mask."""


AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
AttentionMaskInterface.register(SEGMENT_ATTENTION, _no_mask)
