"""Benchmarks in the files in which they are published: 60 rows of each, in both forms."""

import base64
import csv
import io
import sys
from itertools import cycle

import numpy as np
import PIL.Image
import pytest
import torch

from tests.support.tiny import encoded_image
from vico_pl.evaluation.scorers import SCORERS
from vico_pl.evaluation.suites import SUITES, read_suite

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
FORMULA = "Handwritten Mathematical Expression Recognition"
TEN = ["coca cola"] * 2 + ["coke"] * 8
NUM_ROWS = 60

# Per row: its columns (# is its number, @1 its first image), and by hand: text of the question, its images,
# accepted answers, metric and group, then an answer of a model and its score.
HUB = {
    "docvqa": [
        (
            {"questionId": "#", "question": "Who signed #?", "image": "@1", "answers": ["J. Doe", "Doe"]},
            ("<image>\nWho signed #?" + SHORT, [1], ("J. Doe", "Doe"), "anls", "docvqa"),
            ("j doe", 5 / 6),
        ),
        (
            {"questionId": "#", "question": "Date?", "image": "@1", "answers": ["3 May"]},
            ("<image>\nDate?" + SHORT, [1], ("3 May",), "anls", "docvqa"),
            ("June", 0),
        ),
    ],
    "infovqa": [
        (
            {"questionId": "#", "question": "How many?", "image": "@1", "answers": ["40%"]},
            ("<image>\nHow many?" + SHORT, [1], ("40%",), "anls", "infovqa"),
            ("40", 2 / 3),
        )
    ],
    "chartqa": [
        (
            {"type": "human_test", "question": "Bar #?", "answer": "50", "image": "@1"},
            ("<image>\nBar #?" + SHORT, [1], ("50",), "relaxed", "human_test"),
            ("52.5", 1),
        ),
        (
            {"type": "augmented_test", "question": "Who?", "answer": "[Yes, No]", "image": "@1"},
            ("<image>\nWho?" + SHORT, [1], ("[Yes, No]",), "relaxed", "augmented_test"),
            ("yes", 0),
        ),
    ],
    "textvqa": [
        (
            {"question_id": "#", "question": "Brand?", "image": "@1", "answers": TEN, "set_name": "val"},
            ("<image>\nBrand?" + SHORT, [1], tuple(TEN), "vqa", "textvqa"),
            ("Coca-Cola", 0.6),
        )
    ],
    "ocrbench": [
        (
            {"dataset": "IIIT5K", "question": "Read!", "question_type": "Regular Text Recognition"}
            | {"answer": ["CENTRE"], "image": "@1"},
            ("<image>\nRead!", [1], ("CENTRE",), "ocrbench", "Regular Text Recognition"),
            ("It says centre.", 1),
        ),
        (
            {"dataset": "HME100k", "question": "Write it.", "question_type": FORMULA}
            | {"answer": ["x ^ { 2 }"], "image": "@1"},
            ("<image>\nWrite it.", [1], ("x ^ { 2 }",), "ocrbench_formula", FORMULA),
            ("$x^{2}$", 1),
        ),
    ],
    "ai2d": [
        (
            {"question": "D <image>?", "options": ["leaf", "root", "stem #"], "answer": "2", "image": "@1"},
            ("<image>\nD ?\nA. leaf\nB. root\nC. stem #" + LETTER, [1], ("C", "stem #"), "choice", "ai2d"),
            ("C.", 1),
        ),
        (
            # The answer is a number, not a text.
            {"question": "Which?", "options": ["1", "0"], "answer": "1", "image": "@1"},
            ("<image>\nWhich?\nA. 1\nB. 0" + LETTER, [1], ("B", "0"), "choice", "ai2d"),
            ("A", 0),
        ),
    ],
    "mmstar": [
        (
            {"index": "#", "question": "Sky?\nOptions: A: blue, B: red", "image": "@1", "answer": "A"}
            | {"category": "coarse perception", "l2_category": "image style"},
            ("<image>\nSky?\nOptions: A: blue, B: red" + LETTER, [1], ("A",), "choice", "coarse perception"),
            ("A: blue", 1),
        )
    ],
    "mmmu": [
        (
            {"id": "validation_Art_Theory_#", "question": "In <image 1>, who?", "answer": "B"}
            | {"options": "['Monet', \"it's <image 3>\", 'X']", "image_1": "@1", "image_2": None}
            | {"image_3": "@3", "question_type": "multiple-choice", "subfield": "Painting"},
            (
                "In <image>, who?\nA. Monet\nB. it's <image>\nC. X" + LETTER,
                [1, 3],
                ("B",),
                "choice",
                "Art_Theory",
            ),
            ("(B)", 1),
        ),
        (
            {"id": "validation_Math_#", "question": "Sum of <image 1>?", "answer": "['24', 'two dozen']"}
            | {"options": "[]", "image_1": "@1", "image_2": None, "image_3": None}
            | {"question_type": "open", "subfield": "Algebra"},
            ("Sum of <image>?" + SHORT, [1], ("24", "two dozen"), "mmmu_open", "Math"),
            ("It is 24.00", 1),
        ),
    ],
    "mathvista": [
        (
            {"pid": "#", "query": "Hint: letter\nQuestion: Sum?\nChoices:\n(A) 3\n(B) 5", "answer": "5"}
            | {"question": "Sum?", "choices": ["3", "5"], "precision": None, "answer_type": "text"}
            | {"question_type": "multi_choice", "image": "images/#.jpg", "decoded_image": "@1"}
            | {"metadata": {"split": "testmini", "task": "figures"}},
            (
                "<image>\nHint: letter\nQuestion: Sum?\nChoices:\n(A) 3\n(B) 5",
                [1],
                ("B", "5"),
                "choice",
                "figures",
            ),
            ("The answer is B", 1),
        ),
        (
            {"pid": "#", "query": "Hint: float\nQuestion: Length?", "answer": "1.5", "question": "Length?"}
            | {"choices": None, "precision": 1.0, "answer_type": "float", "question_type": "free_form"}
            | {"image": "images/#.jpg", "decoded_image": "@1"}
            | {"metadata": {"split": "testmini", "task": "geometry problem solving"}},
            ("<image>\nHint: float\nQuestion: Length?", [1], ("1.5",), "number", "geometry problem solving"),
            ("1.46", 1),
        ),
    ],
}
# VLMEvalKit's columns are texts; @1 is base64.
TSV = {
    "docvqa": [
        (
            {"index": "#", "image": "@1", "question": "Who?", "answer": "['J. \"X\" Doe', 'Doe']"},
            ("<image>\nWho?" + SHORT, [1], ('J. "X" Doe', "Doe"), "anls", "docvqa"),
            ("DOE", 1),
        )
    ],
    "infovqa": [
        (
            {"index": "#", "image": "@1", "question": "How\tmany\nof #?", "answer": "['40%']"},
            ("<image>\nHow\tmany\nof #?" + SHORT, [1], ("40%",), "anls", "infovqa"),
            ("40 %", 3 / 4),
        )
    ],
    "chartqa": [
        (
            {"index": "#", "image": "@1", "question": "Bar?", "answer": "-2", "split": "test_human"},
            ("<image>\nBar?" + SHORT, [1], ("-2",), "relaxed", "human"),
            ("-2.2", 0),
        )
    ],
    "textvqa": [
        (
            {"index": "#", "image": "@1", "question": "Brand?", "answer": str(TEN)},
            ("<image>\nBrand?" + SHORT, [1], tuple(TEN), "vqa", "textvqa"),
            ("the coke", 1),
        )
    ],
    "ocrbench": [
        (
            {"index": "#", "image": "@1", "question": "Write it.", "answer": "['a b']", "category": FORMULA},
            ("<image>\nWrite it.", [1], ("a b",), "ocrbench_formula", FORMULA),
            ("A b", 0),
        )
    ],
    "ai2d": [
        (
            {"index": "#", "image": "@1", "question": "Part?", "answer": "A", "A": "leaf", "B": "root"}
            | {"C": "", "D": ""},
            ("<image>\nPart?\nA. leaf\nB. root" + LETTER, [1], ("A", "leaf"), "choice", "ai2d"),
            ("A leaf", 1),
        )
    ],
    "mmstar": [
        (
            {"index": "#", "image": "@1", "question": "Sky in <image 1>?", "answer": "B", "A": "blue"}
            | {"B": "red", "category": "math", "l2_category": "geometry"},
            ("Sky in <image>?\nA. blue\nB. red" + LETTER, [1], ("B", "red"), "choice", "math"),
            ("Blue", 0),
        )
    ],
    "mmmu": [
        (
            {"index": "#", "image": ["@1", "@2"], "question": "Is <image 2> like <image 1>?", "answer": "A"}
            | {"A": "yes", "B": "no", "category": "Art", "split": "validation"},
            ("Is <image> like <image>?\nA. yes\nB. no" + LETTER, [2, 1], ("A", "yes"), "choice", "Art"),
            ("yes", 1),
        ),
        (
            {"index": "#", "image": "@1", "question": "Of another split", "answer": "A", "split": "dev"},
            None,
            None,
        ),
    ],
    "mathvista": [
        (
            {"index": "#", "image": "@1", "question": "Hint: A, B\nSum?", "answer": "5°", "task": "geometry"}
            | {"question_type": "multi_choice", "answer_type": "text", "choices": "['3°', '5°']"},
            ("<image>\nHint: A, B\nSum?", [1], ("B", "5°"), "choice", "geometry"),
            ("5°", 1),
        )
    ],
}


