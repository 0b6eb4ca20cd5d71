"""The types that cross a boundary, and the letters that name their shapes.

    B  samples in a batch              S  sequence after expansion (flat over the batch)
    T  tiles, flat over the batch      R  response tokens, flat over the batch
    P  patches per tile                C  width of the vision encoder
    N  vision tokens of one tile       D  width of the language model
    L  tokens before expansion, flat   V  vocabulary
    H, W  height and width in pixels

One sample goes through them in the order below:
shard -> Record -> Sample -> TiledSample -> EncodedSample -> Batch -> RankBatch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

Role = Literal["human", "gpt"]
Image = UInt8[Tensor, "3 H W"]
Content = bytes | memoryview  # of a file


@dataclass(frozen=True, kw_only=True)
class Record:
    """The raw bytes of one sample as a shard holds them."""

    shard: str  # file name of the shard
    key: str  # the part of the member names before the first dot
    files: Mapping[str, Content]  # member extension -> content: {"jpg": ..., "json": ...}

    @property
    def id(self) -> str:
        """Name that is unique within a data set, for logs and audits."""
        return f"{self.shard}/{self.key}"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of a conversation."""

    role: Role
    text: str
    # Of an answer in an evaluation set:
    group: str | None = None  # what its score is reported under, such as "ocr"
    metric: str | None = None  # name of its scorer, see vico_pl/evaluation/scorers.py
    answers: tuple[str, ...] = ()  # all accepted answers; empty: only `text`


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A decoded record: images and the conversation about them."""

    id: str
    images: list[UInt8[Tensor, "3 _ _"]]  # each of its own height and width
    turns: list[Turn]
    metadata: dict[str, Any]  # further fields of the record's JSON, untouched


@dataclass(frozen=True, kw_only=True)
class TiledSample:
    """A sample whose images are cut into tiles, each image's thumbnail last."""

    id: str
    tiles: UInt8[Tensor, "t 3 H W"]
    tiles_per_image: list[int]
    turns: list[Turn]
    metadata: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """A sample as token ids, with one placeholder per tile."""

    id: str
    tiles: UInt8[Tensor, "t 3 H W"]
    tiles_per_image: list[int]
    input_ids: Int64[Tensor, " l"]
    response_mask: Bool[Tensor, " l"]  # True: the token is part of a response and carries loss


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that could not be used, and why. It keeps its position in the order but is in no batch."""

    id: str
    reason: str
    kind: str = "other"  # category to count it under, see data/README.md
    source: str = ""  # as the recipe names it


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples laid end to end, without padding; lengths say where each one ends."""

    ids: list[str]
    positions: list[int]  # of each sample in the order of the run; -1: the dummy sample
    tiles: UInt8[Tensor, "T 3 H W"]
    tiles_per_image: list[list[int]]  # of each sample
    tile_to_sample: Int64[Tensor, " T"]
    input_ids: Int64[Tensor, " L"]  # one placeholder per tile, in the order of `tiles`
    response_mask: Bool[Tensor, " L"]
    sample_lengths: Int64[Tensor, " B"]  # tokens before expansion
    response_lengths: list[int]  # of each sample; spares a look at the mask, which may be on a GPU

    @property
    def num_samples(self) -> int:
        """Samples in the batch."""
        return len(self.ids)

    @property
    def num_tiles(self) -> int:
        """Tiles in the batch, thumbnails counted."""
        return self.tiles.shape[0]

    @property
    def num_response_tokens(self) -> int:
        """R, the response tokens of all samples."""
        return sum(self.response_lengths)

    @property
    def tile_positions(self) -> list[int]:
        """Position of each tile's sample in the order of the run; -1: the dummy sample's."""
        counts = map(sum, self.tiles_per_image)
        return [p for p, count in zip(self.positions, counts, strict=True) for _ in range(count)]

    @property
    def sample_tiles(self) -> list[int]:
        """Indices of all tiles but the dummy sample's."""
        return [tile for tile, position in enumerate(self.tile_positions) if position >= 0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Return the batch with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Return the batch with every tensor in pinned memory (called by the DataLoader)."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: function(tensor) for name, tensor in tensors.items()}
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class RankBatch:
    """A rank's part of an optimizer step: micro-batches, which go through the model one at a time."""

    micro_batches: list[Batch]  # each with at least one tile
    bad_records: list[BadRecord]
    dummy: Batch  # where other ranks have more micro-batches: one tile, no response, so no gradient

    @property
    def ids(self) -> list[str]:
        """Names of the samples."""
        return [name for micro_batch in self.micro_batches for name in micro_batch.ids if name]

    def padded(self, count: int) -> list[Batch]:
        """Return the micro-batches, and dummies up to `count`, the largest number of any rank.

        Ranks plan the same number, but those whose samples were larger than estimated may need more. All run
        as many, as gathering sharded weights is a collective.
        """
        return self.micro_batches + [self.dummy] * (count - len(self.micro_batches))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "RankBatch":
        """Return the rank batch with every tensor on `device`."""
        return self._map(lambda batch: batch.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "RankBatch":
        """Return the rank batch with every tensor in pinned memory (called by the DataLoader)."""
        return self._map(Batch.pin_memory)

    def _map(self, function: Callable[[Batch], Batch]) -> "RankBatch":
        micro_batches = list(map(function, self.micro_batches))
        return replace(self, micro_batches=micro_batches, dummy=function(self.dummy))
