"""What all stages share: an optimizer step over micro-batches, whose loss is a mean over all ranks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import lightning as L
import torch
from jaxtyping import Float, Int64
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from vico_pl.data.module import DataModule
from vico_pl.model.adapters import LoraConfig, add_adapters
from vico_pl.model.blocks import cast_trained, checkpoint_blocks, compile_blocks, release, shard_model
from vico_pl.model.connector import FULL_RATIO
from vico_pl.model.flops import ModelFlops
from vico_pl.model.language import check_flash_attention, set_packed_attention
from vico_pl.model.reference import FrozenReference
from vico_pl.model.router import RoutingRule
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.optim import build_optimizer, check_schedule, clip_gradients, numbered_by_module, part_figures
from vico_pl.stages.cost import Parts, SampleCounts, StageCost, trained_parts
from vico_pl.stages.figures import Figures, Mean, Ranks, combine, means
from vico_pl.stages.settings import DTYPES, PARTS, TRAINABLE_PARTS, RunSettings
from vico_pl.types import Batch, RankBatch


@runtime_checkable
class ModelSource(Protocol):
    """Gives a stage its models: read from folders in a run, without weights in a plan."""

    @property
    def same_weights(self) -> bool:
        """Whether policy and reference start from the same folder."""

    def policy(self) -> VisionLanguageModel:
        """Return the model to start from, with the connectors and the router that the recipe adds."""

    def reference(self) -> VisionLanguageModel:
        """Return the model that the policy is compared with."""

    def rule(self) -> RoutingRule | None:
        """Return the rule by which the model to start from is routed; None: it has no calibrated router."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a stage computes from a micro-batch."""

    loss_sum: Tensor  # over the items that the stage counts
    metrics: Figures = field(default_factory=dict)
    num_items: int | None = None  # that the loss sums over; default: `Stage.num_items`, none left out


