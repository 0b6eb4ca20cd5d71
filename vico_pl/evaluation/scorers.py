"""Scores of an answer under the rules of public benchmarks, looked up by name.

`SCORERS[name](prediction, answers)` is between 0 and 1; `answers` are all accepted ones, at least one. Where
harnesses differ, the rule is that of the benchmark's authors. No scorer asks a judge model.
"""

import math
import re
import string
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torchmetrics.functional.text import squad

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05

# Of VQA: words with apostrophes. Each is also understood with one of its apostrophes left out.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
you'll you're you've"""
_WORDS = {
    word[: mark.start()] + word[mark.end() :]: word
    for word in _CONTRACTIONS.split()
    for mark in re.finditer("'", word)
}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORDS |= {"none": "0", "somebody'd": "somebodyd", **{word: str(n) for n, word in enumerate(_DIGITS)}}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'

# Of multiple choice: where the letter of an option is looked for, in this order.
_ANNOUNCED = re.compile(r"\b(?:answer|option|choice)\b[\s:=]*", re.IGNORECASE)
# I say B   it is A since ...   but neither "A dog" nor "I", nor a letter in another word
_CAPITAL = r"(?<![A-Za-z0-9\u00c0-\u024f])((?<=[a-z]\s)A|A(?!\s+\w)|[B-HJ-Z])(?![-'A-Za-z0-9\u00c0-\u024f])"
_STATED = re.compile(rf"^(?:is\b)?\W*{_CAPITAL}")  # directly after that
_LETTERS = (
    re.compile(r"^(?:is\b)?\W*([A-Za-z])\W*$"),  # b   (B)   **B**.   is B
    re.compile(r"^(?:is\b)?\W*([A-Za-z])\s?[^\w\s,']\W*(?:\s|$)"),  # B: a red car
    re.compile(r"[(\[{]\s*([A-Za-z])\s*[)\]}]"),  # it is (b)   \boxed{B}
    re.compile(_CAPITAL),
)

# Of MMMU's open questions: words that announce a result, and numbers.
_MMMU_SIGNS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_MMMU_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"(?<!\d)-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"(?<!\d)-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_LAST_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def levenshtein_distance(first: str, second: str) -> int:
    """Count the letters to insert, delete or replace; 10,000 against 10,000 letters take half a second.

    >>> levenshtein_distance("kitten", "sitting")
    3
    """
    short, long = sorted((first, second), key=len)
    codes = np.array([ord(letter) for letter in long], dtype=np.int32)
    steps = np.arange(len(long) + 1, dtype=np.int32)
    row = steps
    for count, letter in enumerate(short, 1):
        replaced = row[:-1] + (codes != ord(letter))
        best = np.append(np.int32(count), np.minimum(replaced, row[1:] + 1))
        row = np.minimum.accumulate(best - steps) + steps  # insertions
    return int(row[-1])


def exact(prediction: str, answer: str) -> bool:
    """Compare ignoring case and surrounding spaces.

    >>> exact("Red ", "red"), exact("F3 K7 K", "F3 K7 F")
    (True, False)
    """
    return prediction.strip().lower() == answer.strip().lower()


def anls(prediction: str, answer: str) -> float:
    """Return one minus the edit distance per letter of the longer text, and 0 below a half (DocVQA).

    Case and runs of spaces do not count in the distance, but the lengths are those of the texts as given.

    >>> anls("Janury 2", "January 2"), anls("Ja", "January 2")
    (0.8888888888888888, 0.0)
    """
    distance = levenshtein_distance(*(" ".join(text.lower().split()) for text in (prediction, answer)))
    similarity = 1 - distance / max(len(prediction), len(answer), 1)
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def relaxed(prediction: str, answer: str) -> bool:
    """Accept numbers within 5 % of the answer; other texts, and the answer 0, must be equal (ChartQA).

    `%` divides by 100, so `5%` is 0.05 and not 5. A number with commas is a text.

    >>> relaxed("104", "100"), relaxed("106", "100"), relaxed("0.51", "50%"), relaxed("1,000", "1000")
    (True, False, True, False)
    """
    given, expected = _percent(prediction.strip()), _percent(answer.strip())
    if given is None or not expected:
        return exact(prediction, answer)
    return abs(given - expected) / abs(expected) <= RELAXED_TOLERANCE


