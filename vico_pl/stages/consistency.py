"""Stage 1: make the policy answer at any compression ratio as the frozen reference does at full tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vico_pl.losses.consistency import consistency_kl
from vico_pl.losses.liger import liger_kl_sum
from vico_pl.model.reference import FrozenReference
from vico_pl.model.sharding import release
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.optim import OptimConfig
from vico_pl.stages.base import Mean, Stage, StepResult
from vico_pl.types import Batch


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Settings of stage 1."""

    ratio_draw: str = "mixed"  # one ratio per image (the report), per tile, or either with probability 1/2
    temperature: float = 1.0
    reverse_kl: bool = False  # KL(policy || reference) instead, for ablation
    # What computes the loss: native, or liger (on CUDA, by the liger-kernel package).
    kernel: str = "native"
    chunk_size: int = 256  # native: response tokens whose logits exist at a time
    # Folder where the reference's states are kept, so that later epochs and runs need not compute them again.
    reference_cache: str | None = None
    reference_cache_gib: float = 100.0  # what the folder may hold; when it does, no more is kept

    def __post_init__(self) -> None:
        """Refuse what the stage cannot do."""
        if self.ratio_draw not in ("image", "tile", "mixed"):
            raise ValueError(f"consistency.ratio_draw is '{self.ratio_draw}'; expected image, tile or mixed")
        if self.temperature <= 0:
            raise ValueError(f"consistency.temperature is {self.temperature}; expected more than 0")
        if self.kernel not in ("native", "liger"):
            raise ValueError(f"consistency.kernel is '{self.kernel}'; expected native or liger")
        if self.chunk_size < 1:
            raise ValueError(f"consistency.chunk_size is {self.chunk_size}; expected 1 or more")
        if self.reference_cache_gib <= 0:
            given = f"consistency.reference_cache_gib is {self.reference_cache_gib}"
            raise ValueError(f"{given}; expected more than 0")


class ConsistencyStage(Stage):
    """Minimises KL(reference at full tokens || policy at sampled ratios) over the response."""

    area = "consistency"

    def __init__(
        self,
        model: VisionLanguageModel,
        reference: FrozenReference,
        config: ConsistencyConfig,
        optim: OptimConfig,
        *,
        num_steps: int,
        seed: int,
    ) -> None:
        """Train the parameters of `model` that require gradients, the router's excepted: it takes no part."""
        super().__init__(optim, num_steps=num_steps)
        if model.router is not None:
            model.router.requires_grad_(requires_grad=False)
        self.model, self.reference, self.config, self.seed = model, reference, config, seed
        self.strict_loading = False  # checkpoints leave out what the model folder has

    def step(self, batch: Batch) -> StepResult:
        """Compare policy and reference on the response tokens, where sequence lengths do not matter."""
        ratios = draw_ratios(batch, self.model.ratios, mode=self.config.ratio_draw, seed=self.seed)
        features = self.model.encode_tiles(batch.tiles)
        policy = self.model.response_states(batch, features, ratios)
        reference = self.reference.response_states(batch, policy_features=features)
        loss_sum = self._divergence(policy, reference)
        release(self.reference.model)
        fraction = Mean((self.model.ratios[0] / ratios).sum(), batch.num_tiles)
        metrics = {"vision_tokens/fraction": fraction, **self._cache_metrics()}
        return StepResult(loss_sum=loss_sum, metrics=metrics)

    def trained_model(self) -> VisionLanguageModel:
        """Return the policy."""
        return self.model

    def sharded_models(self) -> list[VisionLanguageModel]:
        """Return policy and reference."""
        return [self.model, self.reference.model]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is as the model folder has it: beside adapters, most of every checkpoint."""
        super().on_save_checkpoint(checkpoint)
        for name in self._as_in_the_folder():
            checkpoint["state_dict"].pop(name, None)  # with sharded weights, ranks but the first have none

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put it back, from the model that was read again; sharded weights were loaded without it."""
        if self.is_sharded:
            return
        own = self.state_dict()
        checkpoint["state_dict"].update({name: own[name] for name in self._as_in_the_folder()})

    def _divergence(self, policy: Float[Tensor, "R D"], reference: Float[Tensor, "R D2"]) -> Tensor:
        """Return the loss, summed over the response tokens."""
        sides, config = (policy, self.model.head, reference, self.reference.head), self.config
        if config.kernel == "liger":
            return liger_kl_sum(*sides, temperature=config.temperature, reverse=config.reverse_kl)
        kl = consistency_kl(
            *sides, temperature=config.temperature, reverse=config.reverse_kl, chunk_size=config.chunk_size
        )
        return kl.sum()

    def _cache_metrics(self) -> dict[str, Mean]:
        """Say whether the last micro-batch's states of the reference were in the cache, if it has one."""
        cache = self.reference.cache
        if cache is None or cache.served is None:
            return {}
        return {"reference_cache/hit": Mean(float(cache.served), 1)}

    def _as_in_the_folder(self) -> list[str]:
        """Name the frozen weights of the parts that a folder always has; fresh connectors it has not."""
        parameters = self.model.named_parameters(prefix="model", remove_duplicate=False)
        always = ("model.vision.", "model.language.")
        return [name for name, p in parameters if name.startswith(always) and not p.requires_grad]


def draw_ratios(batch: Batch, ratios: Sequence[int], *, mode: str, seed: int) -> Int64[Tensor, " T"]:
    """Draw a ratio for each tile of a batch; those of a sample do not depend on the others."""
    drawn = [
        ratio
        for position, tiles_per_image in zip(batch.positions, batch.tiles_per_image, strict=True)
        for ratio in draw_sample_ratios(position, tiles_per_image, ratios=ratios, mode=mode, seed=seed)
    ]
    return torch.tensor(drawn, dtype=torch.int64).to(batch.tiles.device, non_blocking=True)


def draw_sample_ratios(
    position: int, tiles_per_image: Sequence[int], *, ratios: Sequence[int], mode: str, seed: int
) -> list[int]:
    """Draw a ratio for each tile of the sample at a position of the run, all ratios alike.

    `image` gives all tiles of an image the same ratio, `tile` each its own, `mixed` does either with
    probability 1/2 for each image.
    """
    chance = np.random.default_rng([seed, position + 1])  # + 1: the dummy's position is -1
    drawn: list[int] = []
    for num_tiles in tiles_per_image:
        tilewise = mode == "tile" or (mode == "mixed" and chance.random() < 0.5)
        choices = chance.integers(len(ratios), size=num_tiles if tilewise else 1).tolist()
        drawn += [ratios[choice] for choice in choices] * (1 if tilewise else num_tiles)
    return drawn