class Stage(L.LightningModule):
    """A stage of training. It turns micro-batches into `StepResult`s; the optimizer step is here."""

    name: ClassVar[str]  # in recipes, and as the first part of metric names
    compares: ClassVar[bool] = True  # compression ratios of a given model, with a frozen reference
    trains_parts: ClassVar[bool] = True  # trains what model.trainable names
    next_step: ClassVar[str] = "vico generate {model} IMAGE --prompt TEXT"  # with the trained model
    draws_ratios: ClassVar[bool] = False  # otherwise the policy sees full tokens
    # What TensorBoard shows first: chart -> patterns of metric names.
    charts: ClassVar[Mapping[str, list[str]]] = {"loss on held-out data": ["val/.*/loss"]}
    reference: FrozenReference  # if it compares
    rule: RoutingRule | None = None  # by which tiles are routed in training; the trained model keeps it
    ranks: Ranks
    stop_requested = False  # on this rank
    num_left_out = 0  # items of a step that were left out on all ranks, as no loss could be computed
    is_sharded = False

    def __init__(
        self, run: RunSettings, model: VisionLanguageModel, reference: FrozenReference | None = None
    ) -> None:
        """Keep the models unregistered: a subclass registers what its checkpoints hold."""
        super().__init__()
        self.automatic_optimization = False  # a step has a backward pass per micro-batch
        self.run, self._models = run, [model]
        self._since_point: list[Figures] = []  # of the steps since the last logged point
        self.source_of: Callable[[int], str | None] = lambda _: None  # of the sample at a position
        if reference is not None:
            self.reference = reference
            self._models.append(reference.model)

    @classmethod
    def check(cls, run: RunSettings) -> Iterator[str]:
        """Yield what is wrong in a recipe of this stage, a sentence each."""
        trainable, ratios = run.model.trainable, run.model.ratios
        if cls.trains_parts and not set(trainable) & set(TRAINABLE_PARTS):
            yield f"model.trainable is {trainable}; stage {cls.name} has nothing to train"
        if cls.compares and run.model.path is None:
            yield "model.path is not set; this stage starts from a model folder"
        if cls.compares and len(ratios) < 2:
            yield f"model.ratios is {ratios}; stage {cls.name} needs at least two"
        trained = set(trainable) if cls.trains_parts else {"router"}
        for part in run.optim.parts.own().keys() - trained:
            yield f"optim.parts names {part}, but this run trains {', '.join(sorted(trained))}"
        yield from check_schedule(run.optim, num_steps=run.trainer.max_steps)

    @classmethod
    def doubtful_settings(cls, run: RunSettings) -> Iterator[str]:
        """Yield settings of a recipe that have no effect or are probably mistakes, a sentence each."""
        if run.model.lora != LoraConfig() and not (cls.trains_parts and "lora" in run.model.trainable):
            yield "model.lora has no effect: only a stage whose model.trainable names lora has adapters"
        if run.trainer.activation_checkpointing and not cls.trains_parts:
            no_effect = "trainer.activation_checkpointing has no effect"
            yield f"{no_effect}: stage {cls.name} trains no transformer blocks"
        warmup, steps = run.optim.warmup_steps, run.trainer.max_steps
        if warmup >= steps:
            yield f"optim.warmup_steps is {warmup}: a run of {steps} steps never reaches optim.lr"
        if run.data.validation and not run.trainer.validate_every:
            yield "data.validation has no effect: trainer.validate_every is 0"

    @classmethod
    def what_next(cls, run: RunSettings) -> str:
        """Return what to do with the trained model: `next_step`, unless a recipe needs another."""
        return cls.next_step

    @classmethod
    def check_device(cls, run: RunSettings, device: torch.device) -> None:
        """Raise ValueError if the device lacks a kernel that the recipe asks for."""
        if run.model.attention == "flash":
            check_flash_attention(device)

    @classmethod
    def build(cls, run: RunSettings, source: ModelSource) -> "Stage":
        """Build the stage for a run. The reference uses frozen parts of a policy with the same weights."""
        policy = source.policy()
        if not cls.compares:
            return cls(run, cls.prepare(policy, run))
        original = prepare_blocks(source.reference(), run)
        policy = cls.prepare(policy, run)
        # Not under fsdp: a part that two models share can be sharded for one of them only.
        shares = source.same_weights and run.trainer.strategy != "fsdp"
        return cls(run, policy, FrozenReference(original, beside=policy if shares else None))

    @classmethod
    def prepare(cls, model: VisionLanguageModel, run: RunSettings) -> VisionLanguageModel:
        """Freeze what is not trained, cast what is, add adapters and set how blocks run."""
        trainable = run.model.trainable
        for name in PARTS:
            part = getattr(model, name)
            if name not in trainable:
                part.requires_grad_(requires_grad=False)
            elif run.trainer.strategy != "fsdp":  # which casts after sharding
                part.to(DTYPES[run.model.dtype])
        if "lora" in trainable:
            add_adapters(model.language, run.model.lora)
        prepare_blocks(model, run)
        for network in (model.vision, model.language) if run.trainer.activation_checkpointing else ():
            checkpoint_blocks(network)
        return model

    @classmethod
    def cost(cls, run: RunSettings, flops: ModelFlops) -> StageCost:
        """Return what a sample costs in a run of this stage."""
        return StageCost(
            flops=flops,
            ratios=run.model.ratios if cls.draws_ratios else [FULL_RATIO],
            compares=cls.compares,
            ratios_at=partial(cls.ratios_at, run),
            parts=partial(cls.cost_parts, run, flops),
        )

    @classmethod
    def ratios_at(cls, run: RunSettings, position: int, tiles_per_image: Sequence[int]) -> Sequence[int]:
        """Return the compression ratio of each tile of the sample at a position: full tokens."""
        return [FULL_RATIO] * sum(tiles_per_image)

    @classmethod
    def cost_parts(cls, run: RunSettings, flops: ModelFlops, sample: SampleCounts) -> Parts:
        """Return the FLOPs of a sample by part of the step."""
        return trained_parts(run, flops, sample)

    def step(self, batch: Batch) -> StepResult:
        """Compute the loss of one micro-batch. A stage defines this, or `results`."""
        return next(self.results([batch]))

    def results(self, micro_batches: list[Batch]) -> Iterator[StepResult]:
        """Yield the result of each micro-batch; its backward pass is done before the next is asked for."""
        return map(self.step, micro_batches)

    def validate(self, batch: Batch, *, place: tuple[int, ...]) -> Figures:
        """Return the figures of a micro-batch, by default those of a step; `place` is its own, each time."""
        result = self.step(batch)
        loss = Mean(result.loss_sum, self.num_items(batch))
        return {"loss": loss, **{name.split("/")[-1]: mean for name, mean in result.metrics.items()}}

    def compressed_ratios(self, features: Float[Tensor, "t P C"]) -> dict[str, Int64[Tensor, " t"]]:
        """Name the ratios at which validation answers questions about a sample, besides full tokens."""
        return {}

    def summary(self, figures: Figures) -> dict[str, float]:
        """Return what is logged of a validation set, from the figures of all its micro-batches."""
        return means(figures)

    def logged(self, figures: Figures) -> dict[str, float]:
        """Return what is logged of training, from the figures of all micro-batches since the last point."""
        return means(figures)

    def sources(self, batch: Batch, metric: str) -> list[str | None]:
        """Return for each sample the name of its source's metric; None: the run has one source only."""
        names = [self.source_of(position) for position in batch.positions]
        return [None if name is None else f"{metric}_source_{name}" for name in names]

    def num_items(self, batch: Batch) -> int:
        """Return the number of items that the loss of a micro-batch sums over: response tokens."""
        return batch.num_response_tokens

    def trained_model(self) -> VisionLanguageModel:
        """Return the policy, from which the next stage starts."""
        return self._models[0]

    def sharded_models(self) -> list[VisionLanguageModel]:
        """Return the policy and the reference, if there is one."""
        return self._models

    def setup(self, stage: str) -> None:
        """Switch to training mode: models are loaded in eval mode, which Lightning keeps."""
        self.train()
        self.ranks = Ranks(self.trainer.world_size)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, DataModule):
            self.source_of = data.source_of

    def configure_model(self) -> None:
        """Shard the models over the ranks if the strategy does.

        Trained weights are cast last: cast earlier, each rank would hold the full model.
        """
        mesh, trained_dtype = self.device_mesh, DTYPES[self.run.model.dtype]
        if mesh is None or self.is_sharded:
            return
        dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        for model in self.sharded_models():
            shard_model(model, mesh["data_parallel"], dtype=dtype)
        if trained_dtype is not None:
            cast_trained(self.trained_model(), trained_dtype)
        self.is_sharded = True

    def training_step(self, rank_batch: RankBatch, _: int) -> dict[str, Any]:
        """Take an optimizer step on a global batch; the result does not depend on how it is split.

        Returns what callbacks need, the same on all ranks: `num_samples`, of these `num_bad`, `grad_norm`,
        `num_left_out`, and `stop`: how many ranks were asked to.
        """
        counts, number = self._counts(rank_batch), len(rank_batch.micro_batches)
        totals, num_micro_batches = self.ranks.sums_and_largest(counts, number)
        micro_batches = rank_batch.padded(num_micro_batches)
        metrics: list[Figures] = []
        for index, result in enumerate(self.results(micro_batches)):
            # Gradients are averaged over ranks; the loss is a sum over them.
            loss = result.loss_sum / max(totals["num_items"], 1) * self.ranks.world
            with nullcontext() if index == num_micro_batches - 1 else self._gradients_stay_local():
                self.manual_backward(loss)
            count = self.num_items(micro_batches[index]) if result.num_items is None else result.num_items
            metrics.append({f"{self.name}/loss": Mean(result.loss_sum.detach(), count), **result.metrics})
        (optimizer,) = self.trainer.optimizers
        figures = {"optim/lr": optimizer.param_groups[0]["lr"]}
        if self._is_point(self.trainer.global_step + 1):
            figures |= part_figures(self.named_parameters(), optimizer, self.run.optim)
        norm = self._update()
        metrics.append({n: Mean(value, 1) for n, value in {**figures, "optim/grad_norm": norm}.items()})
        self._log(metrics)
        return {**totals, "grad_norm": norm, "num_left_out": self.num_left_out}

    def validation_step(self, rank_batch: RankBatch, number: int, dataloader_idx: int = 0) -> Any:
        """Return the figures of each micro-batch; `stages/validation.py` combines them."""
        num_micro_batches = self.ranks.largest(len(rank_batch.micro_batches))
        figures = []
        for index, micro_batch in enumerate(rank_batch.padded(num_micro_batches)):
            figures.append(self.validate(micro_batch, place=(dataloader_idx, number, index)))
            for model in self.sharded_models():
                release(model)
        return figures

    def configure_optimizers(self) -> Any:
        """Optimise what requires gradients."""
        return build_optimizer(self.named_parameters(), self.run.optim, num_steps=self.run.trainer.max_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Re-key optimizer state by module order; FSDP cannot load it otherwise."""
        if checkpoint.get("optimizer_states") and not self.is_sharded:
            (state,), (optimizer,) = checkpoint["optimizer_states"], self.trainer.optimizers
            checkpoint["optimizer_states"] = [numbered_by_module(state, optimizer, self)]

    def _counts(self, rank_batch: RankBatch) -> dict[str, int]:
        """Return what is added up over ranks in a step."""
        return {
            "num_items": sum(map(self.num_items, rank_batch.micro_batches)),
            "num_samples": len(rank_batch.ids) + len(rank_batch.bad_records),
            "num_bad": len(rank_batch.bad_records),
            "stop": int(self.stop_requested),
        }

    def _gradients_stay_local(self) -> AbstractContextManager[Any]:
        """Let DDP add up the gradients of all micro-batches before ranks exchange them."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()

    def _update(self) -> float:
        """Apply the gradients if they are finite, and clear them; returns their norm before clipping.

        A step with non-finite gradients changes no weight but counts, so that its samples are not used again.
        """
        optimizer: Any = self.optimizers()  # the only one
        schedule: Any = self.lr_schedulers()
        norm = clip_gradients(optimizer, max_norm=self.run.optim.max_grad_norm)
        if not math.isfinite(norm):
            optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        return norm

    def _log(self, metrics: list[Figures]) -> None:
        """Log figures over all steps since the last point, and over all ranks, at Lightning's logging steps.

        Only these steps wait for the GPU. After a resume the first point covers the steps since then.
        """
        self._since_point += metrics
        if self.trainer._results is not None:  # noqa: SLF001 - it would log what has no new value again
            self.trainer._results.reset()  # noqa: SLF001
        if not self._is_point(self.trainer.global_step):
            return
        here = combine(self._since_point)
        self._since_point.clear()
        for name, value in self.logged(combine(self.ranks.gather(here))).items():
            self.log(name, value, prog_bar=name == f"{self.name}/loss", batch_size=1)

    def _is_point(self, step: int) -> bool:
        return not step % self.trainer.log_every_n_steps  # type: ignore[attr-defined]


def prepare_blocks(model: VisionLanguageModel, run: RunSettings) -> VisionLanguageModel:
    """Choose the attention kernel and compile blocks, as the recipe says."""
    set_packed_attention(model.language, run.model.attention)
    for network in (model.vision, model.language) if run.trainer.compile else ():
        compile_blocks(network)
    return model
