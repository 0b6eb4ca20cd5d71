"""Fewer vision tokens on any model without training, and what a prompt costs to serve."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache

from vico_pl.data.collate import collate
from vico_pl.inference.generate import Prompt
from vico_pl.inference.predictor import Predictor
from vico_pl.model.connector import FULL_RATIO
from vico_pl.model.flops import build_without_weights, head_width, language_costs
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.tokens import TURN_END, token_id
from vico_pl.types import TiledSample

FASTV_LAYERS = 2  # that see all vision tokens
_ATTENTION = "vico_fastv"  # the name by which transformers knows the function below
FASTV_FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")  # whose layers run one after the other as below


class PooledConnector(nn.Module):
    """Averages the tokens of a full connector over squares of their grid, to one per `ratio` patches."""

    def __init__(self, full: nn.Module, ratio: int) -> None:
        super().__init__()
        self.full, self.side = full, math.isqrt(ratio // FULL_RATIO)

    def forward(self, features: Float[Tensor, "T P C"]) -> Float[Tensor, "T N D"]:
        """Turn the patch features of each tile into its vision tokens."""
        tokens = self.full(features)
        grid = tokens.mT.unflatten(2, (math.isqrt(tokens.shape[1]), -1))  # T D rows columns
        return avg_pool2d(grid, self.side).flatten(2).mT


def pooled_tokens(
    model: VisionLanguageModel, features: Float[Tensor, "T P C"], *, ratio: int
) -> Float[Tensor, "T N D"]:
    """Return the full vision tokens of tiles, averaged to as many as at `ratio`."""
    return PooledConnector(model.connectors.by_ratio[str(FULL_RATIO)], ratio)(features)


def with_pooling(model: VisionLanguageModel) -> VisionLanguageModel:
    """Return a model of the same weights that averages full vision tokens where this one compresses."""
    pooled, full = build_without_weights(model.spec).eval(), model.connectors.by_ratio[str(FULL_RATIO)]
    pooled.vision, pooled.language, pooled.router = model.vision, model.language, model.router
    for ratio in model.ratios:  # at the full ratio, an average of one
        pooled.connectors.by_ratio[str(ratio)] = PooledConnector(full, ratio)
    return pooled


@torch.no_grad()
def fastv_answers(
    predictor: Predictor,
    sample: TiledSample,
    prompt: Prompt,
    *,
    keep_fraction: float | int,
    max_new_tokens: int = 64,
    features: Float[Tensor, "T P C"] | None = None,
) -> str:
    """Answer a prompt as FastV does (arXiv 2403.06764), from full vision tokens.

    Two layers see them all. The next see, at their old positions, the fraction to which the prompt's last
    token pays most attention in the second layer, averaged over heads. `features` are the patch features of
    the sample, if they are known.

    Raises:
        ValueError: the fraction is not from 0 to 1, or the language model is of another family.
    """
    model, device = predictor.model, predictor.device
    base: Any = model.language.base_model
    check_fastv(model)
    if not 0 <= keep_fraction <= 1:
        raise ValueError(f"keep_fraction is {keep_fraction}; expected 0 to 1")
    ratios = torch.full((len(sample.tiles),), FULL_RATIO, device=device)
    features = predictor.encode(sample.tiles) if features is None else features
    batch = collate([predictor.encode_prompt(sample, prompt)]).to(device)
    spliced = model.splice_batch(batch, features, ratios)
    within = torch.arange(model.tokens_per_full_tile, device=device)
    vision = (spliced.tile_starts[:, None] + within).flatten()  # positions of vision tokens
    model.language.set_attn_implementation(_ATTENTION)
    cache, received = DynamicCache(), list[Tensor]()
    positions = torch.arange(len(spliced.embeddings), device=device)
    states = _run(base, spliced.embeddings, positions, cache, slice(FASTV_LAYERS), received=received)
    rank = torch.full_like(received[-1], torch.inf)  # of text: all of it stays
    rank[vision] = received[-1][vision]
    num_kept = len(positions) - len(vision) + round(keep_fraction * len(vision))
    kept = rank.topk(num_kept).indices.sort().values
    states = _run(base, states[kept], positions[kept], cache, slice(FASTV_LAYERS, None))
    ids = list[int]()
    for _ in range(max_new_tokens):
        ids.append(int((model.head @ base.norm(states[-1])).argmax()))
        if ids[-1] == token_id(predictor.tokenizer, TURN_END):
            break
        embedding = base.get_input_embeddings()(torch.tensor(ids[-1:], device=device))
        states = _run(base, embedding, positions[-1:] + len(ids), cache, slice(None))
    return str(predictor.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def check_fastv(model: VisionLanguageModel) -> None:
    """Check that FastV can run a model.

    Raises:
        ValueError: the language model is of a family that it does not know.
    """
    base: Any = model.language.base_model
    family = base.config.model_type
    if family not in FASTV_FAMILIES or any(getattr(x.self_attn, "sliding_window", None) for x in base.layers):
        expected = f"one of {', '.join(FASTV_FAMILIES)}, without sliding windows"
        raise ValueError(f"the language model is {family}; FastV needs {expected}")


def _run(
    base: Any,
    states: Float[Tensor, "S D"],
    positions: Int64[Tensor, " S"],
    cache: DynamicCache,
    layers: slice,
    **given: Any,
) -> Float[Tensor, "S D"]:
    """Run layers on tokens after those in their cache."""
    hidden, places = states[None], positions[None]
    rotary = base.rotary_emb(hidden, position_ids=places)
    for layer in base.layers[layers]:
        hidden = layer(
            hidden, position_ids=places, position_embeddings=rotary, past_key_values=cache, **given
        )
    return hidden[0]


def _attention(
    _: nn.Module, query: Tensor, key: Tensor, value: Tensor, __: Any, *, scaling: float, **given: Any
) -> tuple[Tensor, None]:
    """Causal attention in a prompt or of one more token; `received` gets what the last token pays to each."""
    if "received" in given:
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        given["received"].append((query[:, :, -1:] @ keys.mT * scaling).float().softmax(-1).mean((0, 1, 2)))
    several = query.shape[2] > 1
    output = scaled_dot_product_attention(
        query, key, value, is_causal=several, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attention)


def serving_cost(
    model: VisionLanguageModel,
    *,
    text_tokens: Sequence[int],
    vision_tokens: Sequence[int],
    kept_tokens: Sequence[int] | None = None,
) -> tuple[float, float]:
    """Return the operations up to the first answer token and the bytes of keys and values.

    Both are means over prompts, without the vision encoder. `kept_tokens` are the vision tokens that FastV
    keeps; by default all.
    """
    per_token, per_pair, logits = language_costs(model)
    config, flops, cached = model.language.config, logits, 0.0
    early = min(1, FASTV_LAYERS / config.num_hidden_layers)
    kept = vision_tokens if kept_tokens is None else kept_tokens
    for share, vision in ((early, vision_tokens), (1 - early, kept)):
        lengths = np.add(text_tokens, vision)
        flops += share * float((per_token * lengths + per_pair * lengths * (lengths + 1) / 2).mean())
        cached += share * float(lengths.mean())
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    numbers_per_token = 2 * config.num_hidden_layers * heads * head_width(config)  # keys and values
    return flops, cached * numbers_per_token * model.head.element_size()
