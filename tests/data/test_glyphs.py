import io
import json
from functools import cache

import numpy as np
import pytest
from PIL import Image

from vico_pl.data.glyphs import GRIDS, GlyphsConfig, draw_records, question_words
from vico_pl.data.glyphs.free import CONTRAST, FONTS, LARGE, OTHER_FONTS, OTHER_SIZES, SMALL, draw_image
from vico_pl.data.glyphs.scene import COLOURS, READ_QUESTION, SHAPES, TILE, choose_questions


def records(count=20, *, seed=3, start=0, **settings):
    return list(
        draw_records(GlyphsConfig(**{"layout": "free"} | settings), seed=seed, start=start, count=count)
    )


def annotations(*args, **settings):
    return [json.loads(files["json"]) for _, files in records(*args, **settings)]


def pixels_of(files):
    return np.asarray(Image.open(io.BytesIO(files["jpg"])).convert("RGB")).astype(int)


@cache
def pages(count=120, lookalikes=0.0):
    drawn = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        grids = [GRIDS[seed % len(GRIDS)]]
        drawn.append(
            (rng, *draw_image(rng, grids, only="", max_pairs=16, lookalikes=lookalikes, shift="none"))
        )
    return drawn


def answer_from_scene(scene, question):
    """Answer a question from what the image shows, by its words alone."""
    words = question.text.rstrip("?.").split()
    if question.text == "How many shapes are there?":
        return str(len(scene.shapes))
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
    assert records(6, layout="aligned") == records(3, layout="aligned") + records(
        3, start=3, layout="aligned"
    )


def test_every_answer_follows_from_the_page_and_no_question_comes_twice():
    skills = set()
    for rng, _, scene in pages():
        questions = choose_questions(rng, scene, count=8, comparisons=3)
        assert 1 <= len({q.text for q in questions}) == len(questions) <= 8
        for question in questions:
            assert question.answer == answer_from_scene(scene, question), question
            skills.add(question.skill)
    assert skills == {"perception", "reasoning", "ocr"}


def test_a_page_has_whole_tiles_and_something_to_ask_about():
    for number, (_, image, scene) in enumerate(pages()):
        rows, columns = GRIDS[number % len(GRIDS)]
        assert image.size == (columns * TILE, rows * TILE)
        assert scene.values or scene.shapes


def test_content_lies_at_any_offset_and_crosses_tile_borders():
    """Shapes in pure colours are found by their pixels."""
    offsets, crossing = set(), 0
    for _, image, scene in pages():
        if len(scene.shapes) != 1:
            continue
        (colour,) = scene.shapes.values()
        near = np.abs(np.asarray(image).astype(int) - np.array(COLOURS[colour])).max(2) <= 12
        rows, columns = near.nonzero()
        if not 60 < len(rows) < 2500:
            continue
        offsets.add((int(rows.min()) % 8, int(columns.min()) % 8))
        crossing += rows.min() // TILE < rows.max() // TILE or columns.min() // TILE < columns.max() // TILE
    assert len(offsets) > 15
    assert crossing > 5


def test_pairs_that_a_tile_border_cuts_are_shown_but_not_asked_about():
    cut = [scene.letters - scene.values.keys() for _, _, scene in pages()]
    assert sum(map(len, cut)) > 20
    for _, _, scene in pages():
        assert scene.values.keys() <= scene.letters


def test_ink_stands_out_from_its_ground_and_grounds_go_from_white_to_dark():
    grounds = []
    for _, image, scene in pages():
        grey = np.asarray(image.convert("L")).astype(int)
        grounds.append(int(np.median(grey)))
        if scene.values and not scene.shapes:
            assert grey.max() - grey.min() >= 0.8 * CONTRAST
    assert min(grounds) < 60
    assert max(grounds) > 240


def test_a_reading_page_asks_for_all_its_text_in_reading_order():
    for annotation in annotations(20, read_fraction=1.0):
        question, answer = annotation["conversations"]
        assert question["value"] == f"<image>\n{READ_QUESTION}"
        pairs = answer["value"].split()
        assert 1 <= len(pairs) <= 16
        assert all(pair[0].isupper() and pair[1].isdigit() for pair in pairs)
        assert len({pair[0] for pair in pairs}) == len(pairs)


