"""Response hidden states of the frozen reference on disk, for later epochs and later runs.

    FOLDER/FINGERPRINT/PROCESS.states   states of samples, end to end
    FOLDER/FINGERPRINT/PROCESS.index    for each of them an entry: whose they are, and where they lie

The fingerprint stands for the reference and how it computes, a sample's digest for its tiles and tokens:
after a change of either, nothing is found. A process appends to two files of its own and reads those of all.
States are written before their entry, which has their checksum: whenever process or machine dies, what it
tore is not found, and all before it is.
"""

import json
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from struct import Struct
from typing import NamedTuple
from uuid import uuid4
from zlib import crc32

import torch
from jaxtyping import Float
from torch import Tensor

from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.types import Batch

ENTRY = Struct("<16sQII8s")  # digest, then the fields of `_Place` but its path
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
GIB = 2**30


class _Place(NamedTuple):
    """Where the states of a sample lie."""

    path: Path
    start: int  # in bytes
    num_rows: int
    checksum: int
    dtype: bytes  # its name


class ReferenceCache:
    """Serves micro-batches whose samples are all known, and keeps the states of those that are not."""

    served: bool | None = None  # whether the last micro-batch was; none: it had no response

    def __init__(
        self, folder: Path, *, fingerprint: str, width: int, max_gib: float, look_every_s: float = 30.0
    ) -> None:
        """Find what earlier processes kept; what others write meanwhile is looked for at times.

        `max_gib` limits all of `folder`, whatever the fingerprint.

        Raises:
            OSError: the folder cannot be made.
        """
        self._root, self._folder, self._width = folder, folder / fingerprint, width
        self._max_bytes, self._look_every_s = max_gib * GIB, look_every_s
        self._folder.mkdir(parents=True, exist_ok=True)
        self._own = self._folder / uuid4().hex
        self._places: dict[bytes, _Place] = {}
        self._read_up_to: dict[Path, int] = {}  # bytes of each index
        self._is_writing, self._used = True, 0
        self._look()

    def states_of(self, batch: Batch, compute: Callable[[], Float[Tensor, "R D"]]) -> Float[Tensor, "R D"]:
        """Return the reference's states of a micro-batch, computed only if some of them are not here."""
        known = self._read(batch)
        self.served = None if batch.num_response_tokens == 0 else known is not None
        if known is not None:
            return known
        states = compute()
        if self._is_writing:
            self._write(batch, states)
        return states

    def _read(self, batch: Batch) -> Float[Tensor, "R D"] | None:
        """Return the states of a micro-batch; None: some are not here, or there are none."""
        wanted = [(d, n) for d, n in zip(batch.digests, batch.response_lengths, strict=True) if n]
        if not self._has([digest for digest, _ in wanted]):
            return None
        pieces = [self._load(digest, num_rows) for digest, num_rows in wanted]
        found = [piece for piece in pieces if piece is not None]
        if not found or len(found) < len(pieces):
            return None
        states, device = torch.cat(found), batch.tiles.device
        if device.type == "cuda":
            return states.pin_memory().to(device, non_blocking=True)
        return states.to(device)

    def _has(self, digests: list[bytes]) -> bool:
        """Say whether there is an entry for each; looks at times what others wrote before it says no."""
        missing = [digest for digest in digests if digest not in self._places]
        if missing and time.monotonic() - self._looked_at >= self._look_every_s:
            self._look()
        return all(digest in self._places for digest in missing)

    def _load(self, digest: bytes, num_rows: int) -> Float[Tensor, "r D"] | None:
        """Return the states of a sample; if they are not what their entry says, forget about them."""
        place = self._places.pop(digest, None)
        dtype = None if place is None else DTYPES.get(place.dtype.rstrip(b"\0").decode("ascii", "replace"))
        if place is None or dtype is None or place.num_rows != num_rows:
            return None
        content = bytearray(num_rows * self._width * dtype.itemsize)
        try:
            with place.path.open("rb") as file:
                file.seek(place.start)
                file.readinto(content)
        except (OSError, ValueError):  # somebody made room, or the index is torn: as good as absent
            return None
        if crc32(content) != place.checksum:
            return None
        self._places[digest] = place
        return torch.frombuffer(content, dtype=dtype).view(num_rows, self._width)

    def _write(self, batch: Batch, states: Float[Tensor, "R D"]) -> None:
        """Keep the states of those samples of a micro-batch that are not here yet; waits for them on a GPU."""
        pieces = zip(batch.digests, states.cpu().split(batch.response_lengths), strict=True)
        new = {d: piece for d, piece in pieces if len(piece) and d not in self._places}
        size = sum(piece.nbytes + ENTRY.size for piece in new.values())
        if self._used + size > self._max_bytes:
            limit = f"its limit of {self._max_bytes / GIB:g} GiB, consistency.reference_cache_gib"
            self._stop_writing(f"it would exceed {limit}; remove folders in it that no run uses, or raise it")
            return
        try:
            self._append(new)
            self._used += size
        except OSError as error:
            self._stop_writing(f"it cannot be written to ({error})")

    def _append(self, new: dict[bytes, Float[Tensor, "_ D"]]) -> None:
        path, places = self._own.with_suffix(".states"), {}
        with path.open("ab") as file:
            for digest, piece in new.items():
                content = piece.contiguous().view(torch.uint8).numpy().data
                name = str(piece.dtype).removeprefix("torch.").encode()
                places[digest] = _Place(path, file.tell(), len(piece), crc32(content), name)
                file.write(content)
        with self._own.with_suffix(".index").open("ab") as file:
            file.write(b"".join(ENTRY.pack(digest, *place[1:]) for digest, place in places.items()))
        self._places |= places

    def _look(self) -> None:
        """Read what was added to the indexes of all processes, and how much the folder holds."""
        self._looked_at = time.monotonic()
        with suppress(FileNotFoundError):  # somebody makes room
            for path in self._folder.glob("*.index"):
                self._read_index(path)
            self._used = sum(path.stat().st_size for path in self._root.glob("*/*"))

    def _read_index(self, path: Path) -> None:
        start, states = self._read_up_to.get(path, 0), path.with_suffix(".states")
        with path.open("rb") as file:
            file.seek(start)
            added = file.read()
        whole = added[: len(added) // ENTRY.size * ENTRY.size]  # the last entry may be torn or still come
        self._read_up_to[path] = start + len(whole)
        for digest, *place in ENTRY.iter_unpack(whole):
            self._places[digest] = _Place(states, *place)

    def _stop_writing(self, reason: str) -> None:
        """Say once that no more is kept; what is here goes on to be used."""
        self._is_writing = False
        warnings.warn(f"{self._root}: no more states of the reference are kept: {reason}", stacklevel=2)


def fingerprint(model: VisionLanguageModel, **settings: str) -> str:
    """Return what stands for a model with all its weights, and for settings that its states depend on."""
    digest = blake2b(digest_size=8)
    digest.update(json.dumps([ENTRY.format, asdict(model.spec), settings], sort_keys=True).encode())
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
