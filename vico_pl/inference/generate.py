"""Routed, batched, greedy generation with a key-value cache.

Prompts run packed, as samples do in training; only the cache is padded.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from vico_pl.data.tiling import tile_sample
from vico_pl.inference.predictor import Predictor
from vico_pl.model.language import KeyValues, run_packed
from vico_pl.model.vlm import Spliced
from vico_pl.tokens import TURN_END, token_id
from vico_pl.types import Image, Sample, TiledSample


@torch.no_grad()
def answer_image(predictor: Predictor, image: Image, question: str, *, max_new_tokens: int = 128) -> str:
    """Answer a question about one image, routed."""
    sample = tile_sample(Sample(id="image", images=[image], turns=[], metadata={}), predictor.tiling)
    features = [predictor.encode(sample.tiles)]
    ratios = list(map(predictor.route, features))
    (text,) = answer(
        predictor, [sample], [question], features=features, ratios=ratios, max_new_tokens=max_new_tokens
    )
    return text


def answer(
    predictor: Predictor,
    samples: Sequence[TiledSample],
    questions: Sequence[str],
    *,
    features: Sequence[Float[Tensor, "_ P C"]],
    ratios: Sequence[Int64[Tensor, " _"]],
    max_new_tokens: int = 64,
) -> list[str]:
    """Answer question i about sample i, whose tiles have `features[i]` and are compressed by `ratios[i]`.

    Samples may have any number of tiles, or none. An answer does not depend on the rest of the batch.
    """
    ids = generate_ids(
        predictor, samples, questions, features=features, ratios=ratios, max_new_tokens=max_new_tokens
    )
    return [text.strip() for text in predictor.tokenizer.batch_decode(ids, skip_special_tokens=True)]


@torch.no_grad()
def generate_ids(
    predictor: Predictor,
    samples: Sequence[TiledSample],
    questions: Sequence[str],
    *,
    features: Sequence[Float[Tensor, "_ P C"]],
    ratios: Sequence[Int64[Tensor, " _"]],
    max_new_tokens: int,
) -> Int64[Tensor, "B n"]:
    """Return the token ids of the answers, padded on the right after the end of the turn."""
    batch, language = predictor.encode_prompts(samples, questions), predictor.model.language
    chosen = torch.cat(list(ratios)).to(predictor.device)
    spliced = predictor.model.splice_batch(batch, torch.cat(list(features)), chosen)
    cache = prefill(language, spliced)
    language.set_attn_implementation("sdpa")
    generate: Any = language.generate  # typed by its mixin alone
    last = batch.input_ids[batch.sample_lengths.cumsum(0) - 1]
    # generate() needs only the number of cached tokens, not their ids.
    seen = last[:, None].expand(-1, cache.get_seq_length() + 1)
    mask = [torch.ones(length, dtype=torch.int64) for length in spliced.segment_lengths]
    ids = generate(
        inputs=seen,
        past_key_values=cache,
        attention_mask=pad_sequence(mask, batch_first=True, padding_side="left").to(predictor.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        # In some families the tokenizer's end of text is another token.
        eos_token_id=token_id(predictor.tokenizer, TURN_END),
        pad_token_id=predictor.tokenizer.pad_token_id,
    )
    return ids[:, seen.shape[1] :]


def prefill(language: PreTrainedModel, spliced: Spliced) -> DynamicCache:
    """Run prompts; return the keys and values of all but their last tokens, where decoding starts."""
    kept: KeyValues = {}
    run_packed(language, spliced.embeddings, spliced.segment_lengths, keep=kept)
    cache = DynamicCache()
    for layer in sorted(kept):
        key, value = (pad_left(x, spliced.segment_lengths)[:, :, :-1] for x in kept.pop(layer))
        cache.update(key, value, layer)
    return cache


def pad_left(
    packed: Float[Tensor, "1 heads S width"], lengths: list[int]
) -> Float[Tensor, "B heads longest width"]:
    """Turn packed samples into left-padded rows."""
    rows = packed[0].transpose(0, 1).split(lengths)  # each: tokens, heads, width
    return pad_sequence(list(rows), batch_first=True, padding_side="left").transpose(1, 2)
