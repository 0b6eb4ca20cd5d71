"""The optimizer and its schedule."""

import inspect
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from vico_pl.errors import check_settings

# Those of transformers.get_scheduler that follow the step alone.
SCHEDULES = {s.value: s for s in SchedulerType if s.value not in ("reduce_lr_on_plateau", "greedy")}
# Arguments of a schedule that other settings give.
_GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "num_stable_steps", "last_epoch")


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """What a part of the model has of its own; null: as the rest."""

    lr: float | None = None  # its learning rate after the warmup
    weight_decay: float | None = None  # on its matrices and embeddings

    def __post_init__(self) -> None:
        rules = {name: (v is None or 0 <= v < math.inf, "0 or more") for name, v in vars(self).items()}
        check_settings("optim.parts.PART", self, **rules)


@dataclass(frozen=True, kw_only=True)
class PartsConfig:
    """Learning rate and weight decay of parts; the schedule is the same for all."""

    vision: PartConfig = field(default_factory=PartConfig)
    connectors: PartConfig = field(default_factory=PartConfig)
    language: PartConfig = field(default_factory=PartConfig)
    lora: PartConfig = field(default_factory=PartConfig)
    router: PartConfig = field(default_factory=PartConfig)

    def own(self) -> dict[str, PartConfig]:
        """Return the parts that have settings of their own."""
        return {name: part for name, part in vars(self).items() if part != PartConfig()}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and the learning rate schedule."""

    lr: float = 1e-5  # learning rate after the warmup
    weight_decay: float = 0.05  # on matrices, embeddings and the router's query; none on norms and biases
    beta1: float = 0.9  # of AdamW: decay of the mean of gradients
    beta2: float = 0.95  # and of their squares
    warmup_steps: int = 0  # over which the learning rate rises from 0
    schedule: str = "cosine"  # one of SCHEDULES, those of transformers.get_scheduler
    schedule_args: dict[str, Any] = field(default_factory=dict)  # of its own, such as {min_lr: 1e-7}
    parts: PartsConfig = field(default_factory=PartsConfig)  # such as {vision: {lr: 1e-6}}
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


def check_schedule(config: OptimConfig, *, num_steps: int) -> Iterator[str]:
    """Yield what is wrong with the arguments of the schedule, a sentence each."""
    maker: Any = TYPE_TO_SCHEDULER_FUNCTION[SCHEDULES[config.schedule]]
    parameters = inspect.signature(maker).parameters
    known = [name for name in parameters if name not in _GIVEN]
    unknown = [name for name in config.schedule_args if name not in known]
    needed = [name for name in known if parameters[name].default is inspect.Parameter.empty]
    missing = [name for name in needed if name not in config.schedule_args]
    if unknown:
        named = f"optim.schedule_args names {', '.join(unknown)}"
        yield f"{named}; schedule '{config.schedule}' takes {', '.join(known) or 'none'}"
    if missing:
        yield f"schedule '{config.schedule}' needs optim.schedule_args to name {', '.join(missing)}"
    if unknown or missing:
        return
    try:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=config.lr)
        factor = _schedule(optimizer, config, num_steps).lr_lambdas[0]
        list(map(factor, (0, config.warmup_steps, num_steps // 2, num_steps)))
    except (ValueError, TypeError, ArithmeticError) as error:
        given = f"schedule '{config.schedule}' with optim.schedule_args {config.schedule_args}"
        yield f"{given} does not work ({error}); it takes {', '.join(known)}"


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, *, num_steps: int
) -> dict[str, Any]:
    """Return optimizer and schedule, for named parameters, in the form Lightning takes."""
    own = config.parts.own()
    members: dict[tuple[str, bool], list[nn.Parameter]] = {("", True): [], ("", False): []}
    for name, parameter in parameters:
        if parameter.requires_grad:
            part = part_of(name) if part_of(name) in own else ""
            members.setdefault((part, parameter.ndim >= 2), []).append(parameter)
    groups = []
    for (part, decays), params in members.items():
        if params or not own:  # FSDP loads one empty group at most
            given = own.get(part, PartConfig())
            decay = config.weight_decay if given.weight_decay is None else given.weight_decay
            lr = config.lr if given.lr is None else given.lr
            groups.append({"params": params, "weight_decay": decay if decays else 0.0, "lr": lr})
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))
    scheduler = _schedule(optimizer, config, num_steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, num_steps: int) -> Any:
    return get_scheduler(config.schedule, optimizer, config.warmup_steps, num_steps, config.schedule_args)


def part_of(name: str) -> str:
    """Return the part of the model that a stage's parameter belongs to; new tokens count as language.

    >>> [part_of(name) for name in ("model.vision.norm.bias", "router.gating.bias", "model.new_tokens.rows")]
    ['vision', 'router', 'language']
    """
    if ".lora_" in name:
        return "lora"
    return next((word for word in name.split(".")[:2] if word in vars(PartsConfig())), "language")


def part_figures(
    parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer, config: OptimConfig
) -> dict[str, torch.Tensor | float]:
    """Return gradient norms of parts if there are several, and the rates of those with settings of their own.

    Norms stay on the device; with sharded weights they are taken over all ranks.
    """
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    own, gradients, found = config.parts.own(), defaultdict(list), {}
    for name, parameter in parameters:
        if id(parameter) in rates and part_of(name) in own:
            found[f"optim/lr_{part_of(name)}"] = rates[id(parameter)]
        if parameter.grad is not None:
            gradients[f"optim/grad_norm_{part_of(name)}"].append(parameter.grad)
    return found if len(gradients) < 2 else {**found, **{n: _norm(g) for n, g in gradients.items()}}


def clip_gradients(optimizer: torch.optim.Optimizer, *, max_norm: float) -> float:
    """Scale gradients so that their global norm is at most `max_norm`; returns the norm before.

    With sharded weights the norm is taken over all ranks.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = _norm([p.grad for p in trained])
    clip_grads_with_norm_(trained, max_norm, norm)
    return float(norm)


def _norm(gradients: Any) -> torch.Tensor:
    norm = get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


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
