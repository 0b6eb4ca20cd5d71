"""Stage 2: train the resolution router, with all else frozen, to say which tiles can be compressed."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import binary_auroc

from vico_pl.losses.routing import COMPRESS, KEEP, SlidingPercentile, router_targets
from vico_pl.model.blocks import release
from vico_pl.model.connector import FULL_RATIO
from vico_pl.model.flops import ModelFlops
from vico_pl.model.reference import FrozenReference
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.optim import OptimConfig
from vico_pl.stages.base import Mean, Stage, StepResult
from vico_pl.stages.cost import Number, Parts, StageCost, TilesPerRatio, forward_parts
from vico_pl.stages.labels import tile_loss_ratios
from vico_pl.stages.models import ModelSource, freeze_reference, prepare_blocks, prepare_router
from vico_pl.stages.settings import RunSettings, section_of
from vico_pl.types import Batch


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Settings of stage 2."""

    label_mode: str = "tile"  # compress one tile at a time, or all tiles of an image at once (the report)
    percentile: float = 50.0  # of recent loss ratios; tiles below it get the target 0, compress
    window: int = 4096  # number of recent loss ratios
    min_history: int = 256  # loss ratios needed before the first labels
    epsilon: float = 1e-3  # nats, added to both losses of a ratio

    def __post_init__(self) -> None:
        """Reject values that the stage has no meaning for."""
        if self.label_mode not in ("image", "tile"):
            raise ValueError(f"router.label_mode is '{self.label_mode}'; expected image or tile")
        if not 0 < self.percentile < 100:
            raise ValueError(f"router.percentile is {self.percentile}; expected between 0 and 100")
        if self.epsilon <= 0:
            raise ValueError(f"router.epsilon is {self.epsilon}; expected more than 0")
        if not 1 <= self.min_history <= self.window:
            expected = f"1 to router.window ({self.window})"
            raise ValueError(f"router.min_history is {self.min_history}; expected {expected}")


@dataclass(frozen=True, kw_only=True)
class RouterCost(StageCost):
    """Forward passes of reference and policy at full tokens, then of the policy with tiles compressed.

    Label mode `tile` runs a branch per tile over what follows it: half of the sample's tokens on average.
    """

    label_mode: str
    coarse_ratio: int

    def parts_at(self, tiles: TilesPerRatio, text_tokens: Number) -> Parts:
        """Return what labels cost."""
        num_tiles = sum(tiles.values())
        forward = forward_parts(self.flops, {FULL_RATIO: num_tiles}, text_tokens)
        once = sum(forward.values())
        if self.label_mode == "tile":
            compressed = num_tiles * (once - forward["vision"]) / 2
        else:
            coarse = forward_parts(self.flops, {self.coarse_ratio: num_tiles}, text_tokens)
            compressed = coarse["connectors"] + coarse["language"]
        return {"reference": once, "policy at full tokens": once, "policy with tiles compressed": compressed}

    def expected_parts(self, tiles: Number, text_tokens: Number, response_tokens: Number) -> Parts:
        """Return the same with heads and router: each comparison multiplies by both heads."""
        parts = self.parts_at({FULL_RATIO: tiles}, text_tokens)
        head = response_tokens * self.flops.head_per_token
        branches = tiles if self.label_mode == "tile" else 1
        parts["reference"] += head
        parts["policy at full tokens"] += 2 * head
        parts["policy with tiles compressed"] += 2 * branches * head
        return {**parts, "router": 3 * tiles * self.flops.router_per_tile}

    def vision_tokens(self, tiles: Number) -> dict[str, Number]:
        """Return the vision tokens that policy and reference see of a sample at full tokens."""
        tokens = super().vision_tokens(tiles)["policy"]
        return {"policy": tokens, "reference": tokens}


