"""Stage 0: make the model that ViCO starts from, by predicting responses.

The embedded default's, or one put together from a tower and a language model.
"""

from torch.nn.functional import cross_entropy

from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.optim import OptimConfig
from vico_pl.stages.base import Mean, Stage, StepResult
from vico_pl.types import Batch


class PretrainStage(Stage):
    """Cross-entropy over response tokens at full vision tokens."""

    area = "pretrain"

    def __init__(self, model: VisionLanguageModel, optim: OptimConfig, *, num_steps: int) -> None:
        """Train all of `model`."""
        super().__init__(optim, num_steps=num_steps)
        self.model = model

    def step(self, batch: Batch) -> StepResult:
        """Predict the response tokens."""
        features = self.model.encode_tiles(batch.tiles)
        states = self.model.response_states(batch, features, self.model.full_ratios(batch))
        logits = states.float() @ self.model.head.float().T
        targets = batch.input_ids[batch.response_mask]
        loss = cross_entropy(logits, targets, reduction="sum")
        hits = (logits.argmax(-1) == targets).sum()
        return StepResult(loss_sum=loss, metrics={"pretrain/token_accuracy": Mean(hits, len(targets))})

    def trained_model(self) -> VisionLanguageModel:
        """Return the trained model."""
        return self.model
