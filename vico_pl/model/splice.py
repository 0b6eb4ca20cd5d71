"""Put vision tokens in the place of placeholders, as late as possible: only now are the ratios known."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Spliced:
    """Samples after expansion, end to end, ready for the language model."""

    embeddings: Float[Tensor, "S D"]
    position_ids: Int64[Tensor, " S"]  # begin at 0 in every sample
    segment_lengths: list[int]  # tokens of each sample
    tile_starts: Int64[Tensor, " T"]  # position of each tile's first vision token
    response_positions: Int64[Tensor, " R"]  # of the tokens that predict it: one before each response token


def splice(
    text_embeddings: Float[Tensor, "L D"],
    vision_tokens: Float[Tensor, "TN D"],
    tokens_per_tile: Int64[Tensor, " T"],
    *,
    is_placeholder: Bool[Tensor, " L"],
    response_mask: Bool[Tensor, " L"],
    sample_lengths: Int64[Tensor, " B"],
) -> Spliced:
    """Expand the i-th placeholder to the vision tokens of the i-th tile.

    With ids `a # b`, one tile of 4 tokens: `a v v v v b`.
    """
    expansion = torch.ones_like(is_placeholder, dtype=torch.int64)
    expansion[is_placeholder] = tokens_per_tile
    origin = torch.arange(len(expansion), device=expansion.device).repeat_interleave(expansion)  # (S,)
    embeddings = text_embeddings[origin]
    embeddings[is_placeholder[origin]] = vision_tokens.to(embeddings.dtype)

    samples = torch.arange(len(sample_lengths), device=expansion.device)
    sample_of_token = samples.repeat_interleave(sample_lengths)  # (L,)
    lengths = torch.zeros_like(sample_lengths).index_add_(0, sample_of_token, expansion)
    starts = lengths.cumsum(0) - lengths
    position_ids = torch.arange(len(origin), device=expansion.device) - starts.repeat_interleave(lengths)
    return Spliced(
        embeddings=embeddings,
        position_ids=position_ids,
        segment_lengths=lengths.tolist(),
        tile_starts=(expansion.cumsum(0) - expansion)[is_placeholder],
        response_positions=response_mask[origin].nonzero().squeeze(1) - 1,
    )
