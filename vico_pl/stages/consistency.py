"""Stage 1: train the policy to answer at any compression ratio as the reference does at full tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vico_pl.errors import check_settings
from vico_pl.losses.consistency import check_liger, consistency_kl, liger_kl_sum
from vico_pl.losses.cross_entropy import response_cross_entropy
from vico_pl.model.blocks import release
from vico_pl.model.connector import FULL_RATIO
from vico_pl.model.flops import ModelFlops
from vico_pl.model.reference import FrozenReference
from vico_pl.model.router import choose_ratios
from vico_pl.model.vision import switched
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.stages.base import ModelSource, Stage, StepResult
from vico_pl.stages.cost import Parts, SampleCounts, forward_parts
from vico_pl.stages.figures import Figures, Mean, grouped
from vico_pl.stages.settings import RunSettings, section_of
from vico_pl.types import Batch

RATIO_DRAWS = ("image", "tile", "mixed", "full", "routed")


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Settings of stage 1."""

    # One ratio per image (the report), per tile, mixed (either with probability 1/2), full tokens only, or
    # routed: as the calibrated router of model.path chooses, which stays frozen (stage 3).
    ratio_draw: str = "mixed"
    # Weight w from 0 to 1: the loss is (1 - w) KL + w cross-entropy of the data's responses, for ablation.
    cross_entropy: float = 0.0
    temperature: float = 1.0  # of both softmaxes
    reverse_kl: bool = False  # KL(policy || reference) instead, for ablation
    kernel: str = "native"  # of the loss: native, or liger (CUDA, needs the liger-kernel package)
    chunk_size: int = 256  # native: response tokens whose logits exist at a time

    def __post_init__(self) -> None:
        check_settings(
            "consistency",
            self,
            ratio_draw=(self.ratio_draw in RATIO_DRAWS, f"one of {', '.join(RATIO_DRAWS)}"),
            cross_entropy=(0 <= self.cross_entropy <= 1, "0 to 1"),
            temperature=(self.temperature > 0, "more than 0"),
            kernel=(self.kernel in ("native", "liger"), "native or liger"),
            chunk_size=(self.chunk_size >= 1, "1 or more"),
        )