def image_bytes(row, number):
    return encoded_image("PNG", size=(9 + number, 8), seed=10 * row + number)


def filled(value, row, image):
    """Put the number of a row and its images into the columns of a template."""
    if isinstance(value, dict):
        return {key: filled(item, row, image) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, row, image) for item in value]
    if isinstance(value, str) and value.startswith("@"):
        return image(row, int(value[1:]))
    return value.replace("#", str(row)) if isinstance(value, str) else value


def rows_of(templates, image):
    return [filled(row, n, image) for n, (row, *_) in zip(range(NUM_ROWS), cycle(templates), strict=False)]


def as_struct(row, number):
    return {"bytes": image_bytes(row, number), "path": f"{row}.png"}


def as_base64(row, number):
    return base64.b64encode(image_bytes(row, number)).decode()


def write_parquet(path, rows, **options):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)


def write_tsv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def check(samples, templates):
    """Compare all samples, and the score of an answer to each, with what is expected by hand."""
    numbered = zip(range(NUM_ROWS), cycle(templates), strict=False)
    expected = [(n, *sample, *scored) for n, (_, sample, scored) in numbered if sample]
    for sample, (row, text, images, answers, metric, group, prediction, score) in zip(
        samples, expected, strict=True
    ):
        question, reply = sample.turns
        assert (question.role, question.text) == ("human", text.replace("#", str(row)))
        assert reply.answers == tuple(answer.replace("#", str(row)) for answer in answers)
        assert (reply.role, reply.text, reply.metric, reply.group) == ("gpt", reply.answers[0], metric, group)
        for pixels, number in zip(sample.images, images, strict=True):
            original = np.array(PIL.Image.open(io.BytesIO(image_bytes(row, number))))
            assert torch.equal(pixels, torch.from_numpy(original).permute(2, 0, 1))
        assert SCORERS[metric](prediction, reply.answers) == pytest.approx(score)
    assert len({sample.id for sample in samples}) == len(samples)


