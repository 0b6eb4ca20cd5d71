"""Stage 2: freeze everything else and teach the router which tiles can be compressed."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import binary_auroc

from vico_pl.losses.routing import COMPRESS, KEEP, SlidingPercentile, router_targets
from vico_pl.model.reference import FrozenReference
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.optim import OptimConfig
from vico_pl.stages.base import Stage, StepResult
from vico_pl.stages.labels import tile_loss_ratios
from vico_pl.types import Batch


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Settings of stage 2."""

    label_mode: str = "tile"  # tile: only the tile in question is compressed; image: all at once (the report)
    percentile: float = 50.0  # of recent loss ratios; tiles below it are labelled "compress"
    window: int = 4096  # loss ratios remembered
    min_history: int = 256  # loss ratios needed before the first labels
    epsilon: float = 1e-3  # nats, added to both losses of a ratio

    def __post_init__(self) -> None:
        """Refuse what the stage cannot do."""
        if self.label_mode not in ("image", "tile"):
            raise ValueError(f"router.label_mode is '{self.label_mode}'; expected image or tile")
        if not 0 < self.percentile < 100:
            raise ValueError(f"router.percentile is {self.percentile}; expected between 0 and 100")
        if self.epsilon <= 0:
            raise ValueError(f"router.epsilon is {self.epsilon}; expected more than 0")
        if not 1 <= self.min_history <= self.window:
            expected = f"1 to router.window ({self.window})"
            raise ValueError(f"router.min_history is {self.min_history}; expected {expected}")


class RouterStage(Stage):
    """Trains the router on labels made from loss ratios of the frozen policy."""

    area = "router"

    def __init__(
        self,
        policy: FrozenReference,
        reference: FrozenReference,
        config: RouterConfig,
        optim: OptimConfig,
        *,
        num_steps: int,
    ) -> None:
        """Train the router of `policy`, which stays frozen otherwise."""
        super().__init__(optim, num_steps=num_steps)
        if policy.model.router is None:
            raise ValueError("the model has no router; set model.router_heads")
        if len(policy.model.ratios) != 2:
            raise ValueError(
                f"model.ratios is {policy.model.ratios}; stage router labels the choice between two"
            )
        self.policy, self.reference, self.config = policy, reference, config
        self.router = policy.model.router.requires_grad_()
        self.window = SlidingPercentile(
            percentile=config.percentile, window=config.window, min_history=config.min_history
        )

    def step(self, batch: Batch) -> StepResult:
        """Label the tiles of the batch and classify them."""
        with torch.no_grad():
            features = self.policy.model.encode_tiles(batch.tiles)
            ratios = tile_loss_ratios(
                self.policy.model,
                self.reference,
                batch,
                features,
                mode=self.config.label_mode,
                epsilon=self.config.epsilon,
            )
        self.window.update(self._gather(ratios))
        threshold = self.window.threshold()
        logits = self.router(features)
        if threshold is None:
            return StepResult(loss_sum=0 * logits.sum(), count=0)
        targets = router_targets(ratios, threshold)
        loss = cross_entropy(logits, targets, reduction="sum")
        return StepResult(loss_sum=loss, count=len(targets), metrics=_metrics(logits, targets, threshold))

    def trained_model(self) -> VisionLanguageModel:
        """Return the policy with the trained router."""
        return self.policy.model

    def _gather(self, ratios: Tensor) -> Tensor:
        """Collect the loss ratios of all ranks, whose tile counts differ."""
        if self.trainer.world_size == 1:
            return ratios
        everywhere: list[list[float]] = [[] for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather_object(everywhere, ratios.tolist())
        return ratios.new_tensor([ratio for rank in everywhere for ratio in rank])


def _metrics(logits: Tensor, targets: Tensor, threshold: float) -> dict[str, Tensor | float]:
    metrics: dict[str, Tensor | float] = {"router/threshold": threshold}
    if len(targets):
        metrics["router/accuracy"] = (logits.argmax(-1) == targets).float().mean()
        metrics["router/compressed_fraction"] = (logits.argmax(-1) == COMPRESS).float().mean()
    if len(targets.unique()) == 2:  # it takes both classes to rank one above the other
        metrics["router/auroc"] = binary_auroc(logits.softmax(-1)[:, KEEP], targets)
    return metrics
