"""Each scorer on examples whose score is computed by hand from the published rule."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.text import edit_distance

from vico_pl.evaluation.scorers import SCORERS, levenshtein_distance, normalize_vqa

TEN = ["red"] * 2 + ["dark red"] * 3 + ["blue"] * 5
CAR = ["B", "a red car"]
WORKED = [
    # name, prediction, answers, score
    ("exact", " Red\n", ["blue", "red"], 1),
    ("exact", "red car", ["red"], 0),
    ("exact", "ÉTÉ", ["été"], 1),
    ("exact", "", ["red"], 0),
    ("anls", "Janury 2", ["January 2"], 8 / 9),  # one letter of nine
    ("anls", "JANUARY  2", ["3 May", "January 2"], 1),  # case, runs of spaces, best of two
    ("anls", "ab", ["ax"], 0.5),  # exactly the threshold counts
    ("anls", "a", ["abc"], 0),  # 1 - 2/3
    ("anls", "ab", [" a  c "], 2 / 3),  # two edits; lengths are those of the texts as given: 6
    ("anls", "東京都", ["東京"], 2 / 3),
    ("anls", "", ["red"], 0),
    ("anls", "", [""], 1),
    ("relaxed", "105", ["100"], 1),
    ("relaxed", "105.1", ["100"], 0),
    ("relaxed", "-95", ["-100"], 1),
    ("relaxed", "100", ["-100"], 0),
    ("relaxed", "52%", ["0.5"], 1),  # 0.52 is 4 % above
    ("relaxed", "50", ["50%"], 0),  # 0.5 is expected
    ("relaxed", "0.0", ["0"], 0),  # near zero nothing is within 5 %: texts are compared
    ("relaxed", "0", ["0"], 1),
    ("relaxed", "1,000", ["1000"], 0),  # as published: with commas it is a text
    ("relaxed", "1,000", ["1,000"], 1),
    ("relaxed", "Yes ", ["no", "yes"], 1),
    ("relaxed", "nan", ["100"], 0),
    ("relaxed", "", ["100"], 0),
    ("number", "The answer is 14.", ["14"], 1),
    ("number", "14.9", ["14"], 1),  # cut as int() does
    ("number", "1.26", ["1.3"], 1),
    ("number", "1.24", ["1.3"], 0),
    ("number", "3 of 1,200", ["1200"], 1),
    ("number", "-.5", ["-0.5"], 1),
    ("number", "5", ["-5"], 0),
    ("number", "none", ["5"], 0),
    ("number", "[1, 2]", ["[1, 2]"], 1),
    ("vqa", "Red.", TEN, 0.6),  # two leave one: 2 * 1/3 + 8 * 2/3
    ("vqa", "the dark-red", TEN, 0.9),  # 3 * 2/3 + 7 * 1
    ("vqa", "BLUE", TEN, 1),
    ("vqa", "green", TEN, 0),
    ("vqa", "", TEN, 0),
    ("vqa", "two", ["2"], 1),
    ("vqa", "red", ["red", "blue"], 0.5),  # the one left is red, or blue
    ("vqa", "red", ["red"] * 3, 1),
    ("vqa", "red", ["red", "red", "blue"], 2 / 3),  # 1/2, 1/2, 1
    ("vqa", "red", ["red"] * 3 + ["blue"], 0.75),  # 2/3 three times, 1
    ("mmmu_open", "So x = 3.14159", ["3.14"], 1),
    ("mmmu_open", "The total is $1,250,000 a year", ["1250000"], 1),
    ("mmmu_open", "-2", ["2"], 0),
    ("mmmu_open", "1.5e3", ["1,500"], 1),
    ("mmmu_open", "It is a Transformer encoder", ["transformer", "BERT"], 1),
    ("mmmu_open", "a transformer is used. The result is an LSTM", ["transformer"], 0),
    ("mmmu_open", "It is not 5\nthe answer is 6", ["5"], 1),  # each line states a result
    ("mmmu_open", "it is plan b", ["b"], 1),
    ("mmmu_open", "it is about", ["b"], 0),  # a single letter stands alone
    ("mmmu_open", "50%", ["50"], 1),
    ("mmmu_open", "", ["5"], 0),
    ("contains", "Its height is 5 m", ["6 M", "5 M"], 1),
    ("contains", "", ["5"], 0),
    ("contains", "anything", [""], 0),
    ("ocrbench", "It says\nOPEN now", ["open", "closed"], 1),
    ("ocrbench", "ope n", ["open"], 0),
    ("ocrbench_formula", "$\\frac { x } {2}$", ["\\frac{x}{\n2}"], 1),
    ("ocrbench_formula", "\\frac{X}{2}", ["\\frac{x}{2}"], 0),
    ("f1", "The red car", ["blue", "a red sports car"], 0.8),  # precision 1, recall 2/3
    ("f1", "car, car!", ["car"], 2 / 3),
    ("f1", "", ["car"], 0),
    ("f1", "the", ["a"], 1),  # nothing on both sides
    # Letters of options.
    *(("choice", text, CAR, 1) for text in ("B", "b", "(B)", "B.", " b)\n", "**B**", "[B]", "$\\boxed{B}$")),
    *(("choice", text, CAR, 1) for text in ("B: a red car", "B. It is red", "(b) red", "**B**: it is red")),
    *(("choice", text, CAR, 1) for text in ("Answer: (b)", "The answer is B", "the answer is b.")),
    *(("choice", text, CAR, 1) for text in ("I think it's B", "Option B", "It is (B), I say", "答案是B")),
    ("choice", "A is too small. The correct option is B, since A is blue.", CAR, 1),
    ("choice", "A is too small, C too large. The answer is **B**.", CAR, 1),
    ("choice", "A red car.", CAR, 1),  # the text of the option
    ("choice", "The answer is a red car", CAR, 1),
    ("choice", "B a red car", CAR, 1),
    ("choice", "A leaf", ["A", "leaf"], 1),
    ("choice", "A leaf", ["A", "root"], 0),
    ("choice", "a red cart", CAR, 0),
    ("choice", "A", CAR, 0),
    ("choice", "", CAR, 0),
    ("choice", "B or C", CAR, 0),
    ("choice", "Option C is red, so it is not the answer. It is B.", CAR, 1),
    ("choice", "Blue", CAR, 0),
    ("choice", "A dog is running", ["A", "a cat"], 0),
    ("choice", "Answer: A dog is running", ["A"], 0),
    ("choice", "The answer is A because it is red", ["A"], 1),
    ("choice", "A. A dog", ["A"], 1),
    ("choice", "a", ["A"], 1),
    ("choice", "I see a T-shirt", ["T"], 0),
    ("choice", "I'm unsure", ["I"], 0),
    ("choice", "Día", ["D"], 0),
    ("choice", "U.S.", ["U"], 0),
    ("choice", "D", ["B", "D"], 0),  # D is a letter here, though B's text is "D"
    ("choice", "B", ["B", "D"], 1),
]


@pytest.mark.parametrize(("name", "prediction", "answers", "score"), WORKED)
def test_score_is_the_one_computed_by_hand(name, prediction, answers, score):
    given = SCORERS[name](prediction, answers)
    assert given == pytest.approx(score, abs=1e-6)
    assert isinstance(given, float)


def test_every_scorer_has_worked_examples():
    assert {name for name, *_ in WORKED} == set(SCORERS)


@pytest.mark.parametrize("name", SCORERS)
def test_no_accepted_answer_is_an_error(name):
    with pytest.raises(ValueError, match="no accepted answer to score by; expected at least one"):
        SCORERS[name]("red", [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("didnt", "didn't"),
        ("couldntve couldn'tve couldnt've", "couldntve couldn't've couldn't've"),  # one apostrophe is missing
        ("somebody'd Im", "somebodyd im"),
        ("None of the ten men, a dog and an ox", "0 of 10 men dog and ox"),
        ("1,000.50", "1000.50"),
        ("3.", "3"),
        ("U.S.A.", "usa"),
        ("mid-size", "mid size"),
        ("mid - size", "mid size"),
        ("well-known - as", "wellknown as"),  # the mark is at an edge once, so it goes everywhere
        ("$5", "$5"),
        ("(yes)\t[no]\n?", "yes no"),
        ("the boy's", "boy 's"),
    ],
)
def test_vqa_normalisation(text, expected):
    assert normalize_vqa(text) == expected


@given(first=st.text("abé", max_size=9), second=st.text("abé", max_size=9))
def test_levenshtein_distance(first, second):
    assert levenshtein_distance(first, second) == edit_distance(first, second, reduction="sum")


@pytest.mark.parametrize("text", ["0" * 10_000, "-" * 10_000, "answer is B " * 850, "a,b. " * 2000])
@pytest.mark.parametrize("name", SCORERS)
def test_long_predictions_take_no_time(name, text):
    began = time.process_time()
    SCORERS[name](text, ["B", "5", text[:9000]])
    assert time.process_time() - began < 3
