"""What all stages share: normalisation by global counts, logging, the optimizer."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor

from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.optim import OptimConfig, build_optimizer
from vico_pl.types import Batch


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a stage computes from a batch."""

    loss_sum: Tensor  # summed over `count` items
    count: int  # response tokens, or tiles, of this rank
    metrics: dict[str, Tensor | float] = field(default_factory=dict)


class Stage(L.LightningModule):
    """A stage of training: turns a batch into a `StepResult`; the rest happens here."""

    area: str  # first part of the metrics' names

    def __init__(self, optim: OptimConfig, *, num_steps: int) -> None:
        """Keep the settings."""
        super().__init__()
        self.optim, self.num_steps = optim, num_steps

    @abstractmethod
    def step(self, batch: Batch) -> StepResult:
        """Compute the loss of one batch."""

    @abstractmethod
    def trained_model(self) -> VisionLanguageModel:
        """Return the model that the next stage takes over."""

    def setup(self, stage: str) -> None:
        """Put what is trained into training mode: models are loaded in eval mode, which Lightning keeps."""
        self.train()

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """Divide the loss by the count over all ranks, so that it is exact under any split of the batch."""
        result = self.step(batch)
        count = self._sum_over_ranks(result.count)
        # DDP averages gradients over ranks; the loss is a sum over them.
        loss = result.loss_sum / max(count, 1) * self.trainer.world_size
        self.log(f"{self.area}/loss", loss.detach(), prog_bar=True, batch_size=batch.num_samples)
        for name, value in result.metrics.items():
            self.log(name, value, batch_size=batch.num_samples)
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("optim/lr", lr, batch_size=batch.num_samples)
        return loss

    def configure_optimizers(self) -> Any:
        """Optimise what requires gradients."""
        return build_optimizer(self.parameters(), self.optim, num_steps=self.num_steps)

    def _sum_over_ranks(self, count: int) -> float:
        if self.trainer.world_size == 1:
            return float(count)
        return float(self.trainer.strategy.reduce(torch.tensor(count, device=self.device), reduce_op="sum"))
