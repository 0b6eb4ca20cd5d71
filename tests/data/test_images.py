"""Images as the world has them: every kind of file, turned, transparent, too large, cut short."""

import io
import resource
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torchvision.io import ImageReadMode, decode_image

from tests.support.hostile import png
from tests.support.tiny import encoded_image, record
from vico_pl.data.decode import ImageLimits, decode_record
from vico_pl.errors import RecordError

RNG = np.random.default_rng(0)
PICTURE = Image.open(io.BytesIO(encoded_image("PNG", size=(40, 30))))
ALPHA = Image.fromarray(RNG.integers(0, 256, (30, 40), dtype=np.uint8))


def saved(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def decoded(content, name="jpg", **limits):
    broken = record(files={"jpg": None, name: content})
    return decode_record(broken, ImageLimits(**limits)).images[0].permute(1, 2, 0).numpy()


def refused(content, **limits):
    with pytest.raises(RecordError) as caught:
        decoded(content, **limits)
    return caught.value.kind, str(caught.value)


def rgb(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


ORDINARY = {
    "baseline JPEG": saved(PICTURE, "JPEG"),
    "progressive JPEG": saved(PICTURE, "JPEG", progressive=True),
    "JPEG at full colour resolution": saved(PICTURE, "JPEG", subsampling=0),
    "grey JPEG": saved(PICTURE.convert("L"), "JPEG"),
    "CMYK JPEG": saved(PICTURE.convert("CMYK"), "JPEG"),
    "photo with a second picture behind it": saved(
        PICTURE, "MPO", save_all=True, append_images=[PICTURE.rotate(180)]
    ),
    "PNG": saved(PICTURE, "PNG"),
    "palette PNG": saved(PICTURE.convert("P"), "PNG"),
    "grey PNG": saved(PICTURE.convert("L"), "PNG"),
    "black and white PNG": saved(PICTURE.convert("1"), "PNG"),
    "WebP": saved(PICTURE, "WEBP"),
    "lossless WebP": saved(PICTURE, "WEBP", lossless=True),
    "GIF": saved(PICTURE, "GIF"),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_every_kind_of_file_is_read_by_its_content_whatever_its_name(name):
    for extension in ("jpg", "png", "webp"):
        assert np.array_equal(decoded(ORDINARY[name], extension), rgb(ORDINARY[name]))


@pytest.mark.parametrize("name", ["baseline JPEG", "progressive JPEG", "PNG", "grey PNG"])
def test_ordinary_images_have_the_pixels_that_published_figures_were_made_with(name):
    data = torch.frombuffer(bytearray(ORDINARY[name]), dtype=torch.uint8)
    before = decode_image(data, ImageReadMode.RGB).permute(1, 2, 0).numpy()
    assert np.array_equal(decoded(ORDINARY[name]), before)


def test_a_jpeg_of_luma_chroma_and_black_is_read_as_such():
    cmyk = saved(PICTURE.convert("CMYK"), "JPEG")
    place = cmyk.index(b"Adobe") + 11  # its colour transform: 0 none, 2 YCCK
    ycck = cmyk[:place] + b"\x02" + cmyk[place + 1 :]
    assert np.array_equal(decoded(ycck), rgb(ycck))
    assert not np.array_equal(decoded(ycck), decoded(cmyk))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_images_are_turned_as_their_exif_says(image_format, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    content = saved(PICTURE, image_format, exif=exif.tobytes())
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert np.array_equal(decoded(content), np.asarray(turned))
    assert decoded(content).shape[:2] == ((30, 40) if orientation < 5 else (40, 30))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_turns_nothing(image_format):
    content = saved(PICTURE, image_format, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decoded(content).shape == (30, 40, 3)


@pytest.mark.parametrize(("image_format", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA")])
def test_what_is_transparent_is_white(image_format, mode):
    picture = PICTURE.convert(mode)
    picture.putalpha(ALPHA)
    found = decoded(saved(picture, image_format, lossless=True)).astype(float)
    colours = np.asarray(picture.convert("RGB")).astype(float)
    share = np.asarray(ALPHA)[..., None] / 255
    assert np.abs(found - (share * colours + (1 - share) * 255)).max() <= 1


def test_a_transparent_colour_of_a_palette_is_white():
    palette = PICTURE.convert("P")
    colour = palette.getpixel((0, 0))
    found = decoded(saved(palette, "PNG", transparency=colour))
    transparent = np.asarray(palette) == colour
    assert (found[transparent] == 255).all()
    assert np.array_equal(found[~transparent], np.asarray(palette.convert("RGB"))[~transparent])


def test_sixteen_bits_become_eight():
    rows = b"".join(b"\0" + RNG.integers(0, 256, 6, dtype=np.uint8).tobytes() * 5 for _ in range(4))
    high_bytes = np.frombuffer(rows, np.uint8).reshape(4, 31)[:, 1::2].reshape(4, 5, 3)
    assert np.array_equal(decoded(png(5, 4, bits=16, data=rows)), high_bytes)


def test_interlaced_pngs_are_put_together():
    content = png(1, 1, colour=0, data=b"\0\x7b", interlace=1)
    assert decoded(content).tolist() == [[[123, 123, 123]]]


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_files_cut_short_are_refused(image_format, share):
    content = encoded_image(image_format, size=(200, 150))
    assert refused(content[: int(len(content) * share)])[0] == "image"


@pytest.mark.parametrize("side", [10_001, 60_000, 2**31 - 1])
def test_a_decompression_bomb_costs_nothing(side):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kind, message = refused(png(side, side))
    assert (kind, f"{side} x {side}" in message or "exceeds limit" in message) == ("image_limit", True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_limits_of_pixels_bytes_sides_and_scans_are_reported():
    assert "40 x 30 pixels are more than max_pixels (1199)" in refused(ORDINARY["PNG"], max_pixels=1199)[1]
    assert decoded(ORDINARY["PNG"], max_pixels=1200, min_side=30).shape == (30, 40, 3)
    assert "a side is shorter than min_side (31)" in refused(ORDINARY["WebP"], min_side=31)[1]
    assert "expected 1 to 99 bytes" in refused(ORDINARY["PNG"], max_bytes=99)[1]
    many_scans = ORDINARY["progressive JPEG"] + b"\xff\xda" * 100
    assert refused(many_scans)[0] == "image_limit"


def test_a_transparent_grey_of_sixteen_bits_is_white():
    values = np.array([[300, 5 * 257, 65535, 301]], dtype=np.uint16)
    found = decoded(saved(Image.fromarray(values), "PNG", transparency=300))
    assert found[0].tolist() == [[255] * 3, [5] * 3, [255] * 3, [1] * 3]


def test_a_transparent_colour_of_sixteen_bits_is_white():
    colours = np.array([[0x1234, 0x5678, 0x9ABC], [0x4321, 0x5678, 0x9ABC]], dtype=">u2")
    content = png(2, 1, bits=16, data=b"\0" + colours.tobytes())
    named = b"tRNS" + colours[0].tobytes()
    place = content.index(b"IDAT") - 4
    chunk = struct.pack(">I", 6) + named + struct.pack(">I", zlib.crc32(named))
    found = decoded(content[:place] + chunk + content[place:])
    assert found[0].tolist() == [[255] * 3, [0x43, 0x56, 0x9A]]


def test_long_texts_of_a_png_are_no_fault_of_the_image():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "node " * 300_000, zip=True)
    assert np.array_equal(decoded(saved(PICTURE, "PNG", pnginfo=texts)), np.asarray(PICTURE))
