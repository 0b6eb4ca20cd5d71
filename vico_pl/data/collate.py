"""Encoded samples -> one `Batch`, laid end to end."""

from collections.abc import Sequence

import torch

from vico_pl.types import BadRecord, Batch, EncodedSample


def collate(items: Sequence[EncodedSample | BadRecord], *, filler: EncodedSample | None = None) -> Batch:
    """Lay samples end to end; bad records are dropped here and only listed.

    `filler` stands in where not one sample is usable: every rank must take the step, and the models need a
    token at least.

    Raises:
        ValueError: not one usable sample, and no filler.
    """
    samples = [item for item in items if isinstance(item, EncodedSample)]
    bad = [item for item in items if isinstance(item, BadRecord)]
    if not samples and filler is not None:
        samples = [filler]
    if not samples:
        first = f"{bad[0].id}: {bad[0].reason}"
        raise ValueError(f"all {len(items)} records of a batch are bad; the first: {first}")
    tiles_per_sample = torch.tensor([len(s.tiles) for s in samples])
    tiles_per_image = torch.tensor([n for s in samples for n in s.tiles_per_image], dtype=torch.int64)
    return Batch(
        ids=[s.id for s in samples],
        tiles=torch.cat([s.tiles for s in samples]),
        tile_to_sample=torch.arange(len(samples)).repeat_interleave(tiles_per_sample),
        tile_to_image=torch.arange(len(tiles_per_image)).repeat_interleave(tiles_per_image),
        input_ids=torch.cat([s.input_ids for s in samples]),
        response_mask=torch.cat([s.response_mask for s in samples]),
        sample_lengths=torch.tensor([len(s.input_ids) for s in samples]),
        bad_records=bad,
    )
