"""Find, compile and recompute the transformer blocks of a network; names in checkpoints stay the same."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def find_blocks(network: nn.Module) -> Sequence[nn.Module]:
    """Return the list of layers that holds most of a network's weights.

    It goes by `resblocks` in open_clip, `blocks` or `stages` in timm, `layer` or `layers` in transformers.
    """
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    return list(max(lists, key=_num_weights, default=[]))


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


def _num_weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
