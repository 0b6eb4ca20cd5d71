"""Stage 2: train the resolution router, with all else frozen, to say which tiles can be compressed.

Its labels come from loss ratios: how compressing a tile changes the loss of its sample (InternVL3.5 report,
equations 8 and 9).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import binary_accuracy, binary_auroc, binary_calibration_error

from vico_pl.errors import check_settings
from vico_pl.losses.consistency import consistency_kl
from vico_pl.model.blocks import release
from vico_pl.model.branches import branch_states
from vico_pl.model.connector import FULL_RATIO
from vico_pl.model.dropout import set_keys, tile_keys
from vico_pl.model.flops import ModelFlops
from vico_pl.model.reference import FrozenReference
from vico_pl.model.router import at_threshold, compress_probability
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.stages.base import Stage, StepResult, prepare_blocks
from vico_pl.stages.cost import Parts, SampleCounts, forward_parts
from vico_pl.stages.figures import Figures, Mean
from vico_pl.stages.settings import DTYPES, RunSettings, section_of
from vico_pl.types import Batch

COMPRESS, KEEP = 0, 1  # router targets, as in published checkpoints
THRESHOLDS = (0.3, 0.5, 0.7)  # of P(compress), at which tokens and loss are validated
KEPT_BYTES = 2**30  # of patch features between the labels of micro-batches and training on them


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Settings of stage 2."""

    label_mode: str = "tile"  # compress one tile at a time, or all tiles of an image at once (the report)
    percentile: float = 50.0  # of recent loss ratios; tiles below it get the target 0, compress
    window: int = 4096  # number of recent loss ratios
    min_history: int = 256  # loss ratios needed before the first labels
    epsilon: float = 1e-3  # nats, added to both losses of a ratio

    def __post_init__(self) -> None:
        check_settings(
            "router",
            self,
            label_mode=(self.label_mode in ("image", "tile"), "image or tile"),
            percentile=(0 < self.percentile < 100, "between 0 and 100"),
            epsilon=(self.epsilon > 0, "more than 0"),
            min_history=(1 <= self.min_history <= self.window, f"1 to router.window ({self.window})"),
        )