class RouterStage(Stage):
    """Trains the router on labels made from loss ratios of the frozen policy."""

    name = "router"
    trains_parts = False

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

    @classmethod
    def check(cls, run: RunSettings) -> Iterator[str]:
        """Yield what is wrong in a recipe of this stage."""
        yield from super().check(run)
        yield from cls.check_ratios(run)

    @classmethod
    def doubtful_settings(cls, run: RunSettings) -> Iterator[str]:
        """Yield settings without effect, or probably mistaken."""
        yield from super().doubtful_settings(run)
        if run.trainer.activation_checkpointing:
            yield "trainer.activation_checkpointing has no effect: stage router trains no transformer blocks"

    @classmethod
    def build(cls, run: RunSettings, source: ModelSource) -> "RouterStage":
        """Build the stage for a run."""
        policy, original = source.policy(), prepare_blocks(source.reference(), run)
        frozen = FrozenReference(cls.prepare(policy, run))  # before the reference takes over its parts
        reference = freeze_reference(original, policy, run, source)
        settings = section_of(run, RouterConfig)
        return cls(frozen, reference, settings, run.optim, num_steps=run.trainer.max_steps)

    @classmethod
    def prepare(cls, model: VisionLanguageModel, run: RunSettings) -> VisionLanguageModel:
        """Prepare the model whose router is trained."""
        return prepare_router(model, run)

    @classmethod
    def cost(cls, run: RunSettings, flops: ModelFlops) -> RouterCost:
        """Return what a sample costs."""
        label_mode = section_of(run, RouterConfig).label_mode
        return RouterCost(flops=flops, label_mode=label_mode, coarse_ratio=run.model.ratios[-1])

    def num_items(self, batch: Batch) -> int:
        """Return the number of tiles in the loss: those of the dummy sample do not count."""
        return len(_tiles_of_samples(batch))

    def results(self, micro_batches: list[Batch]) -> Iterator[StepResult]:
        """Label the tiles of all micro-batches of all ranks, then classify those of each micro-batch."""
        seen = [self._look(micro_batch) for micro_batch in micro_batches]
        self._remember(micro_batches, [ratios for _, ratios in seen])
        threshold = self.window.threshold()
        for micro_batch, (features, ratios) in zip(micro_batches, seen, strict=True):
            yield self._classify(micro_batch, features, ratios, threshold)

    def step(self, batch: Batch) -> StepResult:
        """Label the tiles of one micro-batch and classify them."""
        return next(self.results([batch]))

    def trained_model(self) -> VisionLanguageModel:
        """Return the policy with the trained router."""
        return self.policy.model

    def sharded_models(self) -> list[VisionLanguageModel]:
        """Return policy and reference."""
        return [self.policy.model, self.reference.model]

    @torch.no_grad()
    def _look(self, batch: Batch) -> tuple[Float[Tensor, "T P C"], Float[Tensor, " T"]]:
        """Return the patch features and the loss ratio of every tile."""
        features = self.policy.model.encode_tiles(batch.tiles)
        ratios = tile_loss_ratios(
            self.policy.model,
            self.reference,
            batch,
            features,
            mode=self.config.label_mode,
            epsilon=self.config.epsilon,
            num_groups=self._most_groups,
        )
        for model in self.sharded_models():
            release(model)
        return features, ratios

    def _most_groups(self, number: int) -> int:
        """Return the largest number of branch groups of any rank: with sharded weights all run as many."""
        return max(self.ranks.gather(number)) if self.is_sharded else number

    def _remember(self, micro_batches: list[Batch], ratios: list[Tensor]) -> None:
        """Add the loss ratios of all ranks to the window, in sample order: the same on each."""
        here = [
            (position, values.tolist())
            for micro_batch, of_micro_batch in zip(micro_batches, ratios, strict=True)
            for position, values in zip(
                micro_batch.positions, of_micro_batch.split(_tiles_per_sample(micro_batch)), strict=True
            )
            if position >= 0
        ]
        everywhere = sorted(sample for rank in self.ranks.gather(here) for sample in rank)
        self.window.update(ratios[0].new_tensor([ratio for _, values in everywhere for ratio in values]))

    def _classify(
        self, batch: Batch, features: Tensor, ratios: Tensor, threshold: float | None
    ) -> StepResult:
        logits = self.router(features)
        if threshold is None:
            return StepResult(loss_sum=0 * logits.sum())
        tiles = torch.tensor(_tiles_of_samples(batch), dtype=torch.int64, device=logits.device)
        logits, targets = logits[tiles], router_targets(ratios[tiles], threshold)
        loss = cross_entropy(logits, targets, reduction="sum")
        return StepResult(loss_sum=loss, metrics=_metrics(logits, targets, threshold))


def _tiles_per_sample(batch: Batch) -> list[int]:
    return list(map(sum, batch.tiles_per_image))


def _tiles_of_samples(batch: Batch) -> list[int]:
    """Return the indices of all tiles except the dummy sample's, whose position is -1."""
    owners = np.repeat(batch.positions, _tiles_per_sample(batch))
    indices: list[int] = np.flatnonzero(owners >= 0).tolist()
    return indices


def _metrics(logits: Tensor, targets: Tensor, threshold: float) -> dict[str, Mean]:
    chosen, count = logits.argmax(-1), len(targets)
    metrics = {
        "router/threshold": Mean(threshold, 1),
        "router/accuracy": Mean((chosen == targets).sum(), count),
        "router/compressed_fraction": Mean((chosen == COMPRESS).sum(), count),
    }
    if len(targets.unique()) == 2:  # AUROC needs both classes
        auroc = binary_auroc(logits.softmax(-1)[:, KEEP], targets)
        metrics["router/auroc"] = Mean(auroc * count, count)
    return metrics
