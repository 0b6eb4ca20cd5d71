"""Weights sharded over ranks (FSDP2): each keeps a part and gathers a block only while it runs.

Ranks must gather the same blocks in the same order, or they silently compute with wrong weights. So every
micro-batch has a tile, every rank runs equally many micro-batches and groups of branches in each, and
connectors of ratios that were not drawn run on an empty tensor.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from vico_pl.model.blocks import find_blocks
from vico_pl.model.vlm import VisionLanguageModel


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
    state: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    # A gloo thread may still use a part of it: a rank that exits right away would be aborted.
    distributed.barrier()
    return state
