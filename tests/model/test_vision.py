import torch

from tests.helpers import TILE, WIDTH, tiny_spec
from vico_pl.model.vision import VisionEncoder

CONFIG = tiny_spec().vision


def encoder(**changes):
    torch.manual_seed(0)
    return VisionEncoder({**CONFIG, **changes}).eval()


def tiles(count, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, TILE, TILE), generator=generator, dtype=torch.uint8)


def test_it_returns_the_normalised_patch_tokens_of_the_tower_without_the_class_token():
    module, x = encoder(image_mean=(0.5, 0.25, 0.125), image_std=(0.5, 0.2, 0.1)), tiles(2)
    mean = torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)
    std = torch.tensor([0.5, 0.2, 0.1]).view(3, 1, 1)
    module.tower.output_tokens = True  # open_clip's own way to patch tokens
    _, expected = module.tower((x / 255 - mean) / std)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_patches_are_numbered_row_by_row():
    module, changed = encoder(), tiles(1)
    before = changed.clone()
    changed[0, :, 8:16, 24:32] += 90  # row 1, column 3 of 4 x 4 patches of 8 px
    moved = (module(changed) - module(before)).abs().sum(-1)[0]
    assert moved.argmax() == 7


def test_every_tile_is_encoded_by_itself():
    module, x = encoder(), tiles(3)
    torch.testing.assert_close(module(x)[1], module(x[1:2])[0], rtol=1e-4, atol=1e-5)
    assert module(x).shape == (3, 16, WIDTH)


def test_no_tiles_give_no_features():
    assert encoder()(tiles(0)).shape == (0, 16, WIDTH)


def test_the_configuration_is_left_as_it_was():
    config = {**CONFIG, "image_mean": (0.5, 0.5, 0.5)}
    VisionEncoder(config)
    assert config == {**CONFIG, "image_mean": (0.5, 0.5, 0.5)}


def test_every_parameter_takes_part_in_the_patch_features():
    module = encoder().train()
    weights = torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(3))
    (module(tiles(2)) * weights).sum().backward()
    without = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert without == []  # under DDP such parameters leave the other ranks waiting
