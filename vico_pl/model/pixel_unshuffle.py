"""Fold neighbouring patches into channels; InternVL calls the same pixel_shuffle (`ps_version: v2`)."""

from jaxtyping import Float
from torch import Tensor


def pixel_unshuffle(features: Float[Tensor, "T P C"], factor: int) -> Float[Tensor, "T N F"]:
    """Fold `factor` x `factor` patches of a square grid into one vector of `factor**2 * C` channels.

    Channels of a folded vector are ordered (row within the block, column within the block, C), and vectors
    row by row, bit for bit as released InternVL weights expect: 4 x 4 patches folded by 2 give 4 vectors, the
    first of them from patches 0, 1, 4 and 5.
    """
    num_tiles, num_patches, channels = features.shape
    side = round(num_patches**0.5)
    if side * side != num_patches or side % factor:
        raise ValueError(f"{num_patches} patches per tile do not fold by {factor} x {factor}")
    blocks = side // factor
    grid = features.view(num_tiles, blocks, factor, blocks, factor, channels)
    return grid.transpose(2, 3).reshape(num_tiles, blocks * blocks, factor * factor * channels)
