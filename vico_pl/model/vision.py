"""Tiles -> patch features: an open_clip tower behind pixel normalisation."""

from typing import Any

import open_clip
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

# The towers' text halves are never used; this is the smallest one that open_clip builds.
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


class VisionEncoder(nn.Module):
    """An open_clip vision tower that returns the normalised patch tokens of its last layer."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        """Build the tower from an open_clip `vision_cfg` plus optional `image_mean` and `image_std`."""
        super().__init__()
        config = dict(config)
        mean = config.pop("image_mean", open_clip.OPENAI_DATASET_MEAN)
        std = config.pop("image_std", open_clip.OPENAI_DATASET_STD)
        self.tower = open_clip.CLIP(embed_dim=8, vision_cfg=config, text_cfg=_NO_TEXT).visual
        self.tower.proj = None  # the pooled image embedding is not used, so its projection would never train
        self.width: int = config["width"]
        self.tile_size: int = config["image_size"]
        self.num_patches: int = (config["image_size"] // config["patch_size"]) ** 2
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)

    def forward(self, tiles: UInt8[Tensor, "T 3 H W"]) -> Float[Tensor, "T P C"]:
        """Encode tiles; the class token is dropped.

        Without tiles a blank one is encoded and dropped, so that every parameter takes part on every rank.
        """
        some_tiles = tiles if len(tiles) else tiles.new_zeros(1, *tiles.shape[1:])
        pixels = (some_tiles - self.mean) / self.std
        output = self.tower.forward_intermediates(
            pixels, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
        )
        return output["image_intermediates"][-1][: len(tiles)]
