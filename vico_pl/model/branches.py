"""Hidden states with one tile compressed, for every tile: the input of per-tile router labels.

Tokens before a tile do not depend on it, so each sample runs once at full tokens. A branch is the rest of
the sample with tile b compressed; it continues from the keys and values of the tokens before b:

    at full tokens   system a a a a b b b b question response
    branch of b                     b       question response
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vico_pl.model.language import KeyValues, Prefixes, run_packed
from vico_pl.model.splice import Spliced
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.types import Batch

MAX_TOKENS = 16_384  # of the branches that run at a time


@dataclass(frozen=True, kw_only=True)
class Branches:
    """One branch for each tile, in the order of the tiles, end to end."""

    tokens: Int64[Tensor, " SB"]  # places among all tokens at full, and all compressed ones behind them
    position_ids: Int64[Tensor, " SB"]
    lengths: list[int]
    prefix_starts: list[int]  # place of the sample's first token
    prefix_lengths: list[int]
    response_branch: Int64[Tensor, " RB"]
    response_origin: Int64[Tensor, " RB"]  # response token of the batch behind each of the branches
    response_places: Int64[Tensor, " RB"]  # of the tokens that predict it; -1: one before the tile does


@dataclass(frozen=True, kw_only=True)
class BranchStates:
    """Hidden states that predict the response tokens."""

    full: Float[Tensor, "R D"]  # every tile at full tokens
    branches: Float[Tensor, "RB D"]  # all response tokens of a tile's sample, that tile compressed
    response_branch: Int64[Tensor, " RB"]  # the tile
    response_origin: Int64[Tensor, " RB"]  # the response token


def branch_states(
    policy: VisionLanguageModel,
    batch: Batch,
    features: Float[Tensor, "T P C"],
    *,
    ratio: int,
    max_tokens: int = MAX_TOKENS,
    num_groups: Callable[[int], int] = int,
) -> BranchStates:
    """Run a batch at full tokens, and every branch with its tile at `ratio`.

    Branches run in groups of at most `max_tokens` tokens; a longer branch is a group of its own. `num_groups`
    maps the number of groups to how many must run, the same on all ranks; extra groups run one dummy token.
    """
    kept: KeyValues = {}
    full_ratios = policy.full_ratios(batch)
    spliced = policy.splice_batch(batch, features, full_ratios)
    hidden = run_packed(
        policy.language, spliced.embeddings, spliced.position_ids, spliced.segment_lengths, keep=kept
    )
    full = hidden[spliced.response_positions]
    compressed, _ = policy.connectors(features, torch.full_like(full_ratios, ratio))
    embeddings = torch.cat([spliced.embeddings, compressed.to(spliced.embeddings.dtype)])
    branches = branch_per_tile(
        spliced,
        batch.tile_to_sample,
        full_length=policy.tokens_per_full_tile,
        compressed_length=policy.vision.num_patches // ratio,
    )
    states = full[branches.response_origin]
    groups = list(_groups(branches.lengths, max_tokens))
    idle = num_groups(len(groups)) - len(groups)  # asked before any runs: others may wait for this answer
    for chosen, tokens in groups:
        hidden = _run(policy, branches, chosen, embeddings[branches.tokens[tokens]], tokens, kept)
        places = branches.response_places - tokens.start
        here = ((places >= 0) & (places < len(hidden))).nonzero().squeeze(1)
        states[here] = hidden[places[here]]
    for _ in range(idle):
        run_packed(policy.language, spliced.embeddings[:1], spliced.position_ids[:1], [1])
    return BranchStates(
        full=full,
        branches=states,
        response_branch=branches.response_branch,
        response_origin=branches.response_origin,
    )


def branch_per_tile(
    spliced: Spliced, tile_to_sample: Int64[Tensor, " T"], *, full_length: int, compressed_length: int
) -> Branches:
    """Find the tokens of every branch in a batch at full tokens, `full_length` per tile."""
    sample_lengths = torch.tensor(spliced.segment_lengths, device=tile_to_sample.device)
    sample_ends = sample_lengths.cumsum(0)
    first = (sample_ends - sample_lengths)[tile_to_sample]  # of the sample's tokens
    behind = spliced.tile_starts + full_length  # the first token behind the tile
    lengths = compressed_length + sample_ends[tile_to_sample] - behind

    places, branch = _ranges(torch.zeros_like(lengths), lengths)
    compressed = len(spliced.position_ids) + branch * compressed_length + places
    unchanged = behind[branch] + places - compressed_length
    response_branch, response_origin = _responses(spliced.response_positions, sample_ends, tile_to_sample)
    position = spliced.response_positions[response_origin]
    moved = lengths.cumsum(0) - lengths + compressed_length - behind  # from there to its place here
    return Branches(
        tokens=torch.where(places < compressed_length, compressed, unchanged),
        position_ids=(spliced.tile_starts - first)[branch] + places,
        lengths=lengths.tolist(),
        prefix_starts=first.tolist(),
        prefix_lengths=(spliced.tile_starts - first).tolist(),
        response_branch=response_branch,
        response_origin=response_origin,
        response_places=(position + moved[response_branch]).masked_fill(
            position < spliced.tile_starts[response_branch], -1
        ),
    )


def _responses(positions: Tensor, sample_ends: Tensor, tile_to_sample: Tensor) -> tuple[Tensor, Tensor]:
    """Return for the response tokens of all branches their branch and their number in the batch."""
    sample = torch.bucketize(positions, sample_ends, right=True)
    counts = torch.bincount(sample, minlength=len(sample_ends))
    starts = counts.cumsum(0) - counts
    origin, branch = _ranges(starts[tile_to_sample], counts[tile_to_sample])
    return branch, origin


def _run(
    policy: VisionLanguageModel,
    branches: Branches,
    chosen: slice,
    embeddings: Float[Tensor, "S D"],
    tokens: slice,
    kept: KeyValues,
) -> Float[Tensor, "S D"]:
    prefixes = Prefixes(
        kept=kept, starts=branches.prefix_starts[chosen], lengths=branches.prefix_lengths[chosen]
    )
    positions, lengths = branches.position_ids[tokens], branches.lengths[chosen]
    return run_packed(policy.language, embeddings, positions, lengths, prefixes=prefixes)


def _ranges(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the concatenation of `start .. start + length` and which range each entry comes from."""
    owner = torch.arange(len(starts), device=starts.device).repeat_interleave(lengths)
    offsets = torch.arange(len(owner), device=starts.device) - (lengths.cumsum(0) - lengths)[owner]
    return starts[owner] + offsets, owner


def _groups(lengths: list[int], max_tokens: int) -> Iterator[tuple[slice, slice]]:
    """Cut neighbours into groups of at most `max_tokens`; yields their numbers and their tokens.

    >>> [(group.start, group.stop, tokens.stop) for group, tokens in _groups([2, 2, 5, 1], 4)]
    [(0, 2, 4), (2, 3, 9), (3, 4, 10)]
    """
    first = begin = end = 0
    for number, length in enumerate(lengths):
        if number > first and end + length - begin > max_tokens:
            yield slice(first, number), slice(begin, end)
            first, begin = number, end
        end += length
    if lengths:
        yield slice(first, len(lengths)), slice(begin, end)
