"""Models and samples of the benchmarks, and a counter of operations on models without weights."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vico_pl.data.collate import collate
from vico_pl.model.flops import build_without_weights
from vico_pl.model.vlm import ModelSpec, VisionLanguageModel
from vico_pl.types import Batch, EncodedSample

PLACEHOLDER_ID = 0
LOWER_RIGHT = "causal, the last query sees the last key"  # PyTorch's own mask of that kind is a tensor


@dataclass(frozen=True, kw_only=True)
class Text:
    """How many text tokens a sample has."""

    system: int = 30
    question: int = 70
    response: int = 100


# --- Models -------------------------------------------------------------------------------------------------


def internvl_1b() -> ModelSpec:
    """InternVL3.5-1B: InternViT-300M and Qwen3-0.6B; tiles of 448 px, 256 or 64 vision tokens each."""
    return spec_of(
        tile_size=448,
        vision={"width": 1024, "layers": 24},
        language={"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "heads": (16, 8)},
        vocab_size=151_936,
        head_dim=128,
    )


def internvl_8b() -> ModelSpec:
    """InternVL3.5-8B: InternViT-300M and Qwen3-8B."""
    return spec_of(
        tile_size=448,
        vision={"width": 1024, "layers": 24},
        language={
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 36,
            "heads": (32, 8),
        },
        vocab_size=151_936,
        head_dim=128,
    )


def spec_of(
    *,
    tile_size: int,
    vision: dict[str, int],
    language: dict[str, Any],
    vocab_size: int,
    head_dim: int = 64,
    placeholder_id: int = PLACEHOLDER_ID,
) -> ModelSpec:
    """Describe an InternViT of patches of 14 px and a Qwen3, with a router."""
    heads, key_value_heads = language["heads"]
    return ModelSpec(
        vision={
            "model_type": "internvl_vision",
            "image_size": [tile_size, tile_size],
            "patch_size": [14, 14],
            "hidden_size": vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // 64,
            "intermediate_size": 4 * vision["width"],
        },
        language={
            "model_type": "qwen3",
            "vocab_size": vocab_size,
            "head_dim": head_dim,
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "max_position_embeddings": 32_768,
            **{name: value for name, value in language.items() if name != "heads"},
        },
        ratios=[4, 16],
        router_heads=vision["width"] // 64,
        placeholder_id=placeholder_id,
    )


def random_model(spec: ModelSpec, *, seed: int = 0) -> VisionLanguageModel:
    """Build a randomly initialised model in eval mode."""
    torch.manual_seed(seed)
    return VisionLanguageModel(spec).eval()


# --- Samples ------------------------------------------------------------------------------------------------


def draw_sample(spec: ModelSpec, *, tiles: int, text: Text, seed: int = 0) -> EncodedSample:
    """Draw a sample of noise: a system message, the tiles of one image, a question and its response."""
    generator = torch.Generator().manual_seed(seed)
    size = spec.vision["image_size"]
    words = torch.randint(
        1, spec.language["vocab_size"], (text.system + text.question + text.response,), generator=generator
    )
    before, after = words.split([text.system, text.question + text.response])
    ids = torch.cat([before, torch.full((tiles,), spec.placeholder_id), after])
    return EncodedSample(
        id=f"sample-{seed}",
        tiles=torch.randint(0, 256, (tiles, 3, *size), dtype=torch.uint8, generator=generator),
        tiles_per_image=[tiles] if tiles else [],
        input_ids=ids,
        response_mask=torch.arange(len(ids)) >= len(ids) - text.response,
    )


def draw_batch(spec: ModelSpec, tiles: Sequence[int], text: Text = Text()) -> Batch:
    """Draw one sample per number of tiles."""
    return collate([draw_sample(spec, tiles=n, text=text, seed=seed) for seed, n in enumerate(tiles)])


# --- Operations ---------------------------------------------------------------------------------------------


class Counter:
    """Counts the floating-point operations of code that runs on models without weights.

    Weights and what is computed from them have shapes but no memory (PyTorch's `meta` device); what code
    looks at, such as token ids and lengths, is real. So the code itself runs, at any size of a model, and
    PyTorch counts its matrix products; attention counts the pairs of query and key that it needs.
    """

    def __init__(self) -> None:
        """Count nothing yet."""
        self.others = 0.0  # what PyTorch does not see

    def model(self, spec: ModelSpec) -> VisionLanguageModel:
        """Build a model without weights whose parts take real tensors, and return zeros."""
        model = build_without_weights(spec).eval().requires_grad_(requires_grad=False)
        parts = [model.vision, *model.connectors.by_ratio.values(), model.language.get_input_embeddings()]
        for part in (
            *parts,
            model.language.base_model,
            model.language.get_output_embeddings(),
            *filter(None, [model.router]),
        ):
            part.register_forward_pre_hook(_to_meta, with_kwargs=True)
            part.register_forward_hook(_to_zeros)
        return model

    def count(self, run: Callable[[], object]) -> float:
        """Return the operations of a function; a multiply and an add are two."""
        self.others = 0.0
        counted = FlopCounterMode(display=False)
        with counted, self._attention(), torch.no_grad():
            run()
        return counted.get_total_flops() + self.others

    def divergence(
        self,
        states: Tensor,
        head: Tensor,
        reference: Tensor,
        *_: Any,
        reference_rows: Tensor | None = None,
        chunk_size: int = 256,
    ) -> Tensor:
        """Stand in for `consistency_kl`: the matrix products with both heads."""
        partners = len(reference)
        if reference_rows is not None:
            partners = sum(len(chunk.unique_consecutive()) for chunk in reference_rows.split(chunk_size))
        self.others += 2.0 * (len(states) + partners) * head.numel()
        return torch.zeros(len(states))

    @contextmanager
    def _attention(self) -> Iterator[None]:
        attention = "scaled_dot_product_attention"
        with ExitStack() as patches:
            for place in ("torch.nn.functional", "vico_pl.model.language"):
                patches.enter_context(patch(f"{place}.{attention}", self._attend))
            patches.enter_context(patch("vico_pl.model.language.causal_lower_right", lambda *_: LOWER_RIGHT))
            # transformers looks at position ids for packed samples, to make a mask that nothing here takes.
            patches.enter_context(patch("transformers.masking_utils.find_packed_sequence_indices"))
            yield

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | str | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002 - as PyTorch's own
        **_: Any,
    ) -> Tensor:
        queries, keys = query.shape[-2], key.shape[-2]
        pairs = queries * keys
        if is_causal or attn_mask == LOWER_RIGHT:
            pairs -= queries * (queries - 1) / 2
        elif attn_mask is not None:
            raise ValueError(
                "attention with a custom mask: expected causal or full attention, whose pairs can be counted"
            )
        heads = math.prod(query.shape[:-2])
        self.others += 2.0 * heads * pairs * (query.shape[-1] + value.shape[-1])
        return query.new_empty(*query.shape[:-1], value.shape[-1])


def _to_meta(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    def moved(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    return tuple(map(moved, given)), {name: moved(value) for name, value in named.items()}


def _to_zeros(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
    def zeros(like: Tensor) -> Tensor:
        return torch.zeros(1).expand(like.shape)  # of any size without memory

    if isinstance(output, Tensor):
        return zeros(output)
    output.last_hidden_state = zeros(output.last_hidden_state)
    return output