def test_both_forms_of_every_suite_are_tested():
    assert set(HUB) == set(TSV) == set(SUITES)


@pytest.mark.parametrize("name", HUB)
def test_parquet_as_on_the_hub(tmp_path, name):
    rows, split = rows_of(HUB[name], as_struct), SUITES[name].split
    for shard, part in enumerate((rows[:31], rows[31:])):
        write_parquet(tmp_path / "data" / f"{split}-0000{shard}-of-00002.parquet", part, row_group_size=7)
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows[:2])
    check(list(read_suite(name, tmp_path)), HUB[name])


@pytest.mark.parametrize("name", TSV)
def test_tsv_of_vlmevalkit(tmp_path, name):
    write_tsv(tmp_path / f"{SUITES[name].tsv}.tsv", rows_of(TSV[name], as_base64))
    write_tsv(tmp_path / "Another.tsv", [{"index": "1"}])
    check(list(read_suite(name, tmp_path)), TSV[name])


@pytest.mark.parametrize("place", ["", "data", "DocVQA"])
def test_files_of_the_hub_are_found_where_it_has_them(tmp_path, place):
    write_parquet(tmp_path / place / "validation-0.parquet", rows_of(HUB["docvqa"], as_struct))
    write_parquet(tmp_path / "InfographicVQA" / "validation-0.parquet", rows_of(HUB["infovqa"], as_struct))
    assert len(list(read_suite("docvqa", tmp_path))) == NUM_ROWS


def test_mmmu_has_a_folder_per_subject(tmp_path):
    rows = rows_of(HUB["mmmu"], as_struct)
    for subject, part in (("Art_Theory", rows[0::2]), ("Math", rows[1::2])):
        write_parquet(tmp_path / subject / "validation-00000-of-00001.parquet", part)
        write_parquet(tmp_path / subject / "dev-00000-of-00001.parquet", part)
    groups = [sample.turns[1].group for sample in read_suite("mmmu", tmp_path)]
    assert groups == ["Art_Theory"] * 30 + ["Math"] * 30


def docvqa(**fields):
    return {"index": "7", "question": "Who?", "answer": "Doe", "image": as_base64(0, 1), **fields}


