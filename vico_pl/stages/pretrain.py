"""Stage 0: make the model that ViCO starts from, by predicting responses at full vision tokens."""

from vico_pl.losses.cross_entropy import response_cross_entropy
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
