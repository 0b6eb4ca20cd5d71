"""Hidden states with one tile compressed, for every tile and ratio: the input of per-tile router labels.

Tokens before a tile do not depend on it, so each sample runs once at full tokens. A branch is the rest of
the sample with tile b compressed by a ratio; it continues from the keys and values of the tokens before b:

    at full tokens   system a a a a b b b b question response
    branch of b                     b       question response
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vico_pl.model.language import KeyValues, Prefixes, run_packed
from vico_pl.model.vlm import Spliced, VisionLanguageModel
from vico_pl.types import Batch

MAX_TOKENS = 16_384  # of the branches that run at a time


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One tile's branch, as places in the batch at full tokens."""

    start: int  # the sample's first token
    prefix_length: int  # tokens from there to the tile
    tail: slice  # tokens behind the tile
    before: slice  # numbers of the sample's response tokens that a token before the tile predicts
    after: slice  # those of the others


@dataclass(frozen=True, kw_only=True)
class BranchStates:
    """Hidden states that predict the response tokens."""

    full: Float[Tensor, "R D"]  # every tile at full tokens
    branches: Float[Tensor, "RB D"]  # all response tokens of a tile's sample, that tile compressed
    response_branch: Int64[Tensor, " RB"]  # the branch: tiles at the first ratio, then at the next
    response_origin: Int64[Tensor, " RB"]  # the response token


def branch_states(
    policy: VisionLanguageModel,
    batch: Batch,
    features: Float[Tensor, "T P C"],
    *,
    ratios: Sequence[int],
    max_tokens: int = MAX_TOKENS,
    num_groups: Callable[[int], int] = int,
) -> BranchStates:
    """Run a batch at full tokens, and every branch with its tile at each of the ratios.

    Branches run in groups of at most `max_tokens` tokens; a longer branch is a group of its own. `num_groups`
    maps the number of groups to how many must run, the same on all ranks; extra groups run one dummy token.
    """
    kept: KeyValues = {}
    full_ratios = policy.full_ratios(batch)
    spliced = policy.splice_batch(batch, features, full_ratios)
    text, positions = spliced.embeddings, spliced.response_positions
    full = run_packed(policy.language, text, spliced.segment_lengths, keep=kept)[positions]
    tiles: list[Tensor] = []
    for ratio in ratios:
        compressed, _ = policy.connectors(features, torch.full_like(full_ratios, ratio))
        tiles += compressed.to(text.dtype).unflatten(0, (-1, policy.vision.num_patches // ratio))
    branches = list(_branch_per_tile(spliced, batch, full_length=policy.tokens_per_full_tile)) * len(ratios)
    lengths = [len(t) + b.tail.stop - b.tail.start for t, b in zip(tiles, branches, strict=True)]
    groups = list(_groups(lengths, max_tokens))
    idle = num_groups(len(groups)) - len(groups)  # asked before any runs: others may wait for this answer
    states = [full[:0]]
    for group in groups:
        chosen = branches[group]
        parts = [torch.cat([tile, text[b.tail]]) for tile, b in zip(tiles[group], chosen, strict=True)]
        prefixes = Prefixes(
            kept=kept,
            starts=[branch.start for branch in chosen],
            lengths=[branch.prefix_length for branch in chosen],
        )
        hidden = run_packed(policy.language, torch.cat(parts), lengths[group], prefixes=prefixes)
        for branch, tile, own in zip(chosen, tiles[group], hidden.split(lengths[group]), strict=True):
            states += [full[branch.before], own[positions[branch.after] - branch.tail.start + len(tile)]]
    for _ in range(idle):
        run_packed(policy.language, text[:1], [1])
    origins = [range(branch.before.start, branch.after.stop) for branch in branches]
    return BranchStates(
        full=full,
        branches=torch.cat(states),
        response_branch=positions.new_tensor([branch for branch, own in enumerate(origins) for _ in own]),
        response_origin=positions.new_tensor([number for own in origins for number in own]),
    )


def _branch_per_tile(spliced: Spliced, batch: Batch, *, full_length: int) -> Iterator[Branch]:
    tiles, positions = iter(spliced.tile_starts.tolist()), spliced.response_positions.tolist()
    start = first = 0
    sizes = zip(spliced.segment_lengths, batch.response_lengths, batch.tiles_per_image, strict=True)
    for length, num_responses, tiles_per_image in sizes:
        end, last = start + length, first + num_responses
        for tile in islice(tiles, sum(tiles_per_image)):
            split = bisect_left(positions, tile, first, last)
            tail, before, after = slice(tile + full_length, end), slice(first, split), slice(split, last)
            yield Branch(start=start, prefix_length=tile - start, tail=tail, before=before, after=after)
        start, first = end, last


def _groups(lengths: list[int], max_tokens: int) -> Iterator[slice]:
    """Cut neighbours into groups of at most `max_tokens`, but of one at least.

    >>> list(_groups([2, 2, 5, 1], 4))
    [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]
    """
    first = 0
    for number in range(1, len(lengths) + 1):
        if number == len(lengths) or sum(lengths[first : number + 1]) > max_tokens:
            yield slice(first, number)
            first = number