def number(prediction: str, answer: str) -> bool:
    """Compare the last number of the prediction, rounded to the decimals of the answer; integers are cut.

    MathVista's rule, except that its authors let a judge model find the number in a longer prediction.

    >>> number("about 1.234 m", "1.23"), number("14.7", "14"), number("It is -1,200.", "-1200")
    (True, True, True)
    """
    found, expected = _LAST_NUMBER.findall(prediction), _to_float(answer)
    if not found or expected is None:
        return exact(prediction, answer)
    value, decimals = float(found[-1].replace(",", "")), len(answer.strip().partition(".")[2])
    return (round(value, decimals) if decimals else int(value)) == expected


def vqa(prediction: str, answers: Sequence[str]) -> float:
    """Return the mean, over all ways to leave one answer out, of min(1, equal answers / 3) (VQA, TextVQA).

    Texts are normalised as by EvalAI's server. With 2 or 3 answers, all that are left must be equal to the
    prediction for 1; with one answer, that one must.

    >>> vqa("The 2 dogs", ["two dogs"] * 3 + ["a dog"] * 7)
    0.9
    """
    given = normalize_vqa(prediction)
    equal = [normalize_vqa(answer) == given for answer in answers]
    if len(equal) == 1:
        return float(equal[0])
    needed = min(3, len(equal) - 1)
    return sum(min(1, (sum(equal) - own) / needed) for own in equal) / len(equal)


