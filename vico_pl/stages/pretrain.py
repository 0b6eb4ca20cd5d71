"""Stage 0: make the model that ViCO starts from, by predicting responses at full vision tokens."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.stages.base import Stage, StepResult
from vico_pl.stages.figures import Mean, grouped
from vico_pl.stages.settings import RunSettings
from vico_pl.types import Batch


class PretrainStage(Stage):
    """Cross-entropy over response tokens."""

    name = "pretrain"
    next_step = "vico train RECIPE model.path={model}, with a recipe of stage consistency"
    compares = False
    charts = {  # noqa: RUF012
        "loss": ["val/.*/loss", "pretrain/loss"],
        "token accuracy": ["val/.*/token_accuracy", "pretrain/token_accuracy"],
    }

    def __init__(self, run: RunSettings, model: VisionLanguageModel) -> None:
        super().__init__(run, model)
        self.model = model

    def step(self, batch: Batch) -> StepResult:
        """Predict the response tokens."""
        features = self.model.encode_tiles(batch.tiles)
        states = self.model.response_states(batch, features, self.model.full_ratios(batch))
        loss, hits = response_cross_entropy(states, self.model.head, batch.input_ids[batch.response_mask])
        accuracy = Mean(hits.sum(), batch.num_response_tokens)
        by_source = grouped(self.sources(batch, "pretrain/loss"), loss, batch.response_lengths)
        return StepResult(loss_sum=loss.sum(), metrics={"pretrain/token_accuracy": accuracy, **by_source})


def response_cross_entropy(
    states: Float[Tensor, "R D"],
    head: Float[Tensor, "V D"],
    targets: Int64[Tensor, " R"],
    *,
    chunk_size: int = 256,
) -> tuple[Float[Tensor, " R"], Bool[Tensor, " R"]]:
    """Return the loss of each token in nats and whether its most probable word is the target.

    Logits, in float32 or float64, exist for `chunk_size` tokens at a time and are made again going backward.
    """
    results = [
        checkpoint(_chunk, *chunk, head, use_reentrant=False, preserve_rng_state=False)
        # Without tokens there is one empty chunk, so that every parameter takes part on every rank.
        for chunk in zip(states.split(chunk_size), targets.split(chunk_size), strict=True)
    ]
    losses, hits = zip(*results, strict=True)
    return torch.cat(losses), torch.cat(hits)


def _chunk(states: Tensor, targets: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(states.dtype, head.dtype), torch.float32)
    with torch.autocast(states.device.type, enabled=False):
        logits = states.to(dtype) @ head.to(dtype).T
        return cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1) == targets
