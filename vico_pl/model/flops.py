"""FLOPs of a forward pass, from a model's description alone.

PyTorch counts vision tower, connectors and router on one tile on the `meta` device. The language model is
not run, as its length varies and experts are chosen by values: every weight of its blocks is one multiply and
one add per token, counting only the active experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from vico_pl.model.blocks import find_blocks
from vico_pl.model.vlm import ModelSpec, VisionLanguageModel


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """Operations of a forward pass; a multiply and an add are two. A backward pass takes twice as many."""

    vision_per_tile: float
    router_per_tile: float  # 0 without router
    connector_per_tile: dict[int, float]  # by ratio
    vision_tokens_per_tile: dict[int, int]  # by ratio
    language_per_token: float  # weights of all blocks, of experts the active ones; the head is not among them
    language_per_pair: float  # attention of a query to one key, over all layers
    head_per_token: float

    def language(self, num_tokens: int) -> float:
        """Return the cost of the blocks over one sample, in which token i sees the i tokens up to itself."""
        pairs = num_tokens * (num_tokens + 1) / 2
        return self.language_per_token * num_tokens + self.language_per_pair * pairs


def build_without_weights(spec: ModelSpec, *, device: str = "meta") -> VisionLanguageModel:
    """Build a model whose tensors have shapes but no values, and on `meta` no memory.

    Raises:
        ValueError: no model can be built from the description.
    """
    with torch.device(device), no_init_weights():
        return VisionLanguageModel(spec)


def count_flops(spec: ModelSpec) -> ModelFlops:
    """Count what each part of a model costs.

    Raises:
        ValueError: no model can be built from the description.
    """
    model = build_without_weights(spec)
    size, num_patches = model.vision.tile_size, model.vision.num_patches
    tile = torch.empty(1, 3, size, size, dtype=torch.uint8, device="meta")
    features = torch.empty(1, num_patches, model.vision.width, device="meta")
    connectors = {ratio: model.connectors.by_ratio[str(ratio)] for ratio in model.ratios}
    language_per_token, language_per_pair, head_per_token = language_costs(model)
    return ModelFlops(
        vision_per_tile=_count(model.encode_tiles, tile),
        router_per_tile=0.0 if model.router is None else _count(model.router, features),
        connector_per_tile={ratio: _count(connector, features) for ratio, connector in connectors.items()},
        vision_tokens_per_tile={ratio: num_patches // ratio for ratio in model.ratios},
        language_per_token=language_per_token,
        language_per_pair=language_per_pair,
        head_per_token=head_per_token,
    )


def language_costs(model: VisionLanguageModel) -> tuple[float, float, float]:
    """Return the operations of the blocks per token and per pair of tokens, and of the head per token."""
    config = model.language.config
    # Each head multiplies a query with a key, and the weight that comes out with a value.
    per_pair = 2.0 * 2 * config.num_attention_heads * head_width(config) * config.num_hidden_layers
    return 2.0 * _active_weights(model.language), per_pair, 2.0 * model.head.numel()


def head_width(config: PreTrainedConfig) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _active_weights(language: PreTrainedModel) -> float:
    """Return how many weights of its blocks a token uses; vectors, below a thousandth, do not count."""
    total = 0.0
    for weight in (weight for block in find_blocks(language) for weight in block.parameters()):
        if weight.ndim == 3:  # all experts of a layer
            total += weight.numel() * (language.config.num_experts_per_tok / weight.shape[0])
        elif weight.ndim > 1:
            total += weight.numel()
    return total


def _count(function: Callable[[Tensor], Tensor], given: Tensor) -> float:
    counter = FlopCounterMode(display=False)
    with counter:
        function(given)
    return float(counter.get_total_flops())
