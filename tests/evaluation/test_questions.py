import base64
import json
import re
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import vico_pl.evaluation.questions as questions_module
from tests.support.folders import own_answers, tiled, write_set
from tests.support.tiny import encoded_image
from vico_pl.data.tiling import tile_sample
from vico_pl.evaluation.answering import MAX_NEW_TOKENS, full_tokens
from vico_pl.evaluation.questions import (
    GROUP_FIELDS,
    NO_GROUP,
    Measure,
    decide_measure,
    describe,
    open_questions,
    read_groups,
    scored_questions,
)
from vico_pl.types import Sample, Turn


def test_groups_number_samples_through_and_hold_their_own_features(predictor, monkeypatch):
    monkeypatch.setattr(questions_module, "SAMPLES_PER_GROUP", 2)
    sizes = [((32, 32),), ((64, 64),), (), ((64, 32), (32, 32)), ((32, 64),)]
    samples = [tiled(predictor, *size, seed=i) for i, size in enumerate(sizes)]
    samples = [replace(s, turns=[s.turns[0], replace(s.turns[1], group="ocr")]) for s in samples]
    scored = partial(scored_questions, metric=None)
    groups = list(read_groups(predictor, samples, scored))
    assert [(g.first, len(g.samples)) for g in groups] == [(0, 2), (2, 2), (4, 1)]
    assert [q.sample for g in groups for q in g.questions] == [0, 1, 2, 3, 4]
    with torch.no_grad():
        for features, sample in zip((f for g in groups for f in g.features), samples, strict=True):
            torch.testing.assert_close(features, predictor.model.encode_tiles(sample.tiles))


def conversation(*turns, **metadata):
    """A text sample; an answer is a text, or a Turn's fields."""
    made = [
        Turn(role=("human", "gpt")[i % 2], **(turn if isinstance(turn, dict) else {"text": turn}))
        for i, turn in enumerate(turns)
    ]
    return Sample(id="a.tar/0", images=[], turns=made, metadata=metadata)


def asked(sample, **settings):
    """Prompt, accepted answers, metric and group of each question of a sample."""
    found = decide_measure([sample], name="set", metric=settings.get("metric"))
    assert found == Measure.SCORES
    questions = scored_questions(sample, 0, **{"metric": None, **settings})
    return [(*q.prompt, q.answers, q.metric, q.group) for q in questions]


def test_answers_with_a_skill_or_a_metric_are_scored(predictor):
    skill = {"text": "a", "group": "ocr"}
    assert asked(conversation("A?", skill, "B?", "b")) == [("A?", ("a",), "exact", "ocr")]
    metric = {"text": "b", "metric": "exact", "answers": ("b", "B!")}
    both = conversation("A?", skill, "B?", metric, source="web")
    alone, with_history = asked(both)
    assert alone == ("A?", ("a",), "exact", "ocr")
    assert with_history == ("A?", "a", "B?", ("b", "B!"), "exact", "web")


@pytest.mark.parametrize("field", GROUP_FIELDS)
def test_a_metric_for_all_scores_answers_that_name_none(field):
    sample = conversation("A?", "a", **{field: "charts"})
    assert asked(sample, metric="exact") == [("A?", ("a",), "exact", "charts")]
    assert asked(conversation("A?", "a", source=3), metric="exact")[0][-1] == NO_GROUP


@pytest.mark.parametrize(
    ("samples", "measure"),
    [
        ([conversation("A?", "a")], Measure.ANSWERS),
        ([conversation("A?", " ")], Measure.OWN),
        ([conversation("A?", ""), conversation("A?", "a")], Measure.ANSWERS),
        ([conversation("A?", "a"), conversation("A?", "")], Measure.ANSWERS),
        ([conversation("A?", ""), conversation("A?", {"text": "a", "metric": "exact"})], Measure.SCORES),
    ],
)
def test_without_metrics_a_set_is_measured_by_agreement(samples, measure):
    assert decide_measure(samples, name="set", metric=None) == measure


