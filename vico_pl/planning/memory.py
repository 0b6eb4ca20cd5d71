"""Measure the memory of a training step by running it on the `meta` device, whose tensors have only a shape.

`MemoryMeter` tracks live tensors and records the peak by the part of the step that made them. `DeviceRules`
supplies what `meta` lacks: fused attention, which keeps no (S, S) tensor, autocast, and values. PyTorch's own
`MemTracker` finds the same peak for stage `pretrain` to the byte, but knows no parts and cannot run a frozen
reference: its hooks need gradients.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AttentionInterface, AttentionMaskInterface

from vico_pl.config import RunConfig
from vico_pl.losses import consistency
from vico_pl.model.blocks import find_blocks
from vico_pl.model.flops import build_without_weights
from vico_pl.model.language import Segments
from vico_pl.model.vlm import ModelSpec, VisionLanguageModel
from vico_pl.planning.sources import MicroBatch, ModelShape, draw_batch
from vico_pl.stages import build_stage
from vico_pl.stages.base import Stage
from vico_pl.stages.figures import Ranks
from vico_pl.stages.settings import DTYPES, ModelConfig

Terms = dict[str, float]  # bytes by what takes them
METERED_ATTENTION = "vico_metered"  # the name under which transformers knows `packed_attention`
REST = "loss"  # what no watched part of a step made

# Of the functions that models use: what CUDA's autocast runs in the lower precision, and what in float32.
_LOWERED = {
    *(functional.linear, functional.conv2d, torch.matmul, torch.bmm, torch.mm, torch.addmm, torch.baddbmm),
    torch.einsum,  # of the products that it becomes
}
_RAISED = {functional.layer_norm, functional.softmax, torch.softmax, torch.pow, torch.rsqrt, Tensor.pow}
# What is returned where code asks for values of a tensor on `meta`, or for a shape that depends on them.
_ANSWERS: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.tolist: lambda given: torch.zeros(given.shape, dtype=given.dtype).tolist(),
    Tensor.__bool__: lambda _: False,
    Tensor.__float__: lambda _: 0.0,
    Tensor.__int__: lambda _: 2**30,  # of what was counted: enough
    Tensor.unique: lambda given, **_: given.flatten()[:1],
    Tensor.unique_consecutive: lambda given, **_: (given, torch.arange(len(given), device="meta")),
    torch.bincount: lambda given, *, minlength: given.new_empty(minlength),
    torch.quantile: lambda given, _, *, dim: given.new_empty(given.shape[1:]),
}


@dataclass(frozen=True, kw_only=True)
class _ModelsOnMeta:
    """Gives a stage its models as `FolderModels` does, but on `meta`."""

    config: ModelConfig
    shape: ModelShape

    @property
    def same_weights(self) -> bool:
        return self.config.reference in (None, self.config.path)

    def policy(self) -> VisionLanguageModel:
        spec, ratios = self.shape.spec, self.config.ratios
        if not set(spec.ratios) <= set(ratios):
            raise ValueError(f"model.ratios is {ratios}, but the model has {spec.ratios}")
        heads = spec.router_heads or self.config.router_heads
        model = self._build(replace(spec, ratios=ratios, router_heads=heads))
        model.set_dropout(self.config.dropout)
        return model

    def reference(self) -> VisionLanguageModel:
        return self._build(self.shape.spec)

    def rule(self) -> None:
        return None  # no tile is routed, see `stage_on_meta`

    def _build(self, spec: ModelSpec) -> VisionLanguageModel:
        model = build_without_weights(spec).to(DTYPES[self.config.frozen_dtype] or self.shape.dtype).eval()
        if model.router is not None:
            model.router.float()  # as a randomly initialised one
        return model


def stage_on_meta(config: RunConfig, shape: ModelShape) -> Stage:
    """Build the stage of a recipe as the trainer does, without weights and with all tiles at full tokens.

    PyTorch's kernels replace those that need a GPU, and models are not sharded: `RunMemory` does that.

    Raises:
        ValueError: the model lacks what the stage needs.
    """
    consistency = replace(config.consistency, ratio_draw="full", kernel="native")
    trainer = replace(config.trainer, compile=False, strategy="auto")
    run = replace(config, consistency=consistency, trainer=trainer)
    with torch.device("meta"), autocast_on_meta():  # adapters of experts run while they are built
        stage = build_stage(run, _ModelsOnMeta(config=config.model, shape=shape))
    for model in stage.sharded_models():
        model.language.packed_attention = METERED_ATTENTION  # type: ignore[assignment]  # nn.Module: or a tensor
    return ready(stage)


def ready(stage: Stage) -> Stage:
    """Put a stage into the state that Lightning gives it before the first step."""
    stage.ranks = Ranks(1)
    return stage.train()


def step_terms(stage: Stage, micro_batch: MicroBatch, *, precision: str) -> Terms:
    """Run the step of a micro-batch on `meta`; returns the bytes alive at its peak.

    Gradients exist already: those of earlier micro-batches of the same step.
    """
    policy, networks = stage.trained_model(), stage.sharded_models()
    gradients = [torch.empty_like(parameter) for parameter in trained_parameters(stage)]
    for parameter, gradient in zip(trained_parameters(stage), gradients, strict=True):
        parameter.grad = gradient
    batch = draw_batch(policy, micro_batch)
    weights = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    meter = MemoryMeter([*weights, *stage.buffers(), *gradients, batch.tiles])
    _name_parts(stage, meter)
    lowered = torch.bfloat16 if precision == "bf16-mixed" else None
    rules = DeviceRules(lowered, meter)
    rules.hold_in_recomputed(policy.vision)
    rules.hold_in_recomputed(policy.language)
    with autocast_on_meta(lowered), meter, rules:
        loss = stage.step(batch).loss_sum
        with meter.part("backward pass"):
            loss.backward()
    return {name: float(size) for name, size in meter.at_peak.items() if size}


def _name_parts(stage: Stage, meter: "MemoryMeter") -> None:
    """Name what the policy and the reference run; all else belongs to the loss."""
    policy, *others = stage.sharded_models()
    meter.watch(policy, "encode_tiles", part="vision activations")
    meter.watch(policy, "response_states", "splice_batch", part="language activations")
    meter.watch(policy.connectors, "forward", part="language activations")
    meter.watch(policy.language.base_model, "forward", part="language activations")
    for model in others:
        meter.watch(model, "encode_tiles", "response_states", part="reference pass")
    if policy.router is not None:
        meter.watch(policy.router, "forward", part="router")


def trained_parameters(stage: Stage) -> list[Tensor]:
    """Return the parameters that get gradients."""
    return [parameter for parameter in stage.trained_model().parameters() if parameter.requires_grad]


def num_bytes(tensors: Iterable[Tensor]) -> float:
    """Return the size of tensors."""
    return float(sum(tensor.nbytes for tensor in tensors))


@contextmanager
def autocast_on_meta(lowered: torch.dtype | None = None) -> Iterator[None]:
    """Let code on `meta`, where PyTorch has no autocast, turn it off or ask for its dtype, here `lowered`."""
    real = torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        return nullcontext() if device_type == "meta" else real(device_type, *args, **kwargs)

    with (
        patch.object(torch, "autocast", autocast),
        patch.object(consistency, "autocast_type", lambda _: lowered),
    ):
        yield


class MemoryMeter(TorchDispatchMode):
    """Adds up the live tensors on `meta`, except `known` ones; those on the CPU keep their values."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0  # bytes
        self.at_peak: dict[str, int] = {}  # bytes by the part of the step that made them
        self._alive: Counter[str] = Counter()
        self._part = REST
        self._storages = {tensor.untyped_storage()._cdata for tensor in known}  # noqa: SLF001 - its identity

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Name the part of the step that runs now."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def watch(self, owner: Any, *methods: str, part: str) -> None:
        """Name what methods make, unless they are called within another part."""

        def run(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with self.part(part if self._part == REST else self._part):
                return method(*args, **kwargs)

        for name in methods:
            setattr(owner, name, partial(run, getattr(owner, name)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(given)):
            given = tree_map(_without_memory, given)
        made = func(*given[0], **given[1])
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._count(tensor)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        identity, size, part = storage._cdata, storage.nbytes(), self._part  # noqa: SLF001
        if identity in self._storages:
            return
        self._storages.add(identity)
        self._alive[part] += size
        weakref.finalize(storage, self._forget, identity, size, part)
        total = sum(self._alive.values())
        if total > self.peak:
            self.peak, self.at_peak = total, dict(self._alive)

    def _forget(self, identity: int, size: int, part: str) -> None:
        self._storages.discard(identity)
        self._alive[part] -= size


class DeviceRules(TorchFunctionMode):
    """Runs attention as fused kernels do and functions in autocast's dtype, if any, and invents values."""

    def __init__(self, lowered: torch.dtype | None, meter: MemoryMeter) -> None:
        super().__init__()
        self._lowered, self._meter = lowered, meter
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}  # of weights: autocast casts each once per step

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ANSWERS and args[0].is_meta:
            return _ANSWERS[func](*args, **kwargs)
        if func is Tensor.to and not args[0].is_meta:
            moved = func(*args, **kwargs)  # to `meta` it would lose its values
            return args[0].to(moved.dtype) if moved.is_meta else moved
        if func is functional.multi_head_attention_forward:
            with self:  # PyTorch would run what is inside without rules
                return _multi_head_attention(*args), None
        if func is functional.scaled_dot_product_attention:
            return _FusedAttention.apply(*map(self._lower, args[:3]))
        if "out" in kwargs or self._lowered is None:  # autocast leaves these alone
            return func(*args, **kwargs)
        if func in _LOWERED:
            args, kwargs = tree_map(self._lower, (args, kwargs))
        elif func in _RAISED:
            args, kwargs = tree_map(_raise, (args, kwargs))
        return func(*args, **kwargs)

    def hold_in_recomputed(self, network: nn.Module) -> None:
        """Apply the rules in blocks that the backward pass recomputes, where PyTorch lets no mode in."""
        for block in find_blocks(network):
            if isinstance(block.forward, partial):  # by `checkpoint_blocks`
                block.forward = partial(block.forward, context_fn=lambda: (nullcontext(), self))

    def _lower(self, given: Any) -> Any:
        if self._lowered is None or not isinstance(given, Tensor) or given.dtype != torch.float32:
            return given
        if not (given.is_leaf and given.requires_grad):
            return given.to(self._lowered)
        if id(given) not in self._casts:
            with self._meter.part("weights as autocast has them"):
                self._casts[id(given)] = (given, given.to(self._lowered))
        return self._casts[id(given)][1]


class _FusedAttention(torch.autograd.Function):
    """Keeps what fused kernels keep for the backward pass: operands, output and one value per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        normaliser = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, normaliser)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _multi_head_attention(*args: Any) -> Tensor:
    """Take the memory of `nn.MultiheadAttention` over one (L, B, C): query, key and value are the same."""
    query, _, _, width, num_heads, in_weight, in_bias = args[:7]
    out_weight, out_bias = args[11:13]
    packed = functional.linear(query, in_weight, in_bias).unflatten(-1, (3, width))
    projected = packed.unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    heads = [x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in projected]  # B heads L width
    output = functional.scaled_dot_product_attention(*heads).permute(2, 0, 1, 3).contiguous()
    return functional.linear(output.flatten(0, 1).flatten(1), out_weight, out_bias).view(query.shape)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, segments: Segments, **__: Any
) -> tuple[Tensor, None]:
    """Take the memory of `segment_attention`, whose masks cannot be made while a meter watches."""
    queries, visible = query.split(segments.lengths, dim=2), segments.visible(module, key, value)
    attend = functional.scaled_dot_product_attention
    pieces = [attend(q, k, v) for q, k, v in zip(queries, *visible, strict=True)]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _without_memory(given: Any) -> Any:
    """Bring a tensor of known values to the others; a mask becomes positions, whose number is known."""
    if not isinstance(given, Tensor) or given.is_meta:
        return given
    if given.dtype == torch.bool and given.ndim == 1:
        given = given.nonzero().squeeze(1)
    return given.to("meta")


def _raise(given: Any) -> Any:
    return given.float() if isinstance(given, Tensor) and given.is_floating_point() else given


AttentionInterface.register(METERED_ATTENTION, packed_attention)
AttentionMaskInterface.register(METERED_ATTENTION, lambda *_, **__: None)  # none is needed
