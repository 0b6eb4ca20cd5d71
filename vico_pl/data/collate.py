"""Encoded samples -> one `Batch`, laid end to end."""

from collections.abc import Sequence

import torch

from vico_pl.types import Batch, EncodedSample


def collate(samples: Sequence[EncodedSample], *, positions: Sequence[int] | None = None) -> Batch:
    """Lay samples end to end; `positions` are theirs in the order of a run, if it is not just this one.

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("no sample to make a batch of")
    tiles_per_sample = torch.tensor([len(s.tiles) for s in samples])
    return Batch(
        ids=[s.id for s in samples],
        positions=list(range(len(samples)) if positions is None else positions),
        # Without those that have none: one empty tensor, and the others are laid out anew.
        tiles=torch.cat([s.tiles for s in samples if len(s.tiles)] or [samples[0].tiles]),
        tiles_per_image=[s.tiles_per_image for s in samples],
        tile_to_sample=torch.arange(len(samples)).repeat_interleave(tiles_per_sample),
        input_ids=torch.cat([s.input_ids for s in samples]),
        response_mask=torch.cat([s.response_mask for s in samples]),
        sample_lengths=torch.tensor([len(s.input_ids) for s in samples]),
        num_response_tokens=sum(int(s.response_mask.sum()) for s in samples),
    )