def test_unknown_metrics_and_empty_sets_are_refused(predictor, tmp_path):
    with pytest.raises(ValueError, match=r"a\.tar/0: metric is 'bleu'; expected one of exact"):
        decide_measure([conversation("A?", {"text": "a", "metric": "bleu"})], name="set", metric=None)
    with pytest.raises(ValueError, match=r"--metric: metric is 'bleu'; expected one of exact"):
        open_questions(predictor, tmp_path, metric="bleu")
    with pytest.raises(ValueError, match="set: no usable sample"):
        decide_measure([], name="set", metric=None)


def unlabelled(folder, answer, sizes=((64, 64), (32, 32), (64, 32))):
    turns = [{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": answer}]
    annotation = json.dumps({"conversations": turns, "source": "web"}).encode()
    images = [encoded_image("PNG", size=size, seed=i) for i, size in enumerate(sizes)]
    return write_set(folder, [(f"{i}", {"png": image, "json": annotation}) for i, image in enumerate(images)])


def test_without_answers_agreement_is_measured_on_the_models_own(predictor, tmp_path):
    questions = open_questions(predictor, unlabelled(tmp_path / "set", ""))
    assert questions.measure == Measure.OWN
    samples = [tiled for _, tiled in questions.samples()]
    for sample in samples:
        given = own_answers(predictor, sample, ["A?"], max_tokens=MAX_NEW_TOKENS)
        assert sample.turns[1].text == given.get("A?", "")
    assert any(sample.turns[1].text for sample in samples)
    (group,) = questions.groups(title="reading")
    assert [(q.group, q.metric) for q in group.questions] == [("web", "")] * 3
    (results,) = questions.grade(group, [full_tokens(group)])
    assert [result.score for result in results] == pytest.approx([1, 1, 1], abs=1e-6)


def test_samples_too_long_for_the_language_model_are_left_out(predictor, tmp_path):
    folder = unlabelled(tmp_path / "set", "a", sizes=((32, 32), (64, 64)))
    (first, _), _ = open_questions(predictor, folder).samples()
    num_tokens = len(predictor.chat.encode(tile_sample(first, predictor.tiling)).input_ids) - 1 + 4
    chat = replace(predictor.chat, max_positions=num_tokens)  # the second sample has four tiles more
    questions = open_questions(replace(predictor, chat=chat), folder)
    with pytest.warns(UserWarning, match="set: 1 samples are too long for the model"):
        assert [len(tiled.tiles) for _, tiled in questions.samples()] == [1]
    assert questions.num_records == 2


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_knows_the_number_of_groups_and_fills_no_log_file(
    predictor, answered, monkeypatch, capsys, is_terminal
):
    monkeypatch.setattr(questions_module, "SAMPLES_PER_GROUP", 5)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert len(list(open_questions(predictor, answered).groups(title="reading"))) == 3
    shown = capsys.readouterr().err
    assert ("reading: 100%" in shown, "3/3" in shown, shown == "") == (
        is_terminal,
        is_terminal,
        not is_terminal,
    )


def test_a_set_is_described_without_a_model(answered, tmp_path):
    assert re.fullmatch(
        r".*: scores of the answers, \d+ questions: \d+ of \w+ by exact, .*", describe(answered)
    )
    plain = unlabelled(tmp_path / "set", "a")
    assert describe(plain) == f"{plain}: {Measure.ANSWERS}, as no answer names a metric or a skill"
    assert describe(plain, metric="anls") == f"{plain}: {Measure.SCORES}, 3 questions: 3 of web by anls"


@pytest.mark.parametrize("name", ["docvqa", "chartqa"])
def test_a_suite_is_read_from_its_files_and_scored_by_its_metric(predictor, tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}: a suite is read from its published files; say where"):
        open_questions(predictor, name)
    image = base64.b64encode(encoded_image("PNG", size=(64, 32))).decode()
    rows = ["index\timage\tquestion\tanswer", *(f"{i}\t{image}\tWhat is {i}?\t['{i}']" for i in range(3))]
    (tmp_path / "any.tsv").write_text("\n".join(rows))
    questions = open_questions(predictor, name, suite_dir=tmp_path)
    assert (questions.name, questions.measure) == (name, Measure.SCORES)
    (group,) = questions.groups(title="reading")
    metric = {"docvqa": "anls", "chartqa": "relaxed"}[name]
    assert [(q.metric, q.answers) for q in group.questions] == [(metric, (f"{i}",)) for i in range(3)]
