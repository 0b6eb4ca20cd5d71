"""What all stages share: a step goes through the micro-batches of a share, and its loss is a mean over all ranks."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from vico_pl.model.sharding import cast_trained, shard_model
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.optim import OptimConfig, build_optimizer, clip_gradients, numbered_by_module
from vico_pl.stages.ranks import Ranks
from vico_pl.types import Batch, RankBatch


class Mean(NamedTuple):
    """A metric as what it is the mean of, so that those of micro-batches and ranks can be put together."""

    total: Tensor | float
    weight: int  # how many it is the total of


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a stage computes from a micro-batch."""

    loss_sum: Tensor  # over the items that the stage counts
    metrics: Mapping[str, Mean] = field(default_factory=dict)


class RankFacts(NamedTuple):
    """What the others have to know of a rank's share."""

    num_micro_batches: int
    num_items: int
    num_samples: int
    num_bad: int
    stop: bool


class Stage(L.LightningModule):
    """A stage of training: turns micro-batches into `StepResult`s; the rest happens here."""

    area: str  # first part of the metrics' names
    ranks: Ranks
    stop_requested = False  # of this rank
    is_sharded = False
    # What trained weights get when they are split; before, each rank would hold all of them in it.
    trained_dtype: torch.dtype | None = None

    def __init__(self, optim: OptimConfig, *, num_steps: int) -> None:
        """Keep the settings. In Lightning's words optimization is manual: a step has a backward per micro-batch."""
        super().__init__()
        self.automatic_optimization = False
        self.optim, self.num_steps = optim, num_steps

    @abstractmethod
    def step(self, batch: Batch) -> StepResult:
        """Compute the loss of one micro-batch."""

    @abstractmethod
    def trained_model(self) -> VisionLanguageModel:
        """Return the model that the next stage takes over."""

    def results(self, micro_batches: list[Batch]) -> Iterator[StepResult]:
        """Yield the result of each micro-batch, whose backward is over when the next is asked for."""
        return map(self.step, micro_batches)

    def num_items(self, batch: Batch) -> int:
        """Return over how many items the loss of a micro-batch is summed: response tokens."""
        return batch.num_response_tokens

    def setup(self, stage: str) -> None:
        """Put what is trained into training mode: models are loaded in eval mode, which Lightning keeps."""
        self.train()
        self.ranks = Ranks(self.trainer.world_size)

    def configure_model(self) -> None:
        """Split the models over the ranks, where the strategy says so."""
        mesh = self.device_mesh
        if mesh is not None and not self.is_sharded:
            dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
            for model in self.sharded_models():
                shard_model(model, mesh["data_parallel"], dtype=dtype)
            if self.trained_dtype is not None:
                cast_trained(self.trained_model(), self.trained_dtype)
            self.is_sharded = True

    def sharded_models(self) -> list[VisionLanguageModel]:
        """Return the models to split."""
        return [self.trained_model()]

    def training_step(self, share: RankBatch, _: int) -> dict[str, Any]:
        """Take an optimizer step on a global batch: the same one however ranks and micro-batches split it.

        Returns what callbacks ask for, the same on all ranks: `num_samples` and of these `num_bad`,
        `grad_norm`, and `stop`: whether some rank was asked to.
        """
        facts = self.ranks.gather(self._facts(share))
        num_micro_batches, num_items = (
            max(f.num_micro_batches for f in facts),
            sum(f.num_items for f in facts),
        )
        # All ranks run as many micro-batches: sharded weights are gathered by all or by none.
        micro_batches = share.micro_batches + [share.dummy] * (num_micro_batches - len(share.micro_batches))
        metrics: list[Mapping[str, Mean]] = []
        for index, result in enumerate(self.results(micro_batches)):
            # Gradients are averaged over ranks; the loss is a sum over them.
            loss = result.loss_sum / max(num_items, 1) * self.ranks.world
            with nullcontext() if index == num_micro_batches - 1 else self._gradients_stay_here():
                self.manual_backward(loss)
            loss_mean = Mean(result.loss_sum.detach(), self.num_items(micro_batches[index]))
            metrics.append({f"{self.area}/loss": loss_mean, **result.metrics})
        lr, norm = self.trainer.optimizers[0].param_groups[0]["lr"], self._update()
        metrics.append({"optim/lr": Mean(lr, 1), "optim/grad_norm": Mean(norm, 1)})
        self._log(metrics)
        return {
            "num_samples": sum(f.num_samples for f in facts),
            "num_bad": sum(f.num_bad for f in facts),
            "grad_norm": norm,
            "stop": any(f.stop for f in facts),
        }

    def configure_optimizers(self) -> Any:
        """Optimise what requires gradients."""
        return build_optimizer(self.parameters(), self.optim, num_steps=self.num_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Number the optimizer's state as FSDP does, which takes it amiss otherwise."""
        if checkpoint.get("optimizer_states") and not self.is_sharded:
            (state,), (optimizer,) = checkpoint["optimizer_states"], self.trainer.optimizers
            checkpoint["optimizer_states"] = [numbered_by_module(state, optimizer, self)]

    def _facts(self, share: RankBatch) -> RankFacts:
        return RankFacts(
            num_micro_batches=len(share.micro_batches),
            num_items=sum(map(self.num_items, share.micro_batches)),
            num_samples=len(share.ids) + len(share.bad_records),
            num_bad=len(share.bad_records),
            stop=self.stop_requested,
        )

    def _gradients_stay_here(self) -> AbstractContextManager[Any]:
        """Let DDP add up gradients of all micro-batches before ranks exchange them."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()

    def _update(self) -> float:
        """Apply the gradients, if they are finite, and forget them; returns their norm before clipping.

        A step without gradients changes no weight but counts, so that its samples are not met again.
        """
        optimizer: Any = self.optimizers()  # the one and only
        schedule: Any = self.lr_schedulers()
        norm = clip_gradients(optimizer, max_norm=self.optim.max_grad_norm)
        if not math.isfinite(norm):
            optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        return norm

    def _log(self, metrics: list[Mapping[str, Mean]]) -> None:
        """Log means over all ranks, at the steps that Lightning writes down: a GPU is waited for here."""
        if self.trainer.global_step % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        here = {name: Mean(float(total), weight) for name, (total, weight) in add_up(metrics).items()}
        for name, (total, weight) in add_up(self.ranks.gather(here)).items():
            if weight:
                self.log(name, total / weight, prog_bar=name == f"{self.area}/loss", batch_size=1)


def add_up(parts: Iterable[Mapping[str, Mean]]) -> dict[str, Mean]:
    """Put the metrics of micro-batches or ranks together.

    >>> add_up([{"a": Mean(3.0, 2)}, {"a": Mean(1.0, 2), "b": Mean(0.0, 1)}])
    {'a': Mean(total=4.0, weight=4), 'b': Mean(total=0.0, weight=1)}
    """
    sums: dict[str, Mean] = {}
    for part in parts:
        for name, (total, weight) in part.items():
            before, weighed = sums.get(name, (0.0, 0))
            sums[name] = Mean(before + total, weighed + weight)
    return sums
