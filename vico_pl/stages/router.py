"""Stage 2: train the resolution router, with all else frozen, to say which tiles can be compressed.

Its labels come from loss ratios: how compressing a tile changes the loss of its sample (InternVL3.5 report,
equations 8 and 9).
"""

import math
from collections.abc import Iterator
from itertools import chain
from operator import itemgetter

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from vico_pl.losses.consistency import consistency_kl
from vico_pl.model.blocks import release
from vico_pl.model.connector import FULL_RATIO
from vico_pl.model.dropout import set_keys, tile_keys
from vico_pl.model.flops import ModelFlops
from vico_pl.model.reference import FrozenReference
from vico_pl.model.router import at_thresholds, routing_scores
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.stages.base import Stage, StepResult, prepare_blocks
from vico_pl.stages.cost import Parts, SampleCounts, forward_parts
from vico_pl.stages.figures import Figures, Mean
from vico_pl.stages.labels import (
    RouterConfig,
    SlidingWindow,
    router_targets,
    soft_targets,
    tile_loss_ratios,
)
from vico_pl.stages.settings import DTYPES, RunSettings, section_of
from vico_pl.types import Batch

THRESHOLDS = (0.3, 0.5, 0.7)  # of P(compress), at which tokens and loss are validated
KEPT_BYTES = 2**30  # of patch features between the labels of micro-batches and training on them


