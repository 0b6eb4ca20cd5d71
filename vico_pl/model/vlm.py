"""The whole multimodal model: tiles and token ids in, response hidden states out."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn.functional import pad

from vico_pl.model.connector import FULL_RATIO, Connectors
from vico_pl.model.language import build_language_model
from vico_pl.model.packed import run_packed
from vico_pl.model.router import DEFAULT_ROUTER, build_router
from vico_pl.model.vision import VisionEncoder
from vico_pl.types import Batch


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The description a model is built from, without weights; `config.json` of a model folder holds it."""

    vision: dict[str, Any]  # an open_clip vision_cfg, or a transformers config with its model_type
    language: dict[str, Any]  # a transformers config with its model_type
    ratios: list[int]  # patches per vision token, rising from 4
    router_heads: int | None = None  # attention heads of the router; None: the model has no router
    placeholder_id: int  # token id that stands for a tile
    router: str = DEFAULT_ROUTER  # name of its builder in `router.ROUTERS`


@dataclass(frozen=True, kw_only=True)
class Spliced:
    """Samples after expansion, end to end, ready for the language model."""

    embeddings: Float[Tensor, "S D"]
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
    """Put the vision tokens of the i-th tile in the place of the i-th placeholder.

    With ids `a # b`, one tile of 4 tokens: `a v v v v b`.
    """
    expansion = torch.ones_like(is_placeholder, dtype=torch.int64)
    expansion[is_placeholder] = tokens_per_tile
    origin = torch.arange(len(expansion), device=expansion.device).repeat_interleave(expansion)  # (S,)
    embeddings = text_embeddings[origin]
    embeddings[is_placeholder[origin]] = vision_tokens.to(embeddings.dtype)
    ends, samples = expansion.cumsum(0), pad(sample_lengths.cumsum(0), (1, 0))  # in L: where samples begin
    return Spliced(
        embeddings=embeddings,
        segment_lengths=pad(ends, (1, 0))[samples].diff().tolist(),
        tile_starts=(ends - expansion)[is_placeholder],
        response_positions=response_mask[origin].nonzero().squeeze(1) - 1,
    )


class VisionLanguageModel(nn.Module):
    """Vision encoder, connectors, language model and router."""

    def __init__(self, spec: ModelSpec) -> None:
        """Build the model with random weights.

        Raises:
            ValueError: no such part can be built, or patches do not divide into vision tokens.
        """
        super().__init__()
        self.spec = spec
        self.vision = VisionEncoder(spec.vision)
        _check_ratios(spec.ratios, self.vision)
        self.language = build_language_model(spec.language)
        self.connectors = Connectors(
            spec.ratios, vision_width=self.vision.width, language_width=self.language.config.hidden_size
        )
        self.router: nn.Module | None = None
        if spec.router_heads is not None:
            self.router = build_router(
                spec.router, self.vision.width, num_ratios=len(spec.ratios), num_heads=spec.router_heads
            )

    @property
    def ratios(self) -> list[int]:
        """Compression ratios the model has connectors for, full tokens first."""
        return self.spec.ratios

    @property
    def tokens_per_full_tile(self) -> int:
        """Vision tokens of a tile at full tokens."""
        return self.vision.num_patches // FULL_RATIO

    @property
    def head(self) -> Float[Tensor, "V D"]:
        """Weight of the output layer: hidden states times its transpose are logits."""
        return self.language.get_output_embeddings().weight

    def encode_tiles(self, tiles: UInt8[Tensor, "T 3 H W"]) -> Float[Tensor, "T P C"]:
        """Return the patch features of tiles."""
        return self.vision(tiles)

    def splice_batch(
        self, batch: Batch, features: Float[Tensor, "T P C"], ratios: Int64[Tensor, " T"]
    ) -> Spliced:
        """Turn patch features into vision tokens at the given ratios and put them among the text."""
        vision_tokens, counts = self.connectors(features, ratios)
        return splice(
            self.language.get_input_embeddings()(batch.input_ids),
            vision_tokens,
            counts,
            is_placeholder=batch.input_ids == self.spec.placeholder_id,
            response_mask=batch.response_mask,
            sample_lengths=batch.sample_lengths,
        )

    def response_states(
        self, batch: Batch, features: Float[Tensor, "T P C"], ratios: Int64[Tensor, " T"]
    ) -> Float[Tensor, "R D"]:
        """Return the hidden states that predict the response tokens."""
        spliced = self.splice_batch(batch, features, ratios)
        hidden = run_packed(self.language, spliced.embeddings, spliced.segment_lengths)
        return hidden[spliced.response_positions]

    def set_dropout(self, probability: float) -> None:
        """Set the dropout of connectors and router, active only in training mode."""
        parts = [self.connectors, *([] if self.router is None else [self.router])]
        for module in (module for part in parts for module in part.modules()):
            if isinstance(module, nn.Dropout):
                module.p = probability

    def full_ratios(self, batch: Batch) -> Int64[Tensor, " T"]:
        """Return full tokens for every tile."""
        return torch.full_like(batch.tile_to_sample, FULL_RATIO)


def _check_ratios(ratios: list[int], vision: VisionEncoder) -> None:
    is_square = all(math.isqrt(ratio) ** 2 == ratio for ratio in ratios)
    if not is_square or ratios != sorted(set(ratios)) or ratios[:1] != [FULL_RATIO]:
        expected = f"rising square numbers that begin with {FULL_RATIO}"
        raise ValueError(f"ratios {ratios}: expected {expected}")
    side = math.isqrt(vision.num_patches)
    for ratio, factor in ((ratio, math.isqrt(ratio)) for ratio in ratios):
        if side % factor:
            raise ValueError(
                f"tiles of {vision.tile_size} px are {side} x {side} patches, which do not fold by {factor} "
                f"for ratio {ratio}; choose another image_size or other ratios"
            )
