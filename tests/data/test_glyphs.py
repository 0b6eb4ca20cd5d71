import io
import json

import numpy as np
import pytest
from PIL import Image

from vico_pl.data.glyphs import (
    COLOURS,
    READ_QUESTION,
    SHAPES,
    TILE,
    GlyphsConfig,
    choose_questions,
    draw_image,
    draw_records,
    question_words,
)


def records(count=20, *, seed=3, start=0, **settings):
    return list(draw_records(GlyphsConfig(**settings), seed=seed, start=start, count=count))


def annotations(*args, **settings):
    return [json.loads(files["json"]) for _, files in records(*args, **settings)]


def scenes(count=60):
    for seed in range(count):
        rng = np.random.default_rng(seed)
        yield rng, *draw_image(rng, reading_page=False, max_tiles=6)


def answer_from_scene(scene, question):
    """Answer a question from what the image shows, by its words alone."""
    words = question.text.rstrip("?.").split()
    if question.text == "How many shapes are there?":
        return str(scene.kinds.count("shape"))
    if question.text.startswith("What colour"):
        return scene.shapes[words[-1]]
    if question.text.startswith("What is the value"):
        return scene.values[words[-1]]
    a, b = words[-3].rstrip(","), words[-1]  # Which is greater, A or B?
    greater = a if int(scene.values[a]) > int(scene.values[b]) else b
    return f"{a}{scene.values[a]} {b}{scene.values[b]} {greater}"


def test_a_record_depends_on_settings_seed_and_position_alone():
    assert records(6) == records(3) + records(3, start=3)
    assert records(3) != records(3, seed=4)


def test_every_answer_follows_from_the_image_and_no_question_comes_twice():
    skills = set()
    for rng, _, scene in scenes():
        questions = choose_questions(rng, scene, GlyphsConfig(comparisons_per_image=3))
        assert 1 <= len({q.text for q in questions}) == len(questions) <= 8
        for question in questions:
            assert question.answer == answer_from_scene(scene, question), question
            skills.add(question.skill)
    assert skills == {"perception", "reasoning", "ocr"}


def test_a_scene_matches_its_picture():
    for _, image, scene in scenes():
        rows, columns = scene.grid
        assert image.size == (columns * TILE, rows * TILE)
        assert len(scene.kinds) == rows * columns
        assert len(scene.shapes) == scene.kinds.count("shape")
        assert bool(scene.values) == bool({"dense_text", "faint_text"} & set(scene.kinds))
        assert scene.values or scene.shapes, "blank and textured tiles never stand alone"


def test_the_colour_of_a_shape_is_in_its_tile():
    checked = 0
    for _, image, scene in scenes():
        if scene.kinds.count("shape") != 1:
            continue
        place, columns = scene.kinds.index("shape"), scene.grid[1]
        x, y = place % columns * TILE, place // columns * TILE
        pixels = np.asarray(image)[y : y + TILE, x : x + TILE].reshape(-1, 3).astype(int)
        (colour,) = scene.shapes.values()
        distance = np.abs(pixels - np.array(COLOURS[colour])).max(1)
        assert (distance <= 12).sum() > 100
        checked += 1
    assert checked > 10


def test_a_reading_page_asks_for_all_its_text_in_reading_order():
    for annotation in annotations(5, read_fraction=1.0):
        assert annotation["tile_kinds"] == ["dense_text"]
        question, answer = annotation["conversations"]
        assert question["value"] == f"<image>\n{READ_QUESTION}"
        pairs = answer["value"].split()
        assert 11 <= len(pairs) <= 14
        assert all(pair[0].isupper() and pair[1].isdigit() for pair in pairs)
        assert len({pair[0] for pair in pairs}) == len(pairs)


def test_limits_of_tiles_and_questions_hold():
    for key, files in records(30, max_tiles=2, questions_per_image=3):
        image = Image.open(io.BytesIO(files["jpg"]))
        assert image.width * image.height <= 2 * TILE**2
        annotation = json.loads(files["json"])
        assert len(annotation["conversations"]) <= 6
        assert len(annotation["skills"]) == len(annotation["conversations"]) // 2
        assert sum("<image>" in turn["value"] for turn in annotation["conversations"]) == 1
        assert key.isdigit()


def test_the_tokenizers_sentences_hold_every_word_of_the_questions(tokenizer):
    known = set(" ".join(question_words()).replace("?", " ").replace(".", " ").replace(",", " ").split())
    assert {*SHAPES, *COLOURS} <= known
    for annotation in annotations(20):
        for turn in annotation["conversations"]:
            text = turn["value"].removeprefix("<image>\n")
            assert tokenizer.decode(tokenizer.encode(text)) == text
            longer_words = {w.strip("?.,") for w in text.split() if len(w.strip("?.,")) > 2}
            assert longer_words <= known | {w for w in longer_words if w[0].isupper() and w[1].isdigit()}


@pytest.mark.parametrize(
    "settings", [{"max_tiles": 0}, {"max_tiles": 7}, {"questions_per_image": 0}, {"read_fraction": 1.5}]
)
def test_settings_that_no_image_meets_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} is {settings[name]}; expected"):
        GlyphsConfig(**settings)
