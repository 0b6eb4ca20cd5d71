"""Load balance of 64 simulated ranks in stage 1: our assignment and others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from vico_pl.config import RunConfig
from vico_pl.data.collate import MicroBatchLimits, SampleLoad, assign
from vico_pl.model.flops import count_flops
from vico_pl.model.vlm import ModelSpec
from vico_pl.stages.consistency import ConsistencyStage
from vico_pl.stages.cost import StageCost
from vico_pl.stages.settings import ModelConfig

RANKS, SAMPLES = 64, 8  # mean samples per rank
PACK_TOKENS = 8192  # limit of packing by tokens, at drawn ratios
TILES = {1: 0.20, 3: 0.15, 5: 0.20, 7: 0.20, 10: 0.10, 13: 0.15}  # of a sample -> how often
TEMPLATE_TOKENS = 30
# Of the logarithm of tokens per estimated token, from text to text: 0.07 over 1,098 records of public sets of
# images with questions, under CLIP's tokenizer (bytes / 4 would be off by 0.29).
ESTIMATE_SPREAD = 0.08
RATIOS = [4, 16]
TOKENS_PER_TILE = {4: 256, 16: 64}
VISION = {
    "model_type": "internvl_vision",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
}
LANGUAGE = {
    "1b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}
TITLES = {
    "dealt": "assigned by cost as estimated from the index",
    "dealt_exactly": "assigned by cost as it will be",
    "dealt_in_step": "assigned by estimated cost, ranks waiting after each micro-batch (sharded models)",
    "contiguous": f"{SAMPLES} neighbours each",
    "tokens": f"micro-batches of {PACK_TOKENS} tokens at drawn ratios, one each",
}

Hands = list[list[int]]  # samples of each rank


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Cost of a sample, and its estimate from the shard index."""

    cost: float  # FLOP
    estimate: float  # FLOP
    tiles: int
    full_tokens: int  # at full vision tokens
    drawn_tokens: int  # at drawn ratios


def measure_efficiency(*, steps: int) -> dict[str, dict[str, float]]:
    """Return mean over maximum of the ranks' cost by model and assignment, averaged over steps."""
    return {size: _efficiencies(size, steps=steps) for size in LANGUAGE}


def efficiency_figures(measured: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the efficiency of our assignment."""
    return {f"parallel_efficiency_{RANKS}_{size}": ways["dealt"] for size, ways in measured.items()}


def efficiency_table(measured: dict[str, dict[str, float]]) -> list[str]:
    """Return the table of assignments."""
    sizes = list(measured)
    return [
        f"| {RANKS} ranks, mean over maximum of their cost | {' | '.join(size.upper() for size in sizes)} |",
        "|---" * (1 + len(sizes)) + "|",
        *(
            f"| {title} | {' | '.join(f'{100 * measured[size][way]:.1f} %' for size in sizes)} |"
            for way, title in TITLES.items()
        ),
        "",
    ]


def _efficiencies(size: str, *, steps: int) -> dict[str, float]:
    cost = cost_of(size)
    drawn = [draw_samples(cost, step=step) for step in range(steps)]
    return {
        "dealt": mean(
            _balance(samples, assign_to_ranks([s.estimate for s in samples], RANKS)) for samples in drawn
        ),
        "dealt_exactly": mean(
            _balance(samples, assign_to_ranks([s.cost for s in samples], RANKS)) for samples in drawn
        ),
        "dealt_in_step": mean(_balance_in_step(samples) for samples in drawn),
        "contiguous": mean(_balance(samples, _neighbours(len(samples))) for samples in drawn),
        "tokens": mean(
            _balance(samples, micro_batches)
            for samples in drawn
            for micro_batches in _packs_by_tokens(samples)
        ),
    }


def cost_of(size: str) -> StageCost:
    """Return the cost model of stage 1 with everything trained."""
    language = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151_936}
    spec = ModelSpec(vision=VISION, language={**language, **LANGUAGE[size]}, ratios=RATIOS, placeholder_id=0)
    run = RunConfig(stage="consistency", run_dir="", model=ModelConfig(path=size, ratios=RATIOS))
    return ConsistencyStage.cost(run, count_flops(spec))


def draw_samples(cost: StageCost, *, step: int) -> list[Sample]:
    """Draw the samples of a step: a single image each, text of lognormal length.

    The estimate of the text's tokens is off, as it is in a run.
    """
    chance, count = np.random.default_rng(step), RANKS * SAMPLES
    tiles = chance.choice(list(TILES), size=count, p=list(TILES.values()))
    texts = np.clip(chance.lognormal(np.log(180), 0.9, size=count), 20, 3000).astype(int)
    estimates = texts * chance.lognormal(0, ESTIMATE_SPREAD, size=count)
    numbers = zip(tiles.tolist(), texts.tolist(), estimates.astype(int).tolist(), strict=True)
    return [_sample(cost, step * count + index, *drawn) for index, drawn in enumerate(numbers)]


def _sample(cost: StageCost, position: int, tiles: int, text: int, estimate: int) -> Sample:
    tokens, drawn = text + TEMPLATE_TOKENS, cost.ratios_at(position, [tiles])
    return Sample(
        cost=cost(position, [tiles], tokens),
        estimate=cost(position, [tiles], estimate),
        tiles=tiles,
        full_tokens=tokens + tiles * TOKENS_PER_TILE[RATIOS[0]],
        drawn_tokens=tokens + sum(TOKENS_PER_TILE[ratio] for ratio in drawn),
    )


def _balance(samples: Sequence[Sample], assigned: Hands) -> float:
    loads = [sum(samples[index].cost for index in rank_positions) for rank_positions in assigned]
    return mean(loads) / max(loads)


def _balance_in_step(samples: Sequence[Sample]) -> float:
    """Return the balance if all ranks wait after each micro-batch."""
    assigned = assign_to_ranks([sample.estimate for sample in samples], RANKS)
    micro_batches = [_pack_costs([samples[index] for index in rank_positions]) for rank_positions in assigned]
    turns = max(map(len, micro_batches))
    slowest = [max(costs[turn] for costs in micro_batches if turn < len(costs)) for turn in range(turns)]
    return mean(map(sum, micro_batches)) / sum(slowest)


def _pack_costs(samples: Sequence[Sample]) -> list[float]:
    loads = [SampleLoad(sample.cost, sample.tiles, sample.full_tokens) for sample in samples]
    micro_batches = split_into_micro_batches(loads, MicroBatchLimits())
    return [sum(loads[index].cost for index in micro_batch) for micro_batch in micro_batches]


def _neighbours(count: int) -> Hands:
    return [list(range(start, start + count // RANKS)) for start in range(0, count, count // RANKS)]


def _packs_by_tokens(samples: Sequence[Sample]) -> Iterator[Hands]:
    """Fill micro-batches first-fit, longest first; give each rank one, in random order; drop the rest."""
    micro_batches: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(samples)), key=lambda index: -samples[index].drawn_tokens):
        tokens = samples[index].drawn_tokens
        place = next((micro_batch for micro_batch, left in enumerate(room) if left >= tokens), None)
        if place is None:
            place = len(micro_batches)
            micro_batches.append([])
            room.append(PACK_TOKENS)
        micro_batches[place].append(index)
        room[place] -= tokens
    np.random.default_rng(0).shuffle(micro_batches)
    for start in range(0, len(micro_batches) - RANKS + 1, RANKS):
        yield micro_batches[start : start + RANKS]
