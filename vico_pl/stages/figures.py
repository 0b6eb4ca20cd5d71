"""Figures of a stage: sums and values that micro-batches, steps and ranks add up to, and how ranks meet."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed

Value = TypeVar("Value")


class Mean(NamedTuple):
    """A figure as total and weight, so that micro-batches, steps and ranks can be combined."""

    total: Tensor | float
    weight: int  # number of items in the total


Figures = Mapping[str, Mean | Tensor]  # tensors hold a value for each item


def add_up(parts: Iterable[Mapping[str, Mean]]) -> dict[str, Mean]:
    """Add up means.

    >>> add_up([{"a": Mean(3.0, 2)}, {"a": Mean(1.0, 2), "b": Mean(0.0, 1)}])
    {'a': Mean(total=4.0, weight=4), 'b': Mean(total=0.0, weight=1)}
    """
    sums: dict[str, Mean] = {}
    for part in parts:
        for name, (total, weight) in part.items():
            before, weighed = sums.get(name, (0.0, 0))
            sums[name] = Mean(before + total, weighed + weight)
    return sums


def combine(parts: Iterable[Figures]) -> dict[str, Mean | Tensor]:
    """Add up means and join values, on the CPU: this waits for the GPU.

    >>> combine([{"a": Mean(3.0, 2), "b": torch.tensor([1])}, {"a": Mean(1.0, 2), "b": torch.tensor([2])}])
    {'a': Mean(total=4.0, weight=4), 'b': tensor([1, 2])}
    """
    parts = list(parts)
    means = add_up([{n: v for n, v in part.items() if isinstance(v, Mean)} for part in parts])
    values: dict[str, list[Tensor]] = defaultdict(list)
    for name, value in chain.from_iterable(part.items() for part in parts):
        if isinstance(value, Tensor):
            values[name].append(value.cpu())
    floats = {name: Mean(float(total), weight) for name, (total, weight) in means.items()}
    return {**floats, **{name: torch.cat(tensors) for name, tensors in values.items()}}


def means(figures: Figures) -> dict[str, float]:
    """Return the means of at least one item."""
    known = {name: value for name, value in figures.items() if isinstance(value, Mean)}
    return {name: float(total / weight) for name, (total, weight) in known.items() if weight}


def grouped(names: Sequence[str | None], values: Tensor, lengths: Sequence[int]) -> dict[str, Mean]:
    """Return the mean of values per group; consecutive `lengths[i]` of them belong to group `names[i]`.

    >>> grouped(["a", None, "a"], torch.tensor([1.0, 2.0, 3.0, 4.0]), [1, 1, 2])
    {'a': Mean(total=tensor(8.), weight=3)}
    """
    parts = zip(names, values.detach().split(list(lengths)), strict=True)
    return add_up({name: Mean(part.sum(), len(part))} for name, part in parts if name is not None)


class Ranks:
    """All processes of a run; they exchange small objects over the CPU, so that no GPU has to wait."""

    def __init__(self, world: int) -> None:
        """Open a process group of its own. Collective: call it on every rank."""
        self.world = world
        self._group: Any = distributed.new_group(backend="gloo") if world > 1 else None

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks in rank order. Collective: call it on every rank.

        Raises:
            ConnectionError: another rank has ended.
        """
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        try:
            distributed.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise ConnectionError(
                f"another rank has ended ({str(error).splitlines()[0]}); see its log for the reason; "
                "the same command resumes from the newest checkpoint"
            ) from error
        return values
