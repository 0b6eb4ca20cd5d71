"""What a run reads and computes: tiles and tokens of a sample, operations of a sample, a step and the run.

A forward pass of a part counts once. What is trained counts twice more, for the gradients of its weights and
of its input; a frozen part that gradients pass through counts once more; and once more what is recomputed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from vico_pl.data.module import DataConfig
from vico_pl.data.packing import estimated_tiles
from vico_pl.data.shards.index import INDEX_NAME, parse_entries, read_sizes
from vico_pl.data.shards.locations import parse_source
from vico_pl.data.shards.sizes import SampleSize
from vico_pl.model.connector import FULL_RATIO
from vico_pl.model.flops import ModelFlops
from vico_pl.planning.memory import MicroBatch
from vico_pl.recipe import RunConfig

TEXT_TOKENS, TILES = 200.0, 5  # of a sample whose shards are not here; half of the text is response
MAX_MEASURED = 20_000  # samples of a source whose sizes are looked at


@dataclass(frozen=True, kw_only=True)
class SampleShape:
    """A sample of mean size."""

    tiles: float
    text_tokens: float
    response_tokens: float
    num_samples: int | None  # of all sources; none: the shards are not here
    origin: str  # how this is known


def read_samples(config: DataConfig) -> SampleShape:
    """Read what lies beside the shards of a recipe; without it, take usual figures."""
    found = [_read_source(source.path) for source in config.sources]
    sizes = [SampleSize(*row) for _, rows in found for row in rows.tolist()]
    counts = [count for count, _ in found]
    num_samples = sum(counts) if counts and all(counts) else None
    if not sizes:
        tiles = float(min(TILES, config.tiling.max_tiles))
        return SampleShape(
            tiles=tiles,
            text_tokens=TEXT_TOKENS,
            response_tokens=TEXT_TOKENS / 2,
            num_samples=num_samples,
            origin="assumed: the shards tell no sizes" if num_samples else "assumed: no index of shards here",
        )
    text = fmean(size.text_tokens for size in sizes)
    return SampleShape(
        tiles=fmean(sum(estimated_tiles(size, config.tiling)) for size in sizes),
        text_tokens=max(text, 2.0),
        response_tokens=max(text / 2, 1.0),
        num_samples=num_samples,
        origin=f"mean of {len(sizes)} samples; half of the text taken as response",
    )


def micro_batch_of(
    config: DataConfig, sample: SampleShape, *, tokens_per_tile: int, world: int
) -> MicroBatch:
    """Return the largest micro-batch that the limits and a rank's share of the batch allow."""
    tiles, text = max(round(sample.tiles), 1), max(round(sample.text_tokens), 2)
    length = tiles * tokens_per_tile + text
    limits, share = config.micro_batch, max(config.batch_size // world, 1)
    fitting = min(limits.max_tiles // tiles, limits.max_tokens // length, share)
    response = min(max(round(sample.response_tokens), 1), text - 1)
    return MicroBatch(num_samples=max(fitting, 1), tiles=tiles, text_tokens=text, response_tokens=response)


@dataclass(frozen=True, kw_only=True)
class SampleWork:
    """Operations and vision tokens of a sample."""

    flops: dict[str, float]  # by what is run
    vision_tokens: dict[str, float]  # that the policy and the reference see

    @property
    def total(self) -> float:
        """Operations of a sample."""
        return sum(self.flops.values())


def count_work(config: RunConfig, flops: ModelFlops, sample: SampleShape) -> SampleWork:
    """Count the operations of a sample of mean size."""
    count = {"pretrain": _pretrain, "consistency": _consistency, "router": _router}[config.stage]
    return count(config, _Parts(flops=flops, sample=sample))


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Forward operations of each part over a sample."""

    flops: ModelFlops
    sample: SampleShape

    @property
    def vision(self) -> float:
        return self.sample.tiles * self.flops.vision_per_tile

    @property
    def head(self) -> float:
        return self.sample.response_tokens * self.flops.head_per_token

    def tokens(self, ratio: int) -> float:
        return self.sample.tiles * self.flops.vision_tokens_per_tile[ratio]

    def connectors(self, ratio: int) -> float:
        return self.sample.tiles * self.flops.connector_per_tile[ratio]

    def language(self, ratio: int) -> float:
        return self.flops.language(round(self.tokens(ratio) + self.sample.text_tokens))

    def mean(self, function: str, ratios: Sequence[int]) -> float:
        return fmean(getattr(self, function)(ratio) for ratio in ratios)


def _trained(config: RunConfig, parts: _Parts, ratios: Sequence[int]) -> dict[str, float]:
    """Return the policy's work: forward, backward and what is recomputed."""
    trainable, again = set(config.model.trainable), config.trainer.activation_checkpointing
    vision, before = "vision" in trainable, bool(trainable & {"vision", "connectors"})
    passes = {
        "vision": 3 + again if vision else 1,
        "connectors": 1 + ("connectors" in trainable) + vision if before else 1,
        "language": 1 + ("language" in trainable) + 1 + again,
        "head": 2 + ("language" in trainable),
    }
    connectors, blocks = parts.mean("connectors", ratios), parts.mean("language", ratios)
    forward = {"vision": parts.vision, "connectors": connectors, "language": blocks, "head": parts.head}
    return {f"policy {name}": passes[name] * work for name, work in forward.items()}


def _pretrain(config: RunConfig, parts: _Parts) -> SampleWork:
    flops = _trained(config, parts, [FULL_RATIO])
    return SampleWork(flops=flops, vision_tokens={"policy": parts.tokens(FULL_RATIO)})


def _consistency(config: RunConfig, parts: _Parts) -> SampleWork:
    ratios = config.model.ratios
    flops = _trained(config, parts, ratios)
    flops["reference"] = parts.vision + parts.connectors(FULL_RATIO) + parts.language(FULL_RATIO) + parts.head
    tokens = {"policy": parts.mean("tokens", ratios), "reference": parts.tokens(FULL_RATIO)}
    return SampleWork(flops=flops, vision_tokens=tokens)


def _router(config: RunConfig, parts: _Parts) -> SampleWork:
    """Count labels: reference and policy at full tokens, then the answers with tiles compressed.

    Per tile, a branch runs what stands behind its tile: half of the tokens on average, each of which still
    attends to all before it.
    """
    full, coarse, tiles = FULL_RATIO, config.model.ratios[-1], parts.sample.tiles
    once = parts.vision + parts.connectors(full) + parts.language(full)
    flops = {"reference": once + parts.head, "policy at full tokens": once + 2 * parts.head}
    if config.router.label_mode == "image":
        compressed = parts.connectors(coarse) + parts.language(coarse) + 2 * parts.head
    else:
        compressed = parts.connectors(coarse) + tiles * (parts.language(full) / 2 + 2 * parts.head)
    flops |= {"policy with tiles compressed": compressed, "router": 3 * tiles * parts.flops.router_per_tile}
    return SampleWork(
        flops=flops, vision_tokens={"policy": parts.tokens(full), "reference": parts.tokens(full)}
    )


def _read_source(text: str) -> tuple[int, np.ndarray]:
    """Return how many samples local shards have, and the sizes of the first; 0 and none if not known."""
    nothing = np.empty((0, 4), dtype=np.int32)
    try:
        source = parse_source(text, allow_pipe=True)
    except ValueError:  # the shards are on another machine
        return 0, nothing
    index = Path(source.base, INDEX_NAME)
    if not source.is_local or not index.is_file():
        return 0, nothing
    sizes: list[np.ndarray] = []
    known = {entry.name: entry for entry in parse_entries(index.read_bytes(), where=str(index))}
    names = list(known) if source.names is None else source.names
    if not known.keys() >= set(names):  # the run counts the others
        return 0, nothing
    for name in names:
        stored = read_sizes(index.parent / name, known[name].num_samples)
        if stored is not None and sum(map(len, sizes)) < MAX_MEASURED:
            sizes.append(np.asarray(stored))
    rows = np.concatenate(sizes)[:MAX_MEASURED] if sizes else nothing
    return sum(known[name].num_samples for name in names), rows
