"""Stage 1: make the policy answer at any compression ratio as the frozen reference does at full tokens."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from vico_pl.losses.consistency import consistency_kl
from vico_pl.model.reference import FrozenReference
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.optim import OptimConfig
from vico_pl.stages.base import Stage, StepResult
from vico_pl.types import Batch


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Settings of stage 1."""

    ratio_draw: str = "mixed"  # one ratio per image (the report), per tile, or either with probability 1/2
    temperature: float = 1.0
    reverse_kl: bool = False  # KL(policy || reference) instead, for ablation
    chunk_size: int = 256  # response tokens whose logits exist at a time

    def __post_init__(self) -> None:
        """Refuse what the stage cannot do."""
        if self.ratio_draw not in ("image", "tile", "mixed"):
            raise ValueError(f"consistency.ratio_draw is '{self.ratio_draw}'; expected image, tile or mixed")
        if self.temperature <= 0:
            raise ValueError(f"consistency.temperature is {self.temperature}; expected more than 0")
        if self.chunk_size < 1:
            raise ValueError(f"consistency.chunk_size is {self.chunk_size}; expected 1 or more")


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

    def step(self, batch: Batch) -> StepResult:
        """Compare policy and reference on the response tokens, where sequence lengths do not matter."""
        mode, generator = self.config.ratio_draw, self._generator()
        ratios = draw_ratios(batch, self.model.ratios, mode=mode, generator=generator)
        policy = self.model.response_states(batch, self.model.encode_tiles(batch.tiles), ratios)
        reference = self.reference.response_states(batch)
        kl = consistency_kl(
            policy,
            self.model.head,
            reference,
            self.reference.head,
            temperature=self.config.temperature,
            reverse=self.config.reverse_kl,
            chunk_size=self.config.chunk_size,
        )
        return StepResult(loss_sum=kl.sum(), count=len(kl), metrics=_metrics(ratios, self.model.ratios[0]))

    def trained_model(self) -> VisionLanguageModel:
        """Return the policy."""
        return self.model

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is as the model folder has it: beside adapters, most of every checkpoint."""
        for name in self._as_in_the_folder():
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put it back, from the model that was read again."""
        own = self.state_dict()
        checkpoint["state_dict"].update({name: own[name] for name in self._as_in_the_folder()})

    def _as_in_the_folder(self) -> list[str]:
        """Name the frozen weights of the parts that a folder always has; fresh connectors it has not."""
        parameters = self.model.named_parameters(prefix="model", remove_duplicate=False)
        always = ("model.vision.", "model.language.")
        return [name for name, p in parameters if name.startswith(always) and not p.requires_grad]

    def _generator(self) -> torch.Generator:
        """Make the draw a function of (seed, step, rank): a resumed run draws what an unbroken one would."""
        entropy = [self.seed, self.trainer.global_step, self.trainer.global_rank]
        return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


def draw_ratios(
    batch: Batch, ratios: list[int], *, mode: str, generator: torch.Generator
) -> Int64[Tensor, " T"]:
    """Draw a ratio for each tile, all ratios alike; `image` gives all tiles of an image the same one."""
    choices = torch.tensor(ratios)
    num_tiles, images = batch.num_tiles, batch.tile_to_image.cpu()
    num_images = int(images[-1]) + 1 if num_tiles else 0
    per_tile = choices[torch.randint(len(ratios), (num_tiles,), generator=generator)]
    per_image = choices[torch.randint(len(ratios), (num_images,), generator=generator)][images]
    tilewise = {"tile": torch.ones(num_images), "image": torch.zeros(num_images)}.get(mode)
    if tilewise is None:
        tilewise = torch.randint(2, (num_images,), generator=generator)
    return torch.where(tilewise.bool()[images], per_tile, per_image).to(batch.tile_to_image.device)


def _metrics(ratios: Tensor, full_ratio: int) -> dict[str, Tensor | float]:
    if len(ratios) == 0:  # a batch of text alone
        return {}
    return {"vision_tokens/fraction": (full_ratio / ratios).mean()}
