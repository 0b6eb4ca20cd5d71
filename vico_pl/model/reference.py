"""A frozen model beside the trained one."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.types import Batch


class FrozenReference(nn.Module):
    """Holds a model that is never trained, never in training mode and never in a checkpoint.

    It keeps these rules itself: the model inside is no registered submodule, so parameters(), state_dict()
    and train() of a stage do not see it; only moves between devices reach it.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        """Freeze `model`."""
        super().__init__()
        self._hidden = [model.requires_grad_(requires_grad=False).eval()]

    @property
    def model(self) -> VisionLanguageModel:
        """The frozen model."""
        return self._hidden[0]

    @property
    def head(self) -> Float[Tensor, "V D"]:
        """Weight of the frozen output layer."""
        return self.model.head

    @torch.no_grad()
    def response_states(self, batch: Batch) -> Float[Tensor, "R D"]:
        """Return the hidden states that predict the response, every tile at full tokens."""
        features = self.model.encode_tiles(batch.tiles)
        return self.model.response_states(batch, features, self.model.full_ratios(batch))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenReference":  # noqa: FBT001, FBT002
        self.model._apply(fn, recurse)  # noqa: SLF001 - the hook through which nn.Module moves tensors
        return super()._apply(fn, recurse)
