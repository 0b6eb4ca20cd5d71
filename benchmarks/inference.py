"""Speedup of routed inference against the predicted one, and the cost of the router.

Half the vision tokens: 4 of 6 tiles are compressed to a quarter. Patch features are given, so only router,
connectors, splice and language model are timed. It runs the code of `vico generate` with a random model that
never ends its answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import harness
import torch
from harness import Goal
from models import Counter, internvl_8b, random_model, spec_of
from torch import Tensor

from vico_pl.data.chat import ChatEncoder
from vico_pl.data.collate import collate
from vico_pl.data.tiling import TilingConfig
from vico_pl.inference.generate import prefill
from vico_pl.inference.predictor import Predictor
from vico_pl.model.router import NEVER, RoutingRule
from vico_pl.model.vlm import ModelSpec
from vico_pl.tokens import PLACEHOLDER, TURN_END, build_tokenizer, token_id
from vico_pl.types import Batch, TiledSample

GOALS = {
    "prefill_speedup_over_predicted": Goal(0.9, at_least=True),
    "prefill_routed_over_full": Goal(1.03),
    "decode_speedup": Goal(1.1, at_least=True),
    "router_flops_over_prefill_8b": Goal(0.02),
}
TILES, HALF = 6, [16, 4, 16, 16, 4, 16]  # ratios at which 6 tiles have half their vision tokens
BATCHES = (1, 8)
NEW_TOKENS = 64
SHAPE = {
    "tile_size": 224,  # 64 or 16 vision tokens
    "vision": {"width": 256, "layers": 1},  # not measured
    "language": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "heads": (12, 6)},
    "vocab_size": 32_000,
}
# Calls of each side; few of the slowest.
ROUNDS = {"overhead": 9, "prefill_1": 7, "prefill_8": 2, "generation_1": 2, "generation_8": 1}

QUESTION = "Which of the letters in this image stands for the largest number of all, and which for the least?"


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Some prompts and the patch features of their tiles."""

    predictor: Predictor
    samples: list[TiledSample]
    batch: Batch
    features: Tensor  # (T, P, C)

    def at(self, ratios: Sequence[int]) -> Tensor:
        """Return ratios for the tiles of all samples, the same for each sample."""
        return torch.tensor([*ratios] * len(self.samples))


def open_predictor(**changes: Any) -> Predictor:
    """Return a predictor with a random model that never ends its answer."""
    tokenizer = build_tokenizer([QUESTION], vocab_size=400)
    spec = spec_of(**{**SHAPE, **changes}, placeholder_id=token_id(tokenizer, PLACEHOLDER))
    model = random_model(spec)
    with torch.no_grad():
        model.head[token_id(tokenizer, TURN_END)] = 0
    return Predictor(
        folder=Path(),
        model=model,
        tokenizer=tokenizer,
        tiling=TilingConfig(tile_size=model.vision.tile_size),
        chat=ChatEncoder(tokenizer),
        rule=RoutingRule(threshold=NEVER),
    )


def draw_prompts(predictor: Predictor, count: int) -> Prompts:
    """Draw the same question about `count` images."""
    size = predictor.model.vision.tile_size
    sample = TiledSample(
        id="a",
        tiles=torch.zeros(TILES, 3, size, size, dtype=torch.uint8),
        tiles_per_image=[TILES],
        turns=[],
        metadata={},
    )
    prompt = predictor.chat.encode_prompt(sample, f"<image>\n{QUESTION}")
    vision = predictor.model.vision
    return Prompts(
        predictor=predictor,
        samples=[sample] * count,
        batch=collate([prompt] * count),
        features=torch.randn(count * TILES, vision.num_patches, vision.width),
    )


# --- Measurements -------------------------------------------------------------------------------------------


@torch.no_grad()
def fill(prompts: Prompts, ratios: Sequence[int], *, routes: bool) -> None:
    """Run from patch features to a filled cache.

    With `routes` the router runs, but `ratios` stand in for its choice, which is random here.
    """
    model = prompts.predictor.model
    if routes:
        prompts.predictor.choose_ratios(prompts.features)
    prefill(model.language, model.splice_batch(prompts.batch, prompts.features, prompts.at(ratios)))


