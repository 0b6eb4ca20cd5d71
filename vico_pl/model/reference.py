"""The frozen reference model."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vico_pl.model.adapters import adapters_off, own_parameters
from vico_pl.model.vision import switched
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.types import Batch

SHAREABLE_PARTS = ("vision", "language")  # connectors are small, and run otherwise while they are trained


class FrozenReference(nn.Module):
    """Holds a model that is never trained, never in training mode and never in a checkpoint.

    The model inside is not a registered submodule, so parameters(), state_dict() and train() of a stage do
    not see it; only moves between devices reach it.
    """

    def __init__(self, model: VisionLanguageModel, *, beside: VisionLanguageModel | None = None) -> None:
        """Freeze `model`.

        `beside` is a policy that started from the same weights. Parts that it keeps frozen, in the same
        types, are used from there instead of a second copy; adapters and training mode are off there while
        the reference runs, and restored afterwards.
        """
        super().__init__()
        # In a tuple, so that neither is a submodule.
        self._models = (model.requires_grad_(requires_grad=False).eval(), beside)
        for part in SHAREABLE_PARTS if beside is not None else ():
            if _is_frozen_same(getattr(beside, part), getattr(model, part)):
                setattr(model, part, getattr(beside, part))

    @property
    def model(self) -> VisionLanguageModel:
        """The frozen model."""
        return self._models[0]

    @property
    def head(self) -> Float[Tensor, "V D"]:
        """Weight of the frozen output layer."""
        return self.model.head

    @torch.no_grad()
    def response_states(
        self, batch: Batch, *, policy_features: Float[Tensor, "T P C"] | None = None
    ) -> Float[Tensor, "R D"]:
        """Return the hidden states that predict the response, every tile at full tokens.

        `policy_features` are the policy's features of the same tiles; they are reused if both models share a
        vision encoder.
        """
        model, beside = self._models
        shares_vision = beside is not None and beside.vision is model.vision
        with switched(model.modules(), "training", to=False), adapters_off(model):
            if policy_features is None or not shares_vision:
                policy_features = model.encode_tiles(batch.tiles)
            return model.response_states(batch, policy_features.detach(), model.full_ratios(batch))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenReference":  # noqa: FBT001, FBT002
        self.model._apply(fn, recurse)  # noqa: SLF001 - the hook through which nn.Module moves tensors
        return super()._apply(fn, recurse)


def _is_frozen_same(part: nn.Module, copy: nn.Module) -> bool:
    """Say whether a part is frozen, but for adapters, and of the types of its copy."""
    own, types = own_parameters(part), {name: p.dtype for name, p in copy.named_parameters()}
    return not any(p.requires_grad for p in own.values()) and {n: p.dtype for n, p in own.items()} == types