def test_an_image_may_be_the_index_of_a_row_above_or_a_file(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(image_bytes(5, 1))
    path = "['images/a.png']"
    write_tsv(
        tmp_path / "any name.tsv",
        [
            docvqa(question="first\nline\nand more", image_path=path),
            docvqa(index="8", image=as_base64(3, 1), image_path=path),
            docvqa(index="9", image="7", image_path=path),
            docvqa(index="10", image="", image_path=path),
        ],
    )
    first, second, again, file = (sample.images[0] for sample in read_suite("docvqa", tmp_path))
    original = np.array(PIL.Image.open(io.BytesIO(image_bytes(5, 1))))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(file, torch.from_numpy(original).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("name", "bad", "kind", "reason"),
    [
        ("docvqa", docvqa(image="no base64!" * 9), "image", "image is not base64"),
        ("docvqa", docvqa(image=as_base64(0, 1)[:80]), "image", "image '0.png' (60 bytes)"),
        ("docvqa", docvqa(image=""), "marks", "0 of 1 images are there"),
        ("docvqa", docvqa(question="As in <image 2>?"), "marks", "0 of 1 images are there"),
        ("docvqa", docvqa(answer=""), "other", "no accepted answer; test sets are published without"),
        ("docvqa", docvqa(answer="[]"), "other", "no accepted answer"),
        ("docvqa", docvqa(index="../7"), "key", "key '../7' is an absolute path or has '..'"),
        ("docvqa", docvqa(image="", image_path="../secret.png"), "image", "is no file below"),
        ("docvqa", docvqa(image="", image_path="absent.png"), "image", "is no file below"),
        ("ai2d", docvqa(A="leaf", B="root", answer="C"), "other", "answer 'C' is none of 2 options"),
        ("ai2d", docvqa(A="leaf", B="root", answer="2"), "other", "answer '2' is none of 2 options"),
        ("mathvista", docvqa(answer_type="list"), "judge", "only a judge model can score"),
        ("mathvista", docvqa(answer_type="text"), "judge", "only a judge model can score"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_and_counted(tmp_path, name, bad, kind, reason):
    (tmp_path / "secret.png").write_bytes(image_bytes(0, 1))
    good = docvqa(answer="A", A="leaf", B="root", answer_type="integer", image_path="")
    bad = dict.fromkeys(good, "") | bad
    write_tsv(tmp_path / "suite" / "a.tsv", [good, bad, good])
    skipped = []
    with pytest.warns(
        UserWarning, match=rf"{name}: 1 of 3 rows are left out \(1 {kind}\); the first, a.tsv/"
    ):
        assert len(list(read_suite(name, tmp_path / "suite", skipped=skipped))) == 2
    (fault,) = skipped
    assert (fault.kind, reason in fault.reason) == (kind, True), fault


def test_no_usable_row_is_an_error(tmp_path):
    write_tsv(tmp_path / "a.tsv", [docvqa(answer="")])
    with pytest.raises(ValueError, match=r"1 of 1 rows are left out \(1 other\); the first, a.tsv/7: no acc"):
        list(read_suite("docvqa", tmp_path))


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("docVQA", {}, "'docVQA' is no suite; expected one of docvqa, infovqa, chartqa"),
        ("docvqa", {}, "no file of docvqa; expected validation-*.parquet or DocVQA_VAL.tsv, found neither"),
        ("docvqa", {"test-00.parquet": b""}, "or DocVQA_VAL.tsv, found test-00.parquet"),
        ("docvqa", {"a.tsv": b"", "b.tsv": b""}, "found a.tsv, b.tsv"),
        ("docvqa", {"a.tsv": b"index\tquestion\n1\tWho?\n"}, "a.tsv: no column answers or answer or label"),
        ("docvqa", {"a.tsv": b"index\tquestion\n1\n"}, "not readable as tsv (row 2 has 1 of 2 values)"),
        ("docvqa", {"a.tsv": b'index\tquestion\n1\t"Who?'}, "not readable as tsv (unexpected end of data"),
        ("docvqa", {"a.tsv": b"index\timage\n1\t7\n"}, "row 2 has the image of row '7', which is not"),
        ("docvqa", {"a.tsv": b"index\tquestion\n1\t\xff\n"}, "a.tsv: not readable as tsv ('utf-8' codec"),
        ("docvqa", {"a.parquet": b"PAR1"}, "a.parquet: not readable as parquet ("),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_a_sentence(tmp_path, name, files, message):
    if "a.parquet" in files:
        pytest.importorskip("pyarrow")
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match="absent: no such folder; expected one with the files of ai2d"):
        read_suite("ai2d", tmp_path / "absent")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        list(read_suite(name, tmp_path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "test-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"pip install 'vico_pl\[parquet\]'"):
        list(read_suite("ai2d", tmp_path))
