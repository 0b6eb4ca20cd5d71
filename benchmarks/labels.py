"""Cost of exact router labels against one whole pass of both models per tile.

Operations are counted, at the shape of InternVL3.5-1B; time is measured on a small model. Both run the code
of stage 2. The baseline `label_ratios` is leave-one-out in its simplest form.
"""

from collections.abc import Sequence
from statistics import median
from typing import Any
from unittest.mock import patch

import harness
import torch
from harness import Goal
from models import Counter, Text, draw_batch, internvl_1b, random_model, spec_of
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from vico_pl.model.reference import FrozenReference
from vico_pl.model.vlm import VisionLanguageModel, splice
from vico_pl.stages import labels as stage_labels
from vico_pl.types import Batch

GOALS = {
    "label_flops_over_naive_5": Goal(0.22),
    "label_flops_over_naive_13": Goal(0.15),
    "label_time_over_naive": Goal(0.35),
    "label_difference_from_naive": Goal(1e-5),
}
EPSILON = 1e-3  # nats
TEXT = Text()  # 200 tokens, half of them the response
TIMED_TILES = 6
ROUNDS = 5
SMALL = {
    "tile_size": 224,  # 64 or 16 vision tokens
    "vision": {"width": 256, "layers": 4},
    "language": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "heads": (4, 2)},
    "vocab_size": 8192,
}


# --- Leave-one-out, as one would write it -------------------------------------------------------------------


@torch.no_grad()
def label_ratios(policy: VisionLanguageModel, reference: VisionLanguageModel, batch: Batch) -> Tensor:
    """Return the loss ratio of each tile of one sample: a pass of both models for each, and one without."""
    full = policy.full_ratios(batch)
    without = loss(policy, reference, batch, full)
    ratios = []
    for tile in range(batch.num_tiles):
        compressed = full.clone()
        compressed[tile] = policy.ratios[-1]
        ratios.append((loss(policy, reference, batch, compressed) + EPSILON) / (without + EPSILON))
    return torch.stack(ratios)


def loss(policy: VisionLanguageModel, reference: VisionLanguageModel, batch: Batch, ratios: Tensor) -> Tensor:
    """Return the mean divergence over the response."""
    logits = response_logits(policy, batch, ratios, connectors=policy.ratios)
    full = reference.full_ratios(batch)
    target = response_logits(reference, batch, full, connectors=reference.ratios[:1])
    log_q, log_p = log_softmax(logits, -1), log_softmax(target, -1)
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


def response_logits(
    model: VisionLanguageModel, batch: Batch, ratios: Tensor, *, connectors: Sequence[int]
) -> Tensor:
    """Return the logits that predict the response, from a forward pass of transformers.

    Each of the connectors runs on all tiles, as both do in released code; then one is picked for each tile.
    """
    features = model.encode_tiles(batch.tiles)
    tokens = {ratio: model.connectors.by_ratio[str(ratio)](features) for ratio in connectors}
    picked = [tokens[ratio][tile] for tile, ratio in enumerate(ratios.tolist())]
    spliced = splice(
        model.language.get_input_embeddings()(batch.input_ids),
        torch.cat(picked),
        model.vision.num_patches // ratios,
        is_placeholder=batch.input_ids == model.spec.placeholder_id,
        response_mask=batch.response_mask,
        sample_lengths=batch.sample_lengths,
    )
    model.language.set_attn_implementation("sdpa")
    logits = model.language(inputs_embeds=spliced.embeddings[None]).logits[0]
    return logits[spliced.response_positions]


# --- What is measured ---------------------------------------------------------------------------------------


def our_ratios(policy: VisionLanguageModel, reference: FrozenReference, batch: Batch) -> Tensor:
    """Return the same as stage 2 does, features included."""
    with torch.no_grad():
        features = policy.encode_tiles(batch.tiles)
    found = stage_labels.tile_loss_ratios(policy, reference, batch, features, mode="tile", epsilon=EPSILON)
    return found[:, 0]


def count_operations(num_tiles: int) -> dict[str, float]:
    """Return the operations of both for one sample at the shape of InternVL3.5-1B."""
    counter, spec = Counter(), internvl_1b()
    batch = draw_batch(spec, [num_tiles], TEXT)
    policy, reference = counter.model(spec), counter.model(spec)
    naive = counter.count(lambda: label_ratios(policy, reference, batch))
    frozen = FrozenReference(reference)
    with patch.object(stage_labels, "consistency_kl", counter.divergence):
        ours = counter.count(lambda: our_ratios(policy, frozen, batch))
    return {"tiles": num_tiles, "ours_tflop": ours / 1e12, "naive_tflop": naive / 1e12}


def measure_time(*, tiles: int, rounds: int, **changes: Any) -> dict[str, Any]:
    """Time both on a small model and compare their results."""
    spec = spec_of(**{**SMALL, **changes})
    policy, other = random_model(spec, seed=1), random_model(spec, seed=2)
    reference, batch = FrozenReference(other), draw_batch(spec, [tiles], TEXT)
    ours, naive = our_ratios(policy, reference, batch), label_ratios(policy, other, batch)
    times = harness.paired(
        lambda: our_ratios(policy, reference, batch),
        lambda: label_ratios(policy, other, batch),
        rounds=rounds,
    )
    return {"tiles": tiles, "difference": (ours / naive - 1).abs().max().item(), "cpu_s": times}


def figures(operations: Sequence[dict[str, float]], timing: dict[str, Any]) -> harness.Figures:
    """Return each figure with its goal."""
    counted = {
        f"label_flops_over_naive_{found['tiles']}": found["ours_tflop"] / found["naive_tflop"]
        for found in operations
    }
    measured = {
        "label_time_over_naive": harness.median_ratio(timing["cpu_s"]),
        "label_difference_from_naive": timing["difference"],
    }
    return harness.figures_of({**counted, **measured}, GOALS)


def tables(details: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    timing = details["timing"]
    ours, naive = (median(times) for times in zip(*timing["cpu_s"], strict=True))
    lines = [
        *harness.heading(details),
        *harness.figure_table(details["figures"], GOALS),
        "| labels of one sample | ours | one pass per tile |",
        "|---|---|---|",
        *(
            f"| operations at {found['tiles']} tiles, InternVL3.5-1B | {found['ours_tflop']:.2f} TFLOP "
            f"| {found['naive_tflop']:.2f} TFLOP |"
            for found in details["operations"]
        ),
        f"| processor time at {timing['tiles']} tiles, small model | {ours:.2f} s | {naive:.2f} s |",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, measure and write the results."""
    given = harness.parser("Measure the labels of the router.").parse_args(arguments)
    torch.set_num_threads(1)
    operations = [count_operations(tiles) for tiles in (5, 13)]
    timing = measure_time(tiles=TIMED_TILES, rounds=ROUNDS)
    harness.publish(
        "labels",
        given,
        figures=figures(operations, timing),
        details={"operations": operations, "timing": timing},
        tables=tables,
        packages=["transformers"],
    )


if __name__ == "__main__":
    main()
