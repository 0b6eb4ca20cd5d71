"""Low-rank adapters (LoRA) on the language model, by `peft`; trained rows for tokens that it did not know.

They are put into the model in place, so that it keeps its class. With adapters off it is the model they were
added to, bit for bit; with adapters merged it has the names and the outputs of a model without any.

Experts keep the weights of all in one tensor. With `all-linear` such tensors get adapters too, and one module
may carry several, each around the one before.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from vico_pl.errors import check_settings
from vico_pl.model.vision import switched

ALL_LINEAR = "all-linear"
_NAME = "default"  # peft's name for the only adapter


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Size and place of adapters; their weights are always float32."""

    rank: int = 16  # of the product that is added to a layer's weights
    alpha: int = 32  # an adapter's output is multiplied by alpha / rank
    dropout: float = 0.0  # of an adapter's input, 0 to 1
    # all-linear (experts are, too), or names of linear layers such as [q_proj, v_proj].
    targets: str | list[str] = ALL_LINEAR

    def __post_init__(self) -> None:
        is_named = self.targets == ALL_LINEAR or (bool(self.targets) and not isinstance(self.targets, str))
        check_settings(
            "model.lora",
            self,
            rank=(self.rank >= 1, "1 or more"),
            alpha=(self.alpha > 0, "more than 0"),
            dropout=(0 <= self.dropout < 1, "0 to less than 1"),
            targets=(is_named, f"{ALL_LINEAR} or a list of layer names"),
        )


def add_adapters(language: PreTrainedModel, config: LoraConfig) -> None:
    """Freeze a language model and add adapters that are trained.

    The output layer gets none: losses use its weight, not its output.

    Raises:
        ValueError: peft is not installed, a target is no linear layer of the model, or experts should have
            dropout.
    """
    try:
        import peft
    except ImportError as error:
        needed = "model.trainable names lora, which needs peft: pip install 'vico_pl[lora]'"
        raise ValueError(needed) from error
    _check_targets(language, config)
    language.requires_grad_(requires_grad=False)
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=config.targets
    )
    with warnings.catch_warnings():
        # peft looks for the patterns that it made for experts among modules, where they are parameters.
        warnings.filterwarnings("ignore", message=r"The following \w+_pattern keys did not match")
        peft.inject_adapter_in_model(settings, language.base_model, _NAME)
    for adapter in (parameter for parameter in language.parameters() if parameter.requires_grad):
        adapter.data = adapter.data.float()


def _check_targets(language: PreTrainedModel, config: LoraConfig) -> None:
    modules = language.base_model.named_modules()
    known = {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)}
    unknown = [] if isinstance(config.targets, str) else sorted(set(config.targets) - known)
    if unknown:
        raise ValueError(
            f"model.lora.targets names {', '.join(unknown)}; "
            f"the linear layers of this language model are {', '.join(sorted(known))}"
        )
    has_experts = any(parameter.ndim == 3 for parameter in language.parameters())
    if has_experts and config.targets == ALL_LINEAR and config.dropout > 0:
        raise ValueError(
            f"model.lora.dropout is {config.dropout}, but adapters of experts have none; "
            f"set it to 0, or model.lora.targets to some of {', '.join(sorted(known))}"
        )


class NewTokens(nn.Module):
    """Embeddings and output rows of new tokens, trained in the place of those of a frozen language model.

    All other rows stay as they are, bit for bit. Tied embeddings are tied here as well.
    """

    def __init__(self, language: PreTrainedModel, ids: list[int]) -> None:
        """Copy the rows of the tokens, in float32."""
        super().__init__()
        words, head = _token_weights(language)
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.rows = nn.Parameter(words.detach()[ids].float())
        self.head_rows = self.rows if head is words else nn.Parameter(head.detach()[ids].float())

    def embed(self, words: nn.Module, input_ids: Int64[Tensor, " L"]) -> Float[Tensor, "L D"]:
        """Return the embeddings of tokens, by the layer's own forward: some scale them."""
        return functional_call(words, {"weight": self.put(words.weight, self.rows)}, (input_ids,))

    def head(self, weight: Float[Tensor, "V D"]) -> Float[Tensor, "V D"]:
        """Return the weight of the output layer with the rows of the tokens in it."""
        return self.put(weight, self.head_rows)

    def put(self, weight: Any, rows: Tensor) -> Tensor:
        """Return a weight with these rows for those of the tokens."""
        return weight.index_copy(0, self.ids, rows.to(weight.dtype))


def _token_weights(language: Any) -> tuple[Tensor, Tensor]:
    return language.get_input_embeddings().weight, language.get_output_embeddings().weight


def adapters_off(model: nn.Module) -> AbstractContextManager[None]:
    """Run a model as it was before it got adapters."""
    # peft's own switch also takes requires_grad from the adapters, whose gradients may be under way.
    return switched(_adapted_layers(model).values(), "_disable_adapters", to=True)


@contextmanager
def adapters_merged(model: nn.Module) -> Iterator[None]:
    """Put plain layers in the place of adapted ones and rows of new tokens into the weights they belong to.

    This lasts as long as the model is written.
    """
    # A layer of experts may have adapters around adapters; the outermost takes all with it.
    layers = _adapted_layers(model).items()
    adapted = {name: layer for name, layer in layers if not name.endswith(".base_layer")}
    for name, layer in adapted.items():
        model.set_submodule(name, _merged_layer(layer))
    try:
        with _tokens_merged(model):
            yield
    finally:
        for name, layer in adapted.items():
            model.set_submodule(name, layer)


@contextmanager
def _tokens_merged(model: Any) -> Iterator[None]:
    tokens = getattr(model, "new_tokens", None)
    if tokens is None:
        yield
        return
    before = [(weight, weight.data) for weight in _token_weights(model.language)]
    for (weight, values), rows in zip(before, (tokens.rows, tokens.head_rows), strict=True):
        weight.data = tokens.put(values, rows.data)
    model.new_tokens = None
    try:
        yield
    finally:
        model.new_tokens = tokens
        for weight, values in before:
            weight.data = values


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by the names they have without adapters, and none of an adapter's."""
    adapters = tuple(f"{name}.lora_" for name in _adapted_layers(model))
    return {
        re.sub(r"(\.base_layer)+\.", ".", name): parameter
        for name, parameter in model.named_parameters()
        if not name.startswith(adapters)
    }


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _merged_layer(adapted: Any) -> nn.Module:
    """Return a copy of a layer with its adapters added to its weights; off the GPU, which may lack room."""
    layer = deepcopy(adapted.get_base_layer()).cpu()
    while hasattr(adapted, "lora_A"):
        weight = getattr(layer, getattr(adapted, "parameter_name", "weight"))
        merged = weight + adapted.get_delta_weight(_NAME).cpu()  # of the more exact type of the two
        weight.data = merged.detach().to(weight.dtype)
        adapted = adapted.base_layer
    return layer
