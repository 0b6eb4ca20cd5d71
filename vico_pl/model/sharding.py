"""Weights split over ranks (FSDP2): each keeps a part and gathers a block's whole only while it runs.

Ranks must gather the same blocks in the same order, or they compute with each other's weights without an
error. So every micro-batch has a tile, every rank runs equally many micro-batches and groups of branches in
each, and connectors of ratios that were not drawn run on an empty tensor.
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
    """Split a model over the ranks of a mesh; `dtype` is what it is gathered and computed in.

    What belongs to no unit is gathered when the model is first called in a step and stays so until its
    gradients are there, or until `release`: the head is used by the loss, outside any forward.
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
    """Return what is gathered as one: all blocks, and the router, which runs apart from the rest."""
    routers = [] if model.router is None else [model.router]
    return [*find_blocks(model.vision), *find_blocks(model.language), *routers]


def cast_trained(model: VisionLanguageModel, dtype: torch.dtype) -> None:
    """Give the weights that are trained their type, of which a rank of a sharded model has only its part."""
    model._apply(lambda tensor: tensor.to(dtype) if tensor.requires_grad else tensor)  # noqa: SLF001


def release(model: VisionLanguageModel) -> None:
    """Give back what a sharded model that makes no gradients still holds of others."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole_state(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Return all weights on the CPU of rank 0; every rank must ask. Others get none."""
    state: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    # A thread of gloo may still hold a part of it: a rank that ended right away would be aborted.
    distributed.barrier()
    return state
