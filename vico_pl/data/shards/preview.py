"""A contact sheet: samples as a person can read them, each image above its questions and answers."""

from collections.abc import Iterator, Sequence

import PIL.Image
from PIL import ImageDraw, ImageFont

from vico_pl.data.decode import IMAGE_TOKEN
from vico_pl.types import Image, Sample

MIN_CELL, MAX_CELL = 480, 1000  # px: a cell is as wide as the widest image, within these
MAX_SCALE = 3.0  # larger, small images are only blurred
GAP = 20  # px between cells
TEXT_SIZE = 17  # px
GROUND, INK, MUTED, EDGE = "#ffffff", "#1b1f24", "#6b7280", "#c4c9d1"


def contact_sheet(samples: Sequence[Sample], *, columns: int = 4) -> PIL.Image.Image:
    """Draw samples in rows of `columns`; long texts are wrapped, never cut.

    Raises:
        ValueError: there is no sample, or no column to put it in.
    """
    if not samples or columns < 1:
        raise ValueError(f"{len(samples)} samples in {columns} columns: expected at least one of each")
    width = _cell_width(samples)
    cells = [_draw_sample(sample, width=width) for sample in samples]
    rows = [beside(cells[i : i + columns], gap=GAP) for i in range(0, len(cells), columns)]
    return _with_margin(below(rows, gap=2 * GAP))


def text_block(text: str, *, width: int, size: int = TEXT_SIZE, colour: str = INK) -> PIL.Image.Image:
    """Set a text on white ground, wrapped to `width` pixels."""
    font = ImageFont.load_default(size)
    lines = [line for paragraph in text.splitlines() for line in _wrap(paragraph, font=font, width=width)]
    pitch = round(1.35 * size)
    block = PIL.Image.new("RGB", (width, max(1, pitch * len(lines))), GROUND)
    draw = ImageDraw.Draw(block)
    for index, line in enumerate(lines):
        draw.text((0, index * pitch), line, font=font, fill=colour)
    return block


def beside(pictures: Sequence[PIL.Image.Image], *, gap: int) -> PIL.Image.Image:
    """Put pictures side by side on white ground, tops aligned."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    page = PIL.Image.new("RGB", (width, max(picture.height for picture in pictures)), GROUND)
    x = 0
    for picture in pictures:
        page.paste(picture, (x, 0))
        x += picture.width + gap
    return page


def below(pictures: Sequence[PIL.Image.Image], *, gap: int) -> PIL.Image.Image:
    """Put pictures below one another on white ground, left sides aligned."""
    height = sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)
    page = PIL.Image.new("RGB", (max(picture.width for picture in pictures), height), GROUND)
    y = 0
    for picture in pictures:
        page.paste(picture, (0, y))
        y += picture.height + gap
    return page


def to_pillow(image: Image) -> PIL.Image.Image:
    """Turn a decoded image into a Pillow one."""
    return PIL.Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def _cell_width(samples: Sequence[Sample]) -> int:
    widest = max((image.shape[2] for sample in samples for image in sample.images), default=0)
    return min(max(widest, MIN_CELL), MAX_CELL)


def _draw_sample(sample: Sample, *, width: int) -> PIL.Image.Image:
    parts = [text_block(sample.id, width=width, size=TEXT_SIZE - 3, colour=MUTED)]
    parts += [_enlarge(to_pillow(image), width=width) for image in sample.images]
    parts += [text_block(line, width=width) for line in _exchanges(sample)]
    return below(parts, gap=6)


def _exchanges(sample: Sample) -> Iterator[str]:
    for question, answer in zip(sample.turns[::2], sample.turns[1::2], strict=True):
        yield f"{question.text.replace(IMAGE_TOKEN, '').strip()}  ->  {answer.text.strip()}"


def _enlarge(picture: PIL.Image.Image, *, width: int) -> PIL.Image.Image:
    scale = min(MAX_SCALE, width / picture.width)
    size = (max(1, round(scale * picture.width)), max(1, round(scale * picture.height)))
    resized = picture.resize(size, PIL.Image.Resampling.LANCZOS)
    ImageDraw.Draw(resized).rectangle((0, 0, size[0] - 1, size[1] - 1), outline=EDGE)
    return resized


def _wrap(text: str, *, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    """Break between words, and inside a word that is wider than a whole line."""
    line = ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            yield line
        *full, line = _split_word(word, font=font, width=width)
        yield from full
    yield line


def _split_word(word: str, *, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    pieces = [""]
    for character in word:
        if pieces[-1] and font.getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def _with_margin(picture: PIL.Image.Image) -> PIL.Image.Image:
    page = PIL.Image.new("RGB", (picture.width + 2 * GAP, picture.height + 2 * GAP), GROUND)
    page.paste(picture, (GAP, GAP))
    return page
