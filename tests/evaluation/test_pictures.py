import json

import numpy as np
import PIL.Image
import PIL.ImageColor
import pytest
import torch

from tests.support.folders import write_set
from vico_pl.data.decode import read_image
from vico_pl.data.tiling import tile_image
from vico_pl.evaluation.answering import EvalQuestion, Result
from vico_pl.evaluation.evaluate import RoutedExample
from vico_pl.evaluation.questions import open_questions
from vico_pl.evaluation.report import COMPRESSED, KEPT, build_gallery, routing_picture

COLOURS = ["#ff0000", "#00ff00", "#0000ff"]


def png(folder, colour, size=(64, 64)):
    path = folder / f"{colour[1:]}.png"
    PIL.Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def coloured(tmp_path):
    """A set of a red, a broken, a green and a blue image."""
    turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "?"}]
    annotation = json.dumps({"conversations": turns}).encode()
    images = [png(tmp_path, colour).read_bytes() for colour in COLOURS]
    images.insert(1, b"broken")
    records = [(str(i), {"png": image, "json": annotation}) for i, image in enumerate(images)]
    return write_set(tmp_path / "coloured", records)


def example(sample, ratios):
    question = EvalQuestion(
        sample=sample, group="ocr", metric="exact", prompt=("<image>\nWhich?",), answers=("green",)
    )
    results = {"full": Result("green", 1), "router": Result("grey", 0)}
    return RoutedExample(question=question, ratios=ratios, token_fraction=0.5, **results)


def area_of(picture, colour):
    return (np.asarray(picture.convert("RGB")) == PIL.ImageColor.getrgb(colour)).all(-1).mean()


def test_items_show_the_images_of_their_samples_though_a_record_before_is_bad(predictor, coloured):
    questions = open_questions(predictor, coloured)
    items = build_gallery(questions, [example(2, [4] * 5), example(1, [4, 16, 4, 16, 16])])
    assert [example.question.sample for example, _ in items] == [2, 1], "in the order of the examples"
    (_, blue), (_, green) = items
    assert area_of(green, COLOURS[1]) > 0.1
    assert area_of(blue, COLOURS[2]) > 0.1
    for picture, others in ((green, (COLOURS[0], COLOURS[2])), (blue, COLOURS[:2])):
        assert [area_of(picture, colour) for colour in others] == [0, 0]


def test_compressed_tiles_are_dimmed_in_their_place_and_framed_in_their_colour(predictor, tmp_path):
    image = read_image(png(tmp_path, COLOURS[1]))
    none, one, all_but_thumbnail = (
        area_of(routing_picture(predictor, image, ratios), COLOURS[1])
        for ratios in ([4] * 5, [16, 4, 4, 4, 4], [16, 16, 16, 16, 4])
    )
    assert none > one > all_but_thumbnail > 0
    kept, compressed = (routing_picture(predictor, image, [ratio] * 5) for ratio in (4, 16))
    assert area_of(kept, KEPT) > 0.01 > area_of(kept, COMPRESSED)
    assert area_of(compressed, COMPRESSED) > 0.01 > area_of(compressed, KEPT)


@torch.no_grad()
@pytest.mark.parametrize(("size", "tiles"), [((32, 32), 1), ((64, 32), 3), ((64, 64), 5)])
def test_an_image_is_routed_tile_by_tile_with_the_thumbnail_last(predictor, tmp_path, size, tiles):
    image = read_image(png(tmp_path, COLOURS[0], size))
    features = predictor.model.encode_tiles(tile_image(image, predictor.tiling))
    ratios = predictor.route(image).ratios
    assert ratios == predictor.choose_ratios(features).tolist()
    assert len(ratios) == tiles
    assert routing_picture(predictor, image, ratios).width > 100


def test_tiles_show_their_part_of_the_image_and_a_long_caption_is_wrapped(predictor):
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[0, :, 32:] = 255  # the right half is red
    short, long = (
        np.asarray(routing_picture(predictor, image, [4] * 5, caption=text)).astype(int)
        for text in ("a", "word " * 60)
    )
    red = (short[:, :, 0] > 200) & (short[:, :, 1:] < 60).all(-1)
    assert np.flatnonzero(red.mean(0) > 0.3).min() > short.shape[1] / 4, "the left column of tiles has none"
    assert long.shape[1] == short.shape[1], "the picture gets no wider"
    assert (long != 255).any(-1).sum() > (short != 255).any(-1).sum()
