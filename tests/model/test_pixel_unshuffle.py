import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vico_pl.model.pixel_unshuffle import pixel_unshuffle


def internvl_pixel_shuffle(x, scale_factor):
    """`InternVLChatModel.pixel_shuffle` with `ps_version: v2`, on a (n, w, h, c) grid."""
    n, w, h, c = x.size()
    x = x.view(n, w, int(h * scale_factor), int(c / scale_factor))
    x = x.permute(0, 2, 1, 3).contiguous()
    x = x.view(n, int(h * scale_factor), int(w * scale_factor), int(c / (scale_factor * scale_factor)))
    return x.permute(0, 2, 1, 3).contiguous()


@given(
    tiles=st.integers(0, 3), blocks=st.integers(1, 4), factor=st.sampled_from([1, 2, 4]), c=st.integers(1, 3)
)
def test_it_equals_the_published_pixel_shuffle_v2(tiles, blocks, factor, c):
    side = blocks * factor
    features = torch.arange(tiles * side * side * c, dtype=torch.float32).view(tiles, side * side, c)
    published = internvl_pixel_shuffle(features.view(tiles, side, side, c), 1 / factor)
    expected = published.reshape(tiles, blocks * blocks, factor * factor * c)
    assert torch.equal(pixel_unshuffle(features, factor), expected)


def test_the_worked_example():
    patches = torch.arange(16.0).view(1, 16, 1)  # a 4 x 4 grid of patch numbers
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert pixel_unshuffle(patches, 2)[0].tolist() == expected


def test_folding_by_four_is_not_folding_twice_by_two():
    patches = torch.arange(16.0).view(1, 16, 1)
    at_once = pixel_unshuffle(patches, 4)
    assert at_once.flatten().tolist() == list(range(16))
    assert not torch.equal(at_once, pixel_unshuffle(pixel_unshuffle(patches, 2), 2))


@pytest.mark.parametrize(("num_patches", "factor"), [(15, 1), (16, 3), (36, 4)])
def test_grids_that_do_not_fold_are_refused(num_patches, factor):
    with pytest.raises(
        ValueError, match=f"{num_patches} patches per tile do not fold by {factor} x {factor}"
    ):
        pixel_unshuffle(torch.zeros(1, num_patches, 2), factor)
