"""The transformer blocks of a network, and what can be done to each: recompute it, compile it.

Both change how a block runs and nothing of what it is: names in checkpoints stay the same.
"""

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
    """Compile each block: one small program serves them all, and batches of any size."""
    for block in find_blocks(network):
        block.forward = torch.compile(block.forward, dynamic=True)


def checkpoint_blocks(network: nn.Module) -> None:
    """Let each block keep its input alone and run once more when its gradient is due.

    Compile first: what is compiled around a block that recomputes falls back to plain PyTorch.
    """
    for block in find_blocks(network):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _num_weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
