"""Train stage 1 with a loss of your own: the mean of both directions of the KL divergence.

python examples/custom_loss.py recipes/demo/consistency.yaml run_dir=runs/symmetric trainer.max_steps=100
"""

import sys
from pathlib import Path

from vico_pl.losses.consistency import consistency_kl
from vico_pl.model.blocks import release
from vico_pl.prepare import prepare_run
from vico_pl.stages import STAGES
from vico_pl.stages.base import StepResult
from vico_pl.stages.consistency import ConsistencyStage
from vico_pl.stages.figures import Mean
from vico_pl.trainer import train
from vico_pl.types import Batch


class SymmetricStage(ConsistencyStage):
    """Stage 1 with (KL(reference || policy) + KL(policy || reference)) / 2 for each response token."""

    name = "symmetric"  # in recipes: stage=symmetric; in logs: symmetric/loss

    def step(self, batch: Batch) -> StepResult:
        """Return the loss, summed over the response tokens of a micro-batch, and what else to log."""
        features = self.model.encode_tiles(batch.tiles)  # (T, P, C)
        ratios = self.draw_ratios(batch, features)  # (T,): 4 or 16 for each tile
        policy = self.model.response_states(batch, features, ratios)  # (R, D)
        reference = self.reference.response_states(batch, policy_features=features)  # (R, D) at full tokens
        sides = policy, self.model.head, reference, self.reference.head
        forward, backward = consistency_kl(*sides), consistency_kl(*sides, reverse=True)  # (R,), nats
        release(self.reference.model)  # gathered weights, under fsdp
        count = batch.num_response_tokens
        metrics = {
            "symmetric/forward_kl": Mean(forward.detach().sum(), count),
            "symmetric/backward_kl": Mean(backward.detach().sum(), count),
        }
        return StepResult(loss_sum=(forward + backward).sum() / 2, metrics=metrics)


STAGES[SymmetricStage.name] = SymmetricStage

if __name__ == "__main__":
    recipe, *settings = sys.argv[1:]
    print(train(prepare_run(Path(recipe), ["stage=symmetric", *settings])), "is written")
