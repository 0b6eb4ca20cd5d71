"""Compare cheaper router labels with exact ones on a trained model.

    python benchmarks/label_approximations.py runs/demo/consistency/model data/shards/glyphs/val

MODEL is a model after stage 1, `--reference` the one it started from. Two approximations:

    frozen   later tiles do not read the compressed tile again: they keep the keys and values of full tokens
    sampled  random halves of the tiles are compressed, half as many times as there are tiles; a tile's effect
             is the mean loss with it compressed minus that without

Prints the rank correlation with the exact loss ratios, over all tiles and within samples, and the fraction of
equal labels at the median.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import harness  # noqa: F401 - one thread
import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from vico_pl.data.collate import collate
from vico_pl.inference.predictor import Predictor
from vico_pl.losses.consistency import consistency_kl
from vico_pl.model.families.folder import load_model
from vico_pl.model.language import KeyValues, Prefixes, run_packed
from vico_pl.model.reference import FrozenReference
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.stages.labels import loss_ratio, tile_loss_ratios
from vico_pl.types import Batch

ENOUGH = 0.95  # rank correlation below which an approximation is not offered
EPSILON = 1e-3  # nats, as in the recipes


def frozen_states(policy: VisionLanguageModel, batch: Batch, features: Tensor) -> Iterator[Tensor]:
    """Yield for each tile of one sample the states of its response; only that tile and the text run again."""
    kept: KeyValues = {}
    full = policy.full_ratios(batch)
    spliced = policy.splice_batch(batch, features, full)
    run_packed(policy.language, spliced.embeddings, spliced.segment_lengths, keep=kept)
    compressed, _ = policy.connectors(features, torch.full_like(full, policy.ratios[-1]))
    full_length, text = (
        policy.tokens_per_full_tile,
        int(spliced.tile_starts[-1]) + policy.tokens_per_full_tile,
    )
    tail = spliced.embeddings[text:]
    for start, own in zip(spliced.tile_starts.tolist(), compressed.chunk(len(full)), strict=True):
        again: KeyValues = {}
        before = Prefixes(kept=kept, starts=[0], lengths=[start])
        run_packed(policy.language, own, [len(own)], keep=again, prefixes=before)
        seen = _replaced(kept, again, start=start, stop=start + full_length, end=text)
        prefix = Prefixes(kept=seen, starts=[0], lengths=[text - full_length + len(own)])
        hidden = run_packed(policy.language, tail, [len(tail)], prefixes=prefix)
        yield hidden[spliced.response_positions - text]


def _replaced(kept: KeyValues, new: KeyValues, *, start: int, stop: int, end: int) -> KeyValues:
    """Replace the tokens from `start` to `stop`; drop those after `end`."""
    return {
        layer: tuple(
            torch.cat([old[:, :, :start], own, old[:, :, stop:end]], 2)
            for old, own in zip(kept[layer], new[layer], strict=True)
        )
        for layer in kept
    }


class Ratios:
    """Computes loss ratios of the tiles of single samples in several ways."""

    def __init__(self, policy: VisionLanguageModel, reference: VisionLanguageModel, *, seed: int = 0) -> None:
        """Compare a policy with a reference."""
        self.policy, self.reference = policy, FrozenReference(reference)
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def of(self, batch: Batch) -> dict[str, Tensor]:
        """Return the exact loss ratios of one sample, and the approximate ones."""
        features = self.policy.encode_tiles(batch.tiles)
        exact = tile_loss_ratios(self.policy, self.reference, batch, features, mode="tile", epsilon=EPSILON)[
            :, -1
        ]
        target = self.reference.response_states(batch)
        full = self._loss(self._states(batch, features, self.policy.full_ratios(batch)), target)
        frozen = torch.stack([self._loss(s, target) for s in frozen_states(self.policy, batch, features)])
        sampled = full + self._sampled_effects(batch, features, target)
        return {
            "exact": exact,
            "frozen": loss_ratio(frozen, full.expand_as(frozen), epsilon=EPSILON),
            "sampled": loss_ratio(sampled.clamp(min=0), full.expand_as(sampled), epsilon=EPSILON),
        }

    def _sampled_effects(self, batch: Batch, features: Tensor, target: Tensor) -> Tensor:
        full = self.policy.full_ratios(batch)
        count = len(full)
        chosen, losses = [], []
        for _ in range(max(2, count // 2)):
            half = torch.randperm(count, generator=self.generator) < count / 2
            ratios = full.masked_fill(half, self.policy.ratios[-1])
            chosen.append(half)
            losses.append(self._loss(self._states(batch, features, ratios), target))
        is_compressed, loss = torch.stack(chosen).double(), torch.stack(losses).double()
        means = [
            (weights * loss[:, None]).sum(0) / weights.sum(0).clamp(min=1)
            for weights in (is_compressed, 1 - is_compressed)
        ]
        return (means[0] - means[1]).float()

    def _states(self, batch: Batch, features: Tensor, ratios: Tensor) -> Tensor:
        return self.policy.response_states(batch, features, ratios)

    def _loss(self, states: Tensor, target: Tensor) -> Tensor:
        return consistency_kl(states, self.policy.head, target, self.reference.head).mean()


def usable_batches(session: Predictor, folder: Path) -> Iterator[Batch]:
    """Yield samples of several tiles, all of them before the first response."""
    for sample in session.samples(folder):
        batch = collate([session.chat.encode(sample)])
        is_tile = batch.input_ids == session.model.spec.placeholder_id
        if batch.num_tiles > 1 and not (batch.response_mask.cumsum(0) > 0)[is_tile].any():
            yield batch


def compare(found: Sequence[dict[str, Tensor]], name: str) -> dict[str, float | bool]:
    """Return how an approximation agrees with the exact loss ratios."""
    exact, approximate = (torch.cat([ratios[key] for ratios in found]) for key in ("exact", name))
    within = torch.stack([spearman_corrcoef(ratios[name], ratios["exact"]) for ratios in found])
    same = (exact < exact.median()) == (approximate < approximate.median())
    overall = spearman_corrcoef(approximate, exact).item()
    return {
        "rank_correlation": overall,
        "rank_correlation_within_samples": within.nanmean().item(),
        "same_labels": same.float().mean().item(),
        "is_enough": overall >= ENOUGH,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the results as JSON."""
    parser = argparse.ArgumentParser(description="Compare approximate router labels with exact ones.")
    parser.add_argument("model", type=Path, help="model folder after stage 1")
    parser.add_argument("data", type=Path, help="folder of shards")
    parser.add_argument("--reference", type=Path, default=Path("data/base"), help="default data/base")
    parser.add_argument("--samples", type=int, default=100, help="at most; default 100")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    session = Predictor.load(given.model, device="cpu")
    if len(session.model.ratios) < 2:
        raise SystemExit(f"{given.model}: ratios {session.model.ratios}; expected a model after stage 1")
    ratios = Ratios(session.model, load_model(given.reference, dtype=torch.float32))
    batches = islice(usable_batches(session, given.data), given.samples)
    found = [ratios.of(batch) for batch in batches]
    if not found:
        raise SystemExit(f"{given.data}: no sample with several tiles before its first response")
    result = {"samples": len(found), "tiles": sum(len(ratios["exact"]) for ratios in found)}
    compared = {name: compare(found, name) for name in ("frozen", "sampled")}
    sys.stdout.write(json.dumps({**result, **compared}, indent=1) + "\n")


if __name__ == "__main__":
    main()
