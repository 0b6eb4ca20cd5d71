"""The transformer blocks of a network: compiled, recomputed in the backward pass, sharded over ranks (FSDP2).

With sharding each rank keeps a part of the weights and gathers a block only while it runs. Ranks must gather
the same blocks in the same order, or they silently compute with wrong weights. So every micro-batch has a
tile, every rank runs equally many micro-batches and groups of branches in each, and connectors of ratios that
were not drawn run on an empty tensor.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from vico_pl.model.vlm import VisionLanguageModel


def find_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the list of layers that holds most of a network's weights.

    It goes by `resblocks` in open_clip, `blocks` or `stages` in timm, `layer` or `layers` in transformers.
    """
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    return list(max(lists, key=lambda module: sum(p.numel() for p in module.parameters()), default=[]))


def compile_blocks(network: nn.Module) -> None:
    """Compile each block: one small program for all blocks and all batch sizes."""
    for block in find_blocks(network):
        block.forward = torch.compile(block.forward, dynamic=True)


def checkpoint_blocks(network: nn.Module) -> None:
    """Use activation checkpointing: each block keeps only its input and recomputes in the backward pass.

    Compile first: code compiled around a checkpointed block falls back to plain PyTorch.
    """
    for block in find_blocks(network):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def shard_model(model: VisionLanguageModel, mesh: DeviceMesh, *, dtype: torch.dtype | None = None) -> None:
    """Shard a model over the ranks of a mesh; weights are gathered and computed in `dtype`.

    Weights outside any unit stay gathered from the first call of a step until their gradients are computed,
    or until `release`: the loss uses the head outside any forward.
    """
    settings: dict[str, Any] = {"mesh": mesh}
    if dtype is not None:
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for unit in split_units(model):
        fully_shard(unit, **settings)
    fully_shard(model, **settings, reshard_after_forward=False)
    for method in ("encode_tiles", "response_states"):
        register_fsdp_forward_method(model, method)


def split_units(model: VisionLanguageModel) -> list[nn.Module]:
    """Return the modules that are gathered as a unit: all blocks, and the router."""
    routers = [] if model.router is None else [model.router]
    return [*find_blocks(model.vision), *find_blocks(model.language), *routers]


def cast_trained(model: VisionLanguageModel, dtype: torch.dtype) -> None:
    """Cast the trained weights, or this rank's part of them."""
    model._apply(lambda tensor: tensor.to(dtype) if tensor.requires_grad else tensor)  # noqa: SLF001


def release(model: VisionLanguageModel) -> None:
    """Free the gathered weights of a sharded model that computes no gradients."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole_state(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Return all weights on the CPU of rank 0, nothing on others; a collective call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    # A gloo thread may still use a part of it: a rank that exits right away would be aborted.
    distributed.barrier()
    return state