class RouterStage(Stage):
    """Trains the router on labels made from loss ratios of the policy, which stays frozen otherwise."""

    name = "router"
    next_step = "vico calibrate {model} --data SHARDS, with held-out shards"
    trains_parts = False
    charts = {  # noqa: RUF012
        "AUROC: the router learns its labels": ["val/.*/auroc", "router/auroc"],
        "score of answers to held-out questions": ["val/.*/score_.*"],
        "KL on held-out data by threshold": ["val/.*/kl_at_.*"],
        "vision tokens on held-out data by threshold": ["val/.*/token_fraction_at_.*"],
        "calibration error and Brier score": ["val/.*/calibration_error", "val/.*/brier"],
        "threshold of labels: settles as the window fills": ["router/threshold.*"],
    }

    def __init__(self, run: RunSettings, model: VisionLanguageModel, reference: FrozenReference) -> None:
        super().__init__(run, model, reference)
        if model.router is None:
            raise ValueError("the model has no router; set model.router_heads")
        self.policy, self.config = FrozenReference(model), section_of(run, RouterConfig)
        self.router, self.coarser = model.router.requires_grad_(), model.ratios[:0:-1]
        self.window = SlidingWindow(self.config, num_coarser=len(self.coarser))
        self._loss_ratios: dict[tuple[int, ...], Tensor] = {}  # of validation tiles, which never change

    @classmethod
    def doubtful_settings(cls, run: RunSettings) -> Iterator[str]:
        """Yield settings without effect, or probably mistaken."""
        yield from super().doubtful_settings(run)
        given, default = section_of(run, RouterConfig), RouterConfig()
        of_rules = {"percentile": ("percentile", "window", "min_history"), "tolerance": ("tolerance",)}
        for rule in of_rules.keys() - {given.label_rule}:
            for name in (name for name in of_rules[rule] if getattr(given, name) != getattr(default, name)):
                yield f"router.{name} has no effect: router.label_rule is {given.label_rule}"

    @classmethod
    def prepare(cls, model: VisionLanguageModel, run: RunSettings) -> VisionLanguageModel:
        """Cast the router, freeze all else and set how blocks run."""
        model.requires_grad_(requires_grad=False)  # before the reference looks for frozen parts to use
        if model.router is not None:
            model.router.to(DTYPES[run.model.dtype])
        return prepare_blocks(model, run)

    @classmethod
    def cost_parts(cls, run: RunSettings, flops: ModelFlops, sample: SampleCounts) -> Parts:
        """Count both models at full tokens, the policy with tiles compressed by each ratio, and the router.

        Label mode `tile` runs a branch per tile over what follows it: half of the sample's tokens on average.
        Each comparison of policy and reference multiplies by both heads.
        """
        num_tiles, head = sum(sample.tiles.values()), sample.response_tokens * flops.head_per_token
        forward = forward_parts(flops, {FULL_RATIO: num_tiles}, sample.text_tokens)
        once, coarser = sum(forward.values()), run.model.ratios[1:]
        if section_of(run, RouterConfig).label_mode == "tile":
            compressed = num_tiles * (once - forward["vision"]) / 2 + 2 * num_tiles * head
            compressed *= len(coarser)
        else:
            passes = [forward_parts(flops, {ratio: num_tiles}, sample.text_tokens) for ratio in coarser]
            compressed = sum(coarse["connectors"] + coarse["language"] + 2 * head for coarse in passes)
        return {
            "reference": once + head,
            "policy at full tokens": once + 2 * head,
            "policy with tiles compressed": compressed,
            "router": 3 * num_tiles * flops.router_per_tile,
        }

    def num_items(self, batch: Batch) -> int:
        """Return the number of tiles in the loss: those of the dummy sample do not count."""
        return len(batch.sample_tiles)

    def results(self, micro_batches: list[Batch]) -> Iterator[StepResult]:
        """Label the tiles of all micro-batches of all ranks, then classify those of each micro-batch.

        Patch features are kept for as many micro-batches as `KEPT_BYTES` allow, the same number on each rank;
        those of the others are computed twice.
        """
        vision = self.policy.model.vision
        largest = 4 * self.run.data.micro_batch.max_tiles * vision.num_patches * vision.width  # in float32
        seen: list[tuple[Tensor | None, Tensor]] = []
        for number, batch in enumerate(micro_batches):
            features, ratios = self._look(batch)
            seen.append((features if number < KEPT_BYTES // largest else None, ratios))
            del features
        self._remember(micro_batches, [ratios for _, ratios in seen])
        thresholds = self.window.thresholds()
        for batch in micro_batches:
            kept, ratios = seen.pop(0)
            yield self._classify(batch, self._encode(batch) if kept is None else kept, ratios, thresholds)

    def validate(self, batch: Batch, *, place: tuple[int, ...]) -> Figures:
        """Return what the router says of each tile, its loss ratio, and tokens and loss when it is obeyed.

        Policy and reference are frozen: loss ratios are computed at the first validation and kept.
        """
        model, tiles = self.policy.model, batch.sample_tiles
        if place in self._loss_ratios:
            features = model.encode_tiles(batch.tiles)
        else:
            features, loss_ratios = self._look(batch)
            self._loss_ratios[place] = loss_ratios[tiles].cpu()
        logits, target = self.router(features), self.reference.response_states(batch)
        scores, figures = routing_scores(logits), dict[str, Mean | Tensor]()
        for threshold in THRESHOLDS:
            (ratios,) = at_thresholds([scores], [threshold], ratios=model.ratios)
            states = model.response_states(batch, features, ratios)
            kl = consistency_kl(states, model.head, target, self.reference.head)
            figures[f"kl_at_{threshold}"] = Mean(kl.sum(), len(kl))
            fractions = model.ratios[0] / ratios[tiles]
            figures[f"token_fraction_at_{threshold}"] = Mean(fractions.sum(), len(tiles))
        said = {"scores": scores[tiles, -1].cpu(), "chosen": logits[tiles].argmax(-1).cpu()}
        return {**figures, **said, "loss_ratios": self._loss_ratios[place]}

    def compressed_ratios(self, features: Float[Tensor, "t P C"]) -> dict[str, Int64[Tensor, " t"]]:
        """Compress the tiles of which the router finds that more probable."""
        scores = routing_scores(self.router(features)).cpu()
        return {"routed": at_thresholds([scores], [0.5], ratios=self.policy.model.ratios)[0]}

    def summary(self, figures: Figures) -> dict[str, float]:
        """Compare the router with the labels of the whole set: a percentile is that of the set."""
        values, chosen, ratios = (figures[name] for name in ("scores", "chosen", "loss_ratios"))
        assert isinstance(values, Tensor)
        assert isinstance(chosen, Tensor)
        assert isinstance(ratios, Tensor)
        found, finite = super().summary(figures), ratios.isfinite().all(1)
        keep, ratios = 1 - values[finite], ratios[finite]
        if not len(keep):
            return found
        targets = router_targets(ratios, self.config.thresholds(ratios))
        kept = (targets == len(self.coarser)).long()
        found |= {
            "accuracy": float((chosen[finite] == targets).float().mean()),
            "calibration_error": float(binary_calibration_error(keep, kept)),
            "brier": float((keep - kept).square().mean()),
            "compressed_fraction": float((keep <= 0.5).float().mean()),
        }
        if len(kept.unique()) == 2:
            found["auroc"] = float(binary_auroc(keep, kept))
        return found

    def logged(self, figures: Figures) -> dict[str, float]:
        """Add the AUROC over all tiles since the last point."""
        keep, targets = figures.get("keep"), figures.get("targets")
        found = super().logged(figures)
        if isinstance(keep, Tensor) and isinstance(targets, Tensor) and len(targets.unique()) == 2:
            found["router/auroc"] = float(binary_auroc(keep, targets))
        return found

    @torch.no_grad()
    def _look(self, batch: Batch) -> tuple[Float[Tensor, "T P C"], Float[Tensor, "T J"]]:
        """Return the patch features and the loss ratios of every tile."""
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

    @torch.no_grad()
    def _encode(self, batch: Batch) -> Float[Tensor, "T P C"]:
        features = self.policy.model.encode_tiles(batch.tiles)
        release(self.policy.model)
        return features

    def _most_groups(self, number: int) -> int:
        """Return the largest number of branch groups of any rank: with sharded weights all run as many."""
        return self.ranks.largest(number) if self.is_sharded else number

    def _remember(self, micro_batches: list[Batch], ratios: list[Tensor]) -> None:
        """Add the finite loss ratios of all ranks to the window, in sample order: the same on each."""
        here = [
            (position, of_tile)
            for micro_batch, values in zip(micro_batches, ratios, strict=True)
            for position, of_tile in zip(micro_batch.tile_positions, values.tolist(), strict=True)
            if position >= 0
        ]
        everywhere = sorted(chain.from_iterable(self.ranks.gather(here)), key=itemgetter(0))
        finite = [of_tile for _, of_tile in everywhere if all(map(math.isfinite, of_tile))]
        self.num_left_out = len(everywhere) - len(finite)
        if self.config.label_rule == "percentile":
            self.window.update(ratios[0].new_tensor(finite))

    def _classify(
        self, batch: Batch, features: Tensor, ratios: Tensor, thresholds: list[float] | None
    ) -> StepResult:
        set_keys(self.router, tile_keys(batch, seed=self.run.seed))
        logits = self.router(features)
        if thresholds is None:
            return StepResult(loss_sum=0 * logits.sum(), num_items=0)
        tiles = torch.tensor(batch.sample_tiles, dtype=torch.int64, device=logits.device)
        if self.num_left_out:
            tiles = tiles[ratios[tiles].isfinite().all(1)]
        logits, ratios = logits[tiles], ratios[tiles]
        targets, softness = router_targets(ratios, thresholds), self.config.label_softness
        soft = soft_targets(ratios, thresholds, softness=softness).to(logits.dtype) if softness else targets
        loss = cross_entropy(logits, soft, reduction="sum")
        chosen, count, keep = logits.argmax(-1), len(targets), len(self.coarser)
        fractions = targets.new_tensor([*self.coarser, FULL_RATIO])[chosen].reciprocal() * FULL_RATIO
        # One threshold has no name of its own.
        names = [f"_{ratio}" for ratio in self.coarser] if keep > 1 else [""]
        metrics = {
            **{f"router/threshold{n}": Mean(value, 1) for n, value in zip(names, thresholds, strict=True)},
            "router/accuracy": Mean((chosen == targets).sum(), count),
            "router/compressed_fraction": Mean((chosen != keep).sum(), count),
            "router/token_fraction": Mean(fractions.sum(), count),
            "router/label_keep_fraction": Mean((targets == keep).sum(), count),
            "keep": logits.detach().softmax(-1)[:, keep],
            "targets": (targets == keep).long(),
        }
        return StepResult(loss_sum=loss, metrics=metrics, num_items=count)