class SlidingPercentile(nn.Module):
    """The k-th percentile of the last `window` loss ratios; the window is part of checkpoints."""

    values: Tensor
    seen: Tensor

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self._config = config
        self.register_buffer("values", torch.zeros(config.window))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def update(self, ratios: Float[Tensor, " n"]) -> None:
        """Add loss ratios, the oldest ones fall out."""
        window = len(self.values)
        recent = ratios.detach().to(self.values)[-window:]
        self.values.copy_(torch.cat([self.values, recent])[-window:])
        self.seen += len(ratios)

    def threshold(self) -> float | None:
        """Return the percentile, or None while fewer than `min_history` ratios were seen."""
        count = min(int(self.seen), len(self.values))
        if count < self._config.min_history:
            return None
        return float(torch.quantile(self.values[-count:].float(), self._config.percentile / 100))


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
        "threshold of labels: settles as the window fills": ["router/threshold"],
    }

    def __init__(self, run: RunSettings, model: VisionLanguageModel, reference: FrozenReference) -> None:
        super().__init__(run, model, reference)
        if model.router is None:
            raise ValueError("the model has no router; set model.router_heads")
        if len(model.ratios) != 2:
            raise ValueError(f"model.ratios is {model.ratios}; stage router labels the choice between two")
        self.policy, self.config = FrozenReference(model), section_of(run, RouterConfig)
        self.router, self.window = model.router.requires_grad_(), SlidingPercentile(self.config)
        self._loss_ratios: dict[tuple[int, ...], Tensor] = {}  # of validation tiles, which never change

    @classmethod
    def prepare(cls, model: VisionLanguageModel, run: RunSettings) -> VisionLanguageModel:
        """Cast the router, freeze all else and set how blocks run."""
        model.requires_grad_(requires_grad=False)  # before the reference looks for frozen parts to use
        if model.router is not None:
            model.router.to(DTYPES[run.model.dtype])
        return prepare_blocks(model, run)

    @classmethod
    def cost_parts(cls, run: RunSettings, flops: ModelFlops, sample: SampleCounts) -> Parts:
        """Count both models at full tokens, the policy with tiles compressed, and the router.

        Label mode `tile` runs a branch per tile over what follows it: half of the sample's tokens on average.
        Each comparison of policy and reference multiplies by both heads.
        """
        num_tiles, head = sum(sample.tiles.values()), sample.response_tokens * flops.head_per_token
        forward = forward_parts(flops, {FULL_RATIO: num_tiles}, sample.text_tokens)
        once = sum(forward.values())
        if section_of(run, RouterConfig).label_mode == "tile":
            compressed = num_tiles * (once - forward["vision"]) / 2 + 2 * num_tiles * head
        else:
            coarse = forward_parts(flops, {run.model.ratios[-1]: num_tiles}, sample.text_tokens)
            compressed = coarse["connectors"] + coarse["language"] + 2 * head
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
        threshold = self.window.threshold()
        for batch in micro_batches:
            kept, ratios = seen.pop(0)
            yield self._classify(batch, self._encode(batch) if kept is None else kept, ratios, threshold)

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
        scores, target = compress_probability(self.router(features)), self.reference.response_states(batch)
        figures: dict[str, Mean | Tensor] = {}
        for threshold in THRESHOLDS:
            (ratios,) = at_threshold([scores], threshold, ratios=model.ratios)
            states = model.response_states(batch, features, ratios)
            kl = consistency_kl(states, model.head, target, self.reference.head)
            figures[f"kl_at_{threshold}"] = Mean(kl.sum(), len(kl))
            fractions = model.ratios[0] / ratios[tiles]
            figures[f"token_fraction_at_{threshold}"] = Mean(fractions.sum(), len(tiles))
        return {**figures, "scores": scores[tiles].cpu(), "loss_ratios": self._loss_ratios[place]}

    def compressed_ratios(self, features: Float[Tensor, "t P C"]) -> dict[str, Int64[Tensor, " t"]]:
        """Compress the tiles of which the router finds that more probable."""
        scores = compress_probability(self.router(features)).cpu()
        return {"routed": at_threshold([scores], 0.5, ratios=self.policy.model.ratios)[0]}

    def summary(self, figures: Figures) -> dict[str, float]:
        """Compare the router with the labels of the whole set: the threshold is its own percentile."""
        values, ratios = (figures[name] for name in ("scores", "loss_ratios"))
        assert isinstance(values, Tensor)
        assert isinstance(ratios, Tensor)
        found, finite = super().summary(figures), ratios.isfinite()
        keep, ratios = 1 - values[finite], ratios[finite]
        if not len(keep):
            return found
        targets = router_targets(ratios, float(torch.quantile(ratios, self.config.percentile / 100)))
        found |= {
            "accuracy": float(binary_accuracy(keep, targets)),
            "calibration_error": float(binary_calibration_error(keep, targets)),
            "brier": float((keep - targets).square().mean()),
            "compressed_fraction": float((keep <= 0.5).float().mean()),
        }
        if len(targets.unique()) == 2:
            found["auroc"] = float(binary_auroc(keep, targets))
        return found

    def logged(self, figures: Figures) -> dict[str, float]:
        """Add the AUROC over all tiles since the last point."""
        keep, targets = figures.get("keep"), figures.get("targets")
        found = super().logged(figures)
        if isinstance(keep, Tensor) and isinstance(targets, Tensor) and len(targets.unique()) == 2:
            found["router/auroc"] = float(binary_auroc(keep, targets))
        return found

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
            (position, ratio)
            for micro_batch, values in zip(micro_batches, ratios, strict=True)
            for position, ratio in zip(micro_batch.tile_positions, values.tolist(), strict=True)
            if position >= 0
        ]
        everywhere = sorted(chain.from_iterable(self.ranks.gather(here)), key=itemgetter(0))
        finite = [ratio for _, ratio in everywhere if math.isfinite(ratio)]
        self.num_left_out = len(everywhere) - len(finite)
        self.window.update(ratios[0].new_tensor(finite))

    def _classify(
        self, batch: Batch, features: Tensor, ratios: Tensor, threshold: float | None
    ) -> StepResult:
        set_keys(self.router, tile_keys(batch, seed=self.run.seed))
        logits = self.router(features)
        if threshold is None:
            return StepResult(loss_sum=0 * logits.sum(), num_items=0)
        tiles = torch.tensor(batch.sample_tiles, dtype=torch.int64, device=logits.device)
        if self.num_left_out:
            tiles = tiles[ratios[tiles].isfinite()]
        logits, targets = logits[tiles], router_targets(ratios[tiles], threshold)
        loss = cross_entropy(logits, targets, reduction="sum")
        chosen, count = logits.argmax(-1), len(targets)
        metrics = {
            "router/threshold": Mean(threshold, 1),
            "router/accuracy": Mean((chosen == targets).sum(), count),
            "router/compressed_fraction": Mean((chosen == COMPRESS).sum(), count),
            "router/label_keep_fraction": Mean(targets.sum(), count),
            "keep": logits.detach().softmax(-1)[:, KEEP],
            "targets": targets,
        }
        return StepResult(loss_sum=loss, metrics=metrics, num_items=count)