def normalize_vqa(text: str) -> str:
    """Remove case, articles and punctuation; write number words as digits and contractions in full.

    >>> normalize_vqa("The U.S. paid $1,250.50, didnt it?"), normalize_vqa("A ten-year-old boy")
    ("us paid $1250.50 didn't it", '10 year old boy')
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").replace("\n", " ").strip()
    given = text
    for mark in _PUNCTUATION:  # at the edge of a word it goes; if it is only inside, it becomes a space
        is_at_edge = f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if is_at_edge else " ")
    words = re.sub(r"\.(?!\d)", "", text).split()
    return " ".join(_WORDS.get(word, word) for word in words if word not in _ARTICLES)


def choice(prediction: str, answers: Sequence[str]) -> bool:
    """Compare the letter or the text of an option with the accepted one.

    The first answer is the letter, further ones are texts; a text of one letter is not looked at, since the
    prediction is then taken for an option's letter. The letter that directly follows the last "answer",
    "option" or "choice" counts first, then one in the rest, then one in the whole. Several letters name none,
    and an "A" that begins a sentence is an article. Harnesses that find no letter draw one or ask a judge;
    here the score is 0.

    >>> [choice(text, ["B", "a red car"]) for text in ("Answer: (b)", "B: a car", "A red car", "A dog")]
    [True, True, True, False]
    """
    letter, *texts = map(_bare, answers)
    *announced, tail = _ANNOUNCED.split(prediction.strip())
    names = {name for text in texts if len(text) > 1 for name in (text, f"{letter} {text}")}
    if names & {_bare(prediction), _bare(tail)}:
        return True
    stated = _STATED.findall(tail) if announced else []
    letters = [*stated, *_named_letters(tail), *_named_letters(prediction.strip())]
    return bool(letters) and letters[0].lower() == letter


def mmmu_open(prediction: str, answers: Sequence[str]) -> bool:
    """Look for an accepted answer in the parts of a prediction that state a result (MMMU, open questions).

    Numbers are compared at two decimals; a text is accepted where it occurs in such a part.

    >>> mmmu_open("So the sum is 1,024.001", ["1024"]), mmmu_open("It is a fine mesh", ["mesh", "net"])
    (True, True)
    """
    parts = _stated_results(prediction)
    numbers = [found for part in parts for pattern in _MMMU_NUMBERS for found in pattern.findall(part)]
    given = {value for text in (*parts, *numbers) for value in _mmmu_values(text)}
    accepted = {value for answer in answers for value in _mmmu_values(answer)}
    given_texts, texts = ([v for v in values if isinstance(v, str)] for values in (given, accepted))
    return bool(given & accepted) or any(text in part for text in texts for part in given_texts)


def contains(prediction: str, answer: str) -> bool:
    r"""Accept an answer that occurs in the prediction, ignoring case; a new line is a space (OCRBench).

    >>> contains("Its height\nis 5 m", "height IS 5"), contains("", "5")
    (True, False)
    """
    return _occurs(*(text.lower().strip().replace("\n", " ") for text in (answer, prediction)))


def ocrbench_formula(prediction: str, answer: str) -> bool:
    r"""Accept a formula that occurs in the prediction, ignoring spaces but not case (OCRBench's HME100k).

    >>> ocrbench_formula(r"$\frac { A } {2}$", r"\frac{A}{2}"), ocrbench_formula("x^2", "X^2")
    (True, False)
    """
    return _occurs(*(text.replace("\n", "").replace(" ", "") for text in (answer, prediction)))


def f1(prediction: str, answer: str) -> float:
    """Return the F1 of the words in common, without case, articles and punctuation (SQuAD).

    >>> f1("The red car", "a red sports car")
    0.8
    """
    target: dict[str, str | dict[str, list[str] | list[int]]]
    target = {"answers": {"answer_start": [0], "text": [answer]}, "id": ""}
    percent = squad({"prediction_text": prediction, "id": ""}, target)["f1"]
    return round(percent.item() / 100, 6)  # torchmetrics computes in float32


def _occurs(answer: str, prediction: str) -> bool:
    return answer in prediction if answer else not prediction


def _to_float(text: str) -> float | None:
    """Return the value of a text that is a finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _percent(text: str) -> float | None:
    value = _to_float(text.rstrip("%"))
    return value / 100 if value is not None and text.endswith("%") else value


def _bare(text: str) -> str:
    return text.strip(string.punctuation + string.whitespace).lower().removeprefix("is ")


def _named_letters(text: str) -> list[str]:
    """Return letters of options that a text names, the most certain first."""
    found = [{letter.lower() for letter in pattern.findall(text)} for pattern in _LETTERS]
    return [letters.pop() for letters in found if len(letters) == 1]


def _stated_results(prediction: str) -> list[str]:
    """Return for each line what follows its last word such as "is"; the whole if no line has one."""
    whole = prediction.strip().strip(".").lower()
    *lines, last = whole.split("\n")
    signs = [(line, _MMMU_SIGNS) for line in lines] + [(last, (*_MMMU_SIGNS, "="))]
    tails = [[line.split(sign)[-1].strip() for sign in given if sign in line] for line, given in signs]
    results = [min(filter(None, found), key=len, default="") for found in tails]
    return [text for text in results if text.strip(":,.!?;'")] or [whole]


def _mmmu_values(text: str) -> list[str | float]:
    """Return a number rounded to two decimals, or a text in lower case; a single letter has a space."""
    text = text.strip().lower()
    value = _to_float(text.replace(",", ""))
    if value is not None:
        return [round(value, 2)]
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _best(rule: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    return max(float(rule(prediction, answer)) for answer in answers)


def _score(rule: Callable[[str, Sequence[str]], float], prediction: str, answers: Sequence[str]) -> float:
    if not answers:
        raise ValueError("no accepted answer to score by; expected at least one (see data/README.md)")
    return float(rule(prediction, answers))


_OF_ONE = (exact, anls, relaxed, number, contains, ocrbench_formula, f1)  # the best answer counts
_OF_ALL = (vqa, choice, mmmu_open)
SCORERS: dict[str, Callable[[str, Sequence[str]], float]] = {
    **{rule.__name__: partial(_score, partial(_best, rule)) for rule in _OF_ONE},
    **{rule.__name__: partial(_score, rule) for rule in _OF_ALL},
}
SCORERS["ocrbench"] = SCORERS["contains"]