class ConsistencyStage(Stage):
    """Minimises KL(reference at full tokens || policy at sampled ratios) over the response."""

    name = "consistency"
    next_step = "vico train RECIPE model.path={model} model.reference={reference}, with one of stage router"
    draws_ratios = True
    charts = {  # noqa: RUF012
        "KL on held-out data: compressing becomes cheaper": ["val/.*/kl(_ratio_.*|_routed)?$"],
        "score of answers to held-out questions": ["val/.*/score_.*"],
        "KL by compression ratio": ["consistency/kl_ratio_.*"],
        "KL by source": ["consistency/kl_source_.*"],
    }
    strict_loading = False  # checkpoints leave out frozen weights of the model folder

    def __init__(self, run: RunSettings, model: VisionLanguageModel, reference: FrozenReference) -> None:
        super().__init__(run, model, reference)
        if model.router is not None:
            model.router.requires_grad_(requires_grad=False)
        self.model, self.config = model, section_of(run, ConsistencyConfig)

    @classmethod
    def doubtful_settings(cls, run: RunSettings) -> Iterator[str]:
        """Yield settings without effect, or probably mistaken."""
        yield from super().doubtful_settings(run)
        settings = section_of(run, ConsistencyConfig)
        if settings.kernel == "liger" and settings.chunk_size != ConsistencyConfig().chunk_size:
            yield "consistency.chunk_size has no effect: kernel liger chooses how many logits exist at a time"
        default = ConsistencyConfig()
        for name in ("temperature", "reverse_kl", "kernel") if settings.cross_entropy == 1 else ():
            if getattr(settings, name) != getattr(default, name):
                yield f"consistency.{name} has no effect: the loss is cross-entropy alone"

    @classmethod
    def what_next(cls, run: RunSettings) -> str:
        """Calibrate again after stage 3: the threshold was chosen for the weights before it."""
        routed = section_of(run, ConsistencyConfig).ratio_draw == "routed"
        return "vico calibrate {model} --data SHARDS, with held-out shards" if routed else cls.next_step

    @classmethod
    def build(cls, run: RunSettings, source: ModelSource) -> Stage:
        """Build the stage for a run, in stage 3 with the rule by which the policy's tiles are routed."""
        is_routed = section_of(run, ConsistencyConfig).ratio_draw == "routed"
        rule = source.rule() if is_routed else None
        if is_routed and rule is None:
            needs = "consistency.ratio_draw is 'routed', which needs a calibrated router"
            raise ValueError(f"{run.model.path}: {needs}; run 'vico calibrate' on a model of stage router")
        stage = super().build(run, source)
        stage.rule = rule
        return stage

    @classmethod
    def check_device(cls, run: RunSettings, device: torch.device) -> None:
        """Reject a device that the loss kernel cannot run on."""
        super().check_device(run, device)
        if section_of(run, ConsistencyConfig).kernel == "liger":
            check_liger(device)

    @classmethod
    def ratios_at(cls, run: RunSettings, position: int, tiles_per_image: Sequence[int]) -> Sequence[int]:
        """Draw a ratio, uniformly, for each tile of the sample at a position, as `ratio_draw` says.

        With `routed` they are not known before the tiles are encoded: full tokens, the most that it can be.
        """
        mode = section_of(run, ConsistencyConfig).ratio_draw
        return drawn_ratios(run.model.ratios, tiles_per_image, mode=mode, seed=run.seed, position=position)

    @classmethod
    def cost_parts(cls, run: RunSettings, flops: ModelFlops, sample: SampleCounts) -> Parts:
        """Add a forward pass of the reference, which uses the features of a policy with the same tower."""
        reference = forward_parts(flops, {FULL_RATIO: sum(sample.tiles.values())}, sample.text_tokens)
        same_weights = run.model.reference in (None, run.model.path)
        if same_weights and "vision" not in run.model.trainable and run.trainer.strategy != "fsdp":
            reference["vision"] = 0.0
        head = sample.response_tokens * flops.head_per_token
        return {**super().cost_parts(run, flops, sample), "reference": sum(reference.values()) + head}

    def step(self, batch: Batch) -> StepResult:
        """Compare policy and reference on response tokens, of which both have the same number."""
        features = self.model.encode_tiles(batch.tiles)
        ratios = self.draw_ratios(batch, features)
        policy = self.model.response_states(batch, features, ratios)
        reference = self.reference.response_states(batch, policy_features=features)
        kl = self._divergence(policy, reference)
        release(self.reference.model)
        metrics = {"vision_tokens/fraction": Mean((self.model.ratios[0] / ratios).sum(), batch.num_tiles)}
        if kl.ndim:  # per token
            for names in (self._ratio_names(batch), self.sources(batch, "consistency/kl")):
                metrics |= grouped(names, kl, batch.response_lengths)
        loss, terms = self._loss(kl.sum(), policy, batch)
        return StepResult(loss_sum=loss, metrics=metrics | terms)

    def validate(self, batch: Batch, *, place: tuple[int, ...]) -> Figures:
        """Return the KL with every tile at each ratio, and at ratios drawn for each tile; routed, if it is.

        These draws depend on the sample alone, not on the recipe, so that runs can be compared.
        """
        samples, ratios = zip(batch.positions, batch.tiles_per_image, strict=True), self.model.ratios
        draw = partial(drawn_ratios, ratios, mode="tile", seed=0)
        drawn = batch.tile_to_sample.new_tensor([r for p, tiles in samples for r in draw(tiles, position=p)])
        features = self.model.encode_tiles(batch.tiles)
        reference = self.reference.response_states(batch, policy_features=features)

        def loss(ratios: Tensor) -> Mean:
            policy = self.model.response_states(batch, features, ratios)
            return Mean(self._divergence(policy, reference).sum(), batch.num_response_tokens)

        choices = (
            {"": drawn} if self.rule is None else {"": drawn, "_routed": self.draw_ratios(batch, features)}
        )
        figures = {f"kl_ratio_{ratio}": loss(torch.full_like(drawn, ratio)) for ratio in ratios}
        for name, chosen in choices.items():
            fractions = ratios[0] / chosen[batch.sample_tiles]
            figures[f"kl{name}"] = loss(chosen)
            figures[f"vision_token_fraction{name}"] = Mean(fractions.sum(), len(fractions))
        return figures

    def compressed_ratios(self, features: Float[Tensor, "t P C"]) -> dict[str, Int64[Tensor, " t"]]:
        """Compress every tile, by each ratio; or as the router chooses, if it does in training."""
        found = {f"ratio_{ratio}": torch.full((len(features),), ratio) for ratio in self.model.ratios[1:]}
        return (
            found if self.rule is None else {**found, "routed": self._routed(features, [len(features)]).cpu()}
        )

    def draw_ratios(
        self, batch: Batch, features: Float[Tensor, "T P C"] | None = None
    ) -> Int64[Tensor, " T"]:
        """Draw a ratio for each tile of a batch; the draw of a sample does not depend on the others.

        Draw `routed` needs the policy's patch features of the tiles.
        """
        if self.rule is not None:
            assert features is not None
            return self._routed(features, [sum(tiles) for tiles in batch.tiles_per_image])
        drawn = [ratio for ratios in self._ratios_per_sample(batch) for ratio in ratios]
        return torch.tensor(drawn, dtype=torch.int64).to(batch.tiles.device, non_blocking=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out frozen weights that the model folder holds: with adapters, most of a checkpoint."""
        super().on_save_checkpoint(checkpoint)
        for name in self._frozen_names():
            checkpoint["state_dict"].pop(name, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add them from the model as it was read; sharded weights load without them."""
        if self.is_sharded:
            return
        own = self.state_dict()
        checkpoint["state_dict"].update({name: own[name] for name in self._frozen_names()})

    def _divergence(self, policy: Float[Tensor, "R D"], reference: Float[Tensor, "R D2"]) -> Tensor:
        """Return the loss of each response token, or from kernel liger their sum."""
        sides, config = (policy, self.model.head, reference, self.reference.head), self.config
        settings: dict[str, Any] = {"temperature": config.temperature, "reverse": config.reverse_kl}
        if config.kernel == "liger":
            return liger_kl_sum(*sides, **settings)
        return consistency_kl(*sides, **settings, chunk_size=config.chunk_size)

    def _loss(self, kl: Tensor, policy: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Mean]]:
        """Return the loss from the sum of the KL, and its terms if there are two."""
        weight = self.config.cross_entropy
        if not weight:
            return kl, {}
        targets, chunk_size = batch.input_ids[batch.response_mask], self.config.chunk_size
        of_data = response_cross_entropy(policy, self.model.head, targets, chunk_size=chunk_size)[0].sum()
        sums = {"consistency/kl": kl, "consistency/cross_entropy": of_data}
        terms = {name: Mean(value.detach(), batch.num_response_tokens) for name, value in sums.items()}
        return (1 - weight) * kl + weight * of_data, terms

    @torch.no_grad()
    def _routed(self, features: Float[Tensor, "T P C"], lengths: list[int]) -> Int64[Tensor, " T"]:
        """Return the router's choice for samples of so many tiles, as in inference: without dropout."""
        assert self.model.router is not None
        assert self.rule is not None
        with switched(self.model.router.modules(), "training", to=False):
            logits = self.model.router(features).float()
        choose = partial(choose_ratios, ratios=self.model.ratios, rule=self.rule)
        return torch.cat([choose(of_sample) for of_sample in logits.split(lengths)])

    def _ratios_per_sample(self, batch: Batch) -> list[Sequence[int]]:
        samples = zip(batch.positions, batch.tiles_per_image, strict=True)
        return [self.ratios_at(self.run, *sample) for sample in samples]

    def _ratio_names(self, batch: Batch) -> list[str | None]:
        """Return for each sample the metric of its ratio; not all of its tiles may have the same."""
        if self.rule is not None:  # known on the device only
            return [None] * batch.num_samples
        sets = map(set, self._ratios_per_sample(batch))
        return [f"consistency/kl_ratio_{found.pop() if len(found) == 1 else 'mixed'}" for found in sets]

    def _frozen_names(self) -> list[str]:
        """Return the frozen weights of parts that every folder has, unlike connectors that were added."""
        parameters = self.model.named_parameters(prefix="model", remove_duplicate=False)
        always = ("model.vision.", "model.language.")
        return [name for name, p in parameters if name.startswith(always) and not p.requires_grad]


def drawn_ratios(
    ratios: Sequence[int], tiles_per_image: Sequence[int], *, mode: str, seed: int, position: int
) -> list[int]:
    """Draw a ratio for each tile of the sample at a position, one of `RATIO_DRAWS`.

    >>> drawn_ratios([4, 16], [3, 2], mode="image", seed=0, position=1)
    [16, 16, 16, 4, 4]
    """
    if mode in ("full", "routed"):
        return [ratios[0]] * sum(tiles_per_image)
    chance = np.random.default_rng([seed, position + 1])  # + 1: the dummy's position is -1
    drawn: list[int] = []
    for num_tiles in tiles_per_image:
        tilewise = mode == "tile" or (mode == "mixed" and chance.random() < 0.5)
        choices = chance.integers(len(ratios), size=num_tiles if tilewise else 1).tolist()
        drawn += [ratios[choice] for choice in choices] * (1 if tilewise else num_tiles)
    return drawn
