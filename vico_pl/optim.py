"""The optimizer and its schedule."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import get_scheduler

from vico_pl.errors import check_settings

# Those of transformers.get_scheduler that need no further settings.
SCHEDULES = (
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "inverse_sqrt",
    "polynomial",
)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and the learning rate schedule."""

    lr: float = 1e-5  # learning rate after the warmup
    weight_decay: float = 0.05  # on matrices; none on norms, biases and other vectors
    beta1: float = 0.9  # of AdamW: decay of the mean of gradients
    beta2: float = 0.95  # and of their squares
    warmup_steps: int = 0  # over which the learning rate rises from 0
    schedule: str = "cosine"  # one of SCHEDULES
    max_grad_norm: float = 1.0  # of all gradients together; larger ones are scaled down; inf: never

    def __post_init__(self) -> None:
        check_settings(
            "optim",
            self,
            lr=(0 <= self.lr < math.inf, "0 or more"),
            weight_decay=(0 <= self.weight_decay < math.inf, "0 or more"),
            beta1=(0 <= self.beta1 < 1, "0 to below 1"),
            beta2=(0 <= self.beta2 < 1, "0 to below 1"),
            warmup_steps=(self.warmup_steps >= 0, "0 or more"),
            max_grad_norm=(self.max_grad_norm > 0, "more than 0 (inf does not clip)"),
            schedule=(self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        )


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig, *, num_steps: int
) -> dict[str, Any]:
    """Return optimizer and schedule in the form Lightning takes."""
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))
    scheduler = get_scheduler(config.schedule, optimizer, config.warmup_steps, num_steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def clip_gradients(optimizer: torch.optim.Optimizer, *, max_norm: float) -> float:
    """Scale gradients so that their global norm is at most `max_norm`; returns the norm before.

    With sharded weights the norm is taken over all ranks.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = get_total_norm([p.grad for p in trained])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    clip_grads_with_norm_(trained, max_norm, norm)
    return float(norm)


def numbered_by_module(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, module: nn.Module
) -> dict[str, Any]:
    """Return an optimizer's state with parameters numbered by module order instead of group order.

    An optimizer loads either, as it matches by the order within groups; FSDP expects module order.
    """
    numbers = {id(parameter): number for number, parameter in enumerate(module.parameters())}
    listed = [numbers[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [{**group, "params": [listed[i] for i in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": {listed[i]: v for i, v in state["state"].items()}, "param_groups": groups}