@torch.no_grad()
def tile_loss_ratios(
    policy: VisionLanguageModel,
    reference: FrozenReference,
    batch: Batch,
    features: Float[Tensor, "T P C"],
    *,
    mode: str,
    epsilon: float,
    num_groups: Callable[[int], int] = int,
) -> Float[Tensor, " T"]:
    """Return, per tile, the factor by which compressing it raises its sample's loss.

    `mode` is `tile` (one tile at a time) or `image` (all at once); `epsilon`, in nats, is added to both
    losses. Vision encoder and reference run once per sample. The policy's language model runs once at full
    tokens and then, for each tile, over what follows it, in groups of tiles (see `branch_states`).
    """
    target, ratio = reference.response_states(batch), policy.ratios[-1]
    tokens = torch.arange(len(target), device=target.device)
    if mode == "image":
        full_ratios = policy.full_ratios(batch)
        full = policy.response_states(batch, features, full_ratios)
        compressed = policy.response_states(batch, features, torch.full_like(full_ratios, ratio))
        origin = torch.cat([tokens, tokens])
    else:
        found = branch_states(policy, batch, features, ratio=ratio, num_groups=num_groups)
        full, compressed = found.full, found.branches
        origin = torch.cat([tokens, found.response_origin])
    order = origin.argsort(stable=True)  # by token: the reference's logits are computed once for each
    states = torch.cat([full, compressed])[order]
    kl = consistency_kl(states, policy.head, target, reference.head, reference_rows=origin[order])
    kl = torch.empty_like(kl).index_copy_(0, order, kl)
    before, after = kl[: len(tokens)], kl[len(tokens) :]
    if mode == "image":
        losses = mean_per_sample(after, batch)[batch.tile_to_sample]
    else:
        losses = _mean_by(found.response_branch, after, count=batch.num_tiles)
    return loss_ratio(losses, mean_per_sample(before, batch)[batch.tile_to_sample], epsilon=epsilon)


def mean_per_sample(per_token: Float[Tensor, " R"], batch: Batch) -> Float[Tensor, " B"]:
    """Average a value of response tokens over each sample; 0 for a sample without response."""
    samples = torch.arange(batch.num_samples, device=per_token.device)
    owner = samples.repeat_interleave(batch.sample_lengths)[batch.response_mask]
    return _mean_by(owner, per_token, count=batch.num_samples)


def _mean_by(owner: Int64[Tensor, " R"], values: Float[Tensor, " R"], *, count: int) -> Float[Tensor, " _"]:
    total = values.new_zeros(count).index_add_(0, owner, values)
    return total / torch.bincount(owner, minlength=count).clamp(min=1)


def loss_ratio(
    compressed: Float[Tensor, "..."], full: Float[Tensor, "..."], *, epsilon: float
) -> Float[Tensor, "..."]:
    """Return the factor of the loss under compression: (compressed + epsilon) / (full + epsilon), in nats.

    >>> loss_ratio(torch.tensor(0.3), torch.tensor(0.1), epsilon=0.1)
    tensor(2.)
    """
    return (compressed + epsilon) / (full + epsilon)


def router_targets(ratios: Float[Tensor, " T"], threshold: float) -> Int64[Tensor, " T"]:
    """Return 0 (compress) where the loss ratio stays under the threshold, else 1 (keep)."""
    return torch.where(ratios < threshold, COMPRESS, KEEP)