def generate(prompts: Prompts, ratios: Sequence[int], *, routes: bool) -> None:
    """Run from patch features to an answer of `NEW_TOKENS` tokens."""
    count = len(prompts.samples)
    with torch.no_grad():
        if routes:
            prompts.predictor.choose_ratios(prompts.features)
        ids = prompts.predictor.generate_ids(
            prompts.samples,
            [f"<image>\n{QUESTION}"] * count,
            features=prompts.features.split(TILES),
            ratios=prompts.at(ratios).split(TILES),
            max_new_tokens=NEW_TOKENS,
        )
    if ids.shape != (count, NEW_TOKENS):
        raise RuntimeError(f"answers of {tuple(ids.shape)} tokens; expected ({count}, {NEW_TOKENS})")


def predicted_speedup(spec: ModelSpec) -> float:
    """Return the ratio of operations with all and half the vision tokens, router included."""
    counter = Counter()
    prompts = _without_weights(counter, spec)
    full = counter.count(lambda: fill(prompts, [4] * TILES, routes=False))
    return full / counter.count(lambda: fill(prompts, HALF, routes=True))


def router_share(spec: ModelSpec) -> float:
    """Return the operations of the router over those of a routed prefill with half the vision tokens."""
    counter = Counter()
    prompts = _without_weights(counter, spec)
    router = counter.count(lambda: prompts.predictor.router_logits(prompts.features))
    return router / counter.count(lambda: fill(prompts, HALF, routes=True))


def _without_weights(counter: Counter, spec: ModelSpec) -> Prompts:
    predictor = open_predictor(language={**SHAPE["language"], "num_hidden_layers": 1})
    placeholder = predictor.model.spec.placeholder_id
    model = counter.model(replace(spec, placeholder_id=placeholder))
    return draw_prompts(replace(predictor, model=model), 1)


def measure(predictor: Predictor, rounds: dict[str, int]) -> dict[str, list[tuple[float, float]]]:
    """Time full and routed inference alternately; returns seconds of (full, routed) per comparison."""
    one = draw_prompts(predictor, 1)
    full = [4] * TILES
    times = {
        "overhead": harness.paired(
            lambda: fill(one, full, routes=False),
            lambda: fill(one, full, routes=True),
            rounds=rounds["overhead"],
        )
    }
    comparisons: list[tuple[str, Callable[..., None]]] = [("prefill", fill), ("generation", generate)]
    for name, run in comparisons:
        for count in BATCHES:
            prompts = draw_prompts(predictor, count)
            times[f"{name}_{count}"] = harness.paired(
                lambda run=run, prompts=prompts: run(prompts, full, routes=False),
                lambda run=run, prompts=prompts: run(prompts, HALF, routes=True),
                rounds=rounds[f"{name}_{count}"],
                warm_up=count == 1,
            )
    return times


def figures(
    times: dict[str, list[tuple[float, float]]], *, predicted: float, share: float
) -> harness.Figures:
    """Return each figure with its goal; the worse of two batch sizes counts."""
    speedups = {name: harness.median_ratio(pairs) for name, pairs in times.items()}
    measured = {
        "prefill_speedup_over_predicted": min(speedups[f"prefill_{n}"] for n in BATCHES) / predicted,
        "prefill_routed_over_full": 1 / speedups["overhead"],
        "decode_speedup": min(speedups[f"generation_{n}"] for n in BATCHES),
        "router_flops_over_prefill_8b": share,
    }
    return harness.figures_of(measured, GOALS)


def tables(details: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    titles = {
        "overhead": "prefill, router runs and keeps all tokens",
        "prefill": "prefill at half the tokens",
    }
    titles["generation"] = f"prefill and {NEW_TOKENS} tokens decoded, at half the tokens"
    rows = []
    for name, pairs in details["cpu_s"].items():
        kind, _, count = name.partition("_")
        full, routed = (f"{median(times):.2f} s" for times in zip(*pairs, strict=True))
        speedup = f"{harness.median_ratio(pairs):.3f}"
        rows.append(f"| {titles[kind]} | {count or 1} | {full} | {routed} | {speedup} | {len(pairs)} |")
    lines = [
        *harness.heading(details),
        *harness.figure_table(details["figures"], GOALS),
        f"Operations promise a prefill {details['predicted_speedup']:.2f} times as fast.",
        "",
        "| processor time | batch | full tokens | routed | speed-up | rounds |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    given = harness.parser("Measure routed inference.").parse_args(arguments)
    torch.set_num_threads(1)
    predictor = open_predictor()
    predicted, share = predicted_speedup(predictor.model.spec), router_share(internvl_8b())
    times = measure(predictor, ROUNDS)
    harness.publish(
        "inference",
        given,
        figures=figures(times, predicted=predicted, share=share),
        details={"predicted_speedup": predicted, "router_share": share, "cpu_s": times},
        tables=tables,
        packages=["transformers"],
    )


if __name__ == "__main__":
    main()