def test_the_first_reading_pages_are_single_small_dark_pairs_on_light_ground():
    for _, files in records(20, read_fraction=1.0, read_pairs=1):
        assert len(json.loads(files["json"])["conversations"][1]["value"]) == 2
        pixels = pixels_of(files)
        assert np.median(pixels) > 180
        assert (pixels.mean(2) < 120).sum() < 200


def test_limits_of_tiles_and_questions_hold():
    for key, files in records(30, max_tiles=2, questions_per_image=3):
        image = Image.open(io.BytesIO(files["jpg"]))
        assert image.width * image.height <= 2 * TILE**2
        annotation = json.loads(files["json"])
        assert len(annotation["conversations"]) <= 6
        assert len(annotation["skills"]) == len(annotation["conversations"]) // 2
        assert sum("<image>" in turn["value"] for turn in annotation["conversations"]) == 1
        assert key.isdigit()


def test_damage_changes_pixels_but_neither_content_nor_answers():
    for (_, plain), (_, damaged) in zip(records(8), records(8, shift="damage"), strict=True):
        assert plain["json"] == damaged["json"]
        difference = np.abs(pixels_of(plain) - pixels_of(damaged)).mean()
        assert 4 < difference < 30


def test_lookalikes_are_added_to_a_page_and_change_nothing_else_on_it():
    more = 0
    for (_, plain, scene), (_, crowded, same) in zip(pages(40), pages(40, lookalikes=2.0), strict=True):
        assert scene.values == same.values
        assert scene.shapes == same.shapes
        changed = (np.asarray(plain) != np.asarray(crowded)).any(2)
        more += changed.mean() > 0.02
    assert 20 < more < 40
    with pytest.raises(ValueError, match=r"lookalikes is 11\.0; expected 0 to 10, with layout free"):
        GlyphsConfig(layout="free", lookalikes=11.0)


def test_other_fonts_and_sizes_are_none_that_is_trained_on():
    assert not set(FONTS) & set(OTHER_FONTS)
    for shift in ("fonts", "sizes"):
        assert annotations(10, shift=shift)
        assert records(10, shift=shift) != records(10)
    assert not {*SMALL, *LARGE} & {size for others in OTHER_SIZES.values() for size in others}


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
    "settings",
    [
        {"max_tiles": 0},
        {"max_tiles": 7},
        {"questions_per_image": 0},
        {"read_fraction": 1.5},
        {"read_pairs": 0},
        {"layout": "loose"},
        {"lookalikes": 1.0},
        {"shift": "fonts"},
    ],
)
def test_settings_that_no_image_meets_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} is '?{settings[name]}'?; expected"):
        GlyphsConfig(**settings)


def test_pages_of_shapes_alone_ask_for_the_colour_of_each_of_several():
    drawn = annotations(30, shapes_fraction=1.0, max_tiles=3)
    for annotation in drawn:
        assert 2 <= annotation["skills"].count("perception") <= 3
        assert set(annotation["skills"]) == {"perception", "reasoning"}
    some = [a["skills"].count("ocr") == 0 for a in annotations(60, shapes_fraction=0.3, read_fraction=0.3)]
    assert 0.2 < np.mean(some) < 0.6
    with pytest.raises(
        ValueError, match=r"shapes_fraction is 0\.6; .* at most what read_fraction leaves of 1"
    ):
        GlyphsConfig(layout="free", read_fraction=0.5, shapes_fraction=0.6)
    with pytest.raises(ValueError, match=r"shapes_fraction is -0\.1"):
        GlyphsConfig(layout="free", shapes_fraction=-0.1)
    with pytest.raises(ValueError, match="with layout free"):
        GlyphsConfig(shapes_fraction=0.1)
    assert GlyphsConfig(layout="free", read_fraction=0.9, shapes_fraction=0.1).shapes_fraction == 0.1
