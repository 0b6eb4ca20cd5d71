"""Load balance of simulated ranks in stage 1: our assignment and others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from statistics import mean
from typing import Any

import numpy as np

from vico_pl.config import RunConfig
from vico_pl.data.collate import MicroBatchLimits, SampleLoad, assign, keep_limits
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
    "in_sum": "assigned by cost as estimated from the index",
    "in_sum_exactly": "assigned by cost as it will be",
    "in_step": "assigned by estimated cost, ranks waiting after each micro-batch (sharded models)",
    "in_step_exactly": "assigned by cost as it will be, ranks waiting after each micro-batch",
    "contiguous": f"{SAMPLES} neighbours each",
    "tokens": f"micro-batches of {PACK_TOKENS} tokens at drawn ratios, one each",
}
# Of the second table, which takes a fifth of the steps; samples per rank.
TABLE_RANKS, TABLE_SAMPLES = (8, 64, 512), (4, 8, 16)

Positions = list[list[int]]  # samples of each rank
Efficiencies = dict[str, float]  # mean over maximum of the ranks' cost by way of assigning


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Load of a sample, and its estimate from the shard index."""

    load: SampleLoad  # cost in FLOP
    estimate: SampleLoad
    drawn_tokens: int  # at drawn ratios


def measure_efficiency(*, steps: int) -> dict[str, Any]:
    """Return efficiencies, averaged over steps: of all ways by model, ours by model, samples and ranks."""
    costs = {size: cost_of(size) for size in LANGUAGE}
    return {
        "ways": {size: _efficiencies(cost, steps=steps) for size, cost in costs.items()},
        "shapes": [
            {"size": size, "samples": samples}
            | {str(n): _ours(cost, ranks=n, samples=samples, steps=max(1, steps // 5)) for n in TABLE_RANKS}
            for size, cost in costs.items()
            for samples in TABLE_SAMPLES
        ],
    }


def efficiency_figures(measured: dict[str, Any]) -> dict[str, float]:
    """Return the efficiency of our assignment, if ranks wait once per step or after each micro-batch."""
    ways: dict[str, Efficiencies] = measured["ways"]
    return {
        f"parallel_efficiency_{RANKS}_{size}{suffix}": found[way]
        for way, suffix in (("in_sum", ""), ("in_step", "_in_step"))
        for size, found in ways.items()
    }


def efficiency_table(measured: dict[str, Any]) -> list[str]:
    """Return the tables of assignments, and of ours by shape."""
    ways: dict[str, Efficiencies] = measured["ways"]
    return [
        f"| {RANKS} ranks, mean over maximum of their cost | {' | '.join(size.upper() for size in ways)} |",
        "|---" * (1 + len(ways)) + "|",
        *(
            f"| {title} | {' | '.join(f'{100 * found[way]:.1f} %' for found in ways.values())} |"
            for way, title in TITLES.items()
        ),
        "",
        f"| our assignment: per step / per micro-batch | {' | '.join(f'{n} ranks' for n in TABLE_RANKS)} |",
        "|---" * (1 + len(TABLE_RANKS)) + "|",
        *(
            f"| {row['size'].upper()}, {row['samples']} samples per rank | "
            + " | ".join(f"{100 * row[str(n)][0]:.1f} / {100 * row[str(n)][1]:.1f} %" for n in TABLE_RANKS)
            + " |"
            for row in measured["shapes"]
        ),
        "",
    ]


def _efficiencies(cost: StageCost, *, steps: int) -> Efficiencies:
    drawn = [draw_samples(cost, step=step, count=RANKS * SAMPLES) for step in range(steps)]
    exact = [[replace(sample, estimate=sample.load) for sample in samples] for samples in drawn]
    ours, at_best = (_mean_balances(each, num_ranks=RANKS) for each in (drawn, exact))
    return {
        **dict(zip(("in_sum", "in_step"), ours, strict=True)),
        **dict(zip(("in_sum_exactly", "in_step_exactly"), at_best, strict=True)),
        "contiguous": mean(_balance(samples, _neighbours(len(samples))) for samples in drawn),
        "tokens": mean(
            _balance(samples, micro_batches)
            for samples in drawn
            for micro_batches in _packs_by_tokens(samples)
        ),
    }


def _ours(cost: StageCost, *, ranks: int, samples: int, steps: int) -> tuple[float, float]:
    drawn = [draw_samples(cost, step=step, count=ranks * samples) for step in range(steps)]
    return _mean_balances(drawn, num_ranks=ranks)


def _mean_balances(drawn: Sequence[Sequence[Sample]], *, num_ranks: int) -> tuple[float, float]:
    in_sum, in_step = zip(*(_balances(samples, num_ranks) for samples in drawn), strict=True)
    return mean(in_sum), mean(in_step)


def cost_of(size: str) -> StageCost:
    """Return the cost model of stage 1 with everything trained."""
    language = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151_936}
    spec = ModelSpec(vision=VISION, language={**language, **LANGUAGE[size]}, ratios=RATIOS, placeholder_id=0)
    run = RunConfig(stage="consistency", run_dir="", model=ModelConfig(path=size, ratios=RATIOS))
    return ConsistencyStage.cost(run, count_flops(spec))


def draw_samples(cost: StageCost, *, step: int, count: int) -> list[Sample]:
    """Draw the samples of a step: a single image each, text of lognormal length.

    The estimate of the text's tokens is off, as it is in a run.
    """
    chance = np.random.default_rng(step)
    tiles = chance.choice(list(TILES), size=count, p=list(TILES.values()))
    texts = np.clip(chance.lognormal(np.log(180), 0.9, size=count), 20, 3000).astype(int)
    estimates = texts * chance.lognormal(0, ESTIMATE_SPREAD, size=count)
    numbers = zip(tiles.tolist(), texts.tolist(), estimates.astype(int).tolist(), strict=True)
    return [_sample(cost, step * count + index, *drawn) for index, drawn in enumerate(numbers)]


def _sample(cost: StageCost, position: int, tiles: int, text: int, estimate: int) -> Sample:
    load, estimated = (
        SampleLoad(cost(position, [tiles], tokens), tiles, tokens + tiles * TOKENS_PER_TILE[RATIOS[0]])
        for tokens in (text + TEMPLATE_TOKENS, estimate)
    )
    drawn = sum(TOKENS_PER_TILE[ratio] for ratio in cost.ratios_at(position, [tiles]))
    return Sample(load=load, estimate=estimated, drawn_tokens=text + TEMPLATE_TOKENS + drawn)


def _balance(samples: Sequence[Sample], assigned: Positions) -> float:
    costs = [sum(samples[index].load.cost for index in positions) for positions in assigned]
    return mean(costs) / max(costs)


def _balances(samples: Sequence[Sample], num_ranks: int) -> tuple[float, float]:
    """Return the balance of our assignment if ranks wait once per step, and after each micro-batch."""
    limits = MicroBatchLimits()
    costs = []
    for planned in assign([sample.estimate for sample in samples], limits, num_ranks=num_ranks):
        loads = {index: samples[index].load for index in chain(*planned)}
        micro_batches = keep_limits(planned, loads, limits)
        costs.append([sum(loads[index].cost for index in micro_batch) for micro_batch in micro_batches])
    mean_cost = mean(map(sum, costs))
    return mean_cost / max(map(sum, costs)), mean_cost / sum(map(max, zip_longest(*costs, fillvalue=0.0)))


def _neighbours(count: int) -> Positions:
    return [list(range(start, start + count // RANKS)) for start in range(0, count, count // RANKS)]


def _packs_by_tokens(samples: Sequence[Sample]) -> Iterator[Positions]:
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
