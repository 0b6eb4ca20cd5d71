"""Encoded samples -> one `Batch`, laid end to end."""

from collections.abc import Sequence

import torch

from vico_pl.types import Batch, EncodedSample


def collate(
    samples: Sequence[EncodedSample],
    *,
    positions: Sequence[int] | None = None,
) -> Batch:
    """Lay samples end to end; `positions` are those in the order of a run, by default 0, 1, 2, ...

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("no sample to make a batch of")
    tiles_per_sample = torch.tensor([len(s.tiles) for s in samples])
    return Batch(
        ids=[s.id for s in samples],
        positions=list(range(len(samples)) if positions is None else positions),
        # Leave out empty tensors: with one of them, torch.cat copies to another memory format.
        tiles=torch.cat([s.tiles for s in samples if len(s.tiles)] or [samples[0].tiles]),
        tiles_per_image=[s.tiles_per_image for s in samples],
        tile_to_sample=torch.arange(len(samples)).repeat_interleave(tiles_per_sample),
        input_ids=torch.cat([s.input_ids for s in samples]),
        response_mask=torch.cat([s.response_mask for s in samples]),
        sample_lengths=torch.tensor([len(s.input_ids) for s in samples]),
        response_lengths=[int(s.response_mask.sum()) for s in samples],
    )
