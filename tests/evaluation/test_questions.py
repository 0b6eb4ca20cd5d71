import sys
from dataclasses import replace

import pytest
import torch

import vico_pl.evaluation.questions as questions_module
from tests.support.folders import full_ratios, tiled
from vico_pl.evaluation.questions import (
    EXTRA_TOKENS,
    EvalQuestion,
    Group,
    answer_group,
    folder_groups,
    read_groups,
)
from vico_pl.model.router import at_threshold, threshold_for
from vico_pl.types import Turn


@pytest.fixture
def samples(predictor):
    return [tiled(predictor, (32, 32), seed=1), tiled(predictor, (64, 64), seed=2), tiled(predictor, seed=3)]


@pytest.fixture
def group(predictor, samples):
    """A group that begins at 64, with questions about its second, first, third and again second sample."""
    asked = [
        (65, "long question about it?", "red"),
        (64, "Who?", "a b c d e f"),
        (66, "Why?", "x"),
        (65, "B?", "y"),
    ]
    return Group(
        samples=samples,
        features=[predictor.model.encode_tiles(s.tiles).detach() for s in samples],
        questions=[EvalQuestion(sample=s, skill="ocr", text=text, expected=e) for s, text, e in asked],
        first=64,
    )


@pytest.fixture
def batches(monkeypatch):
    """Replace the model by one that repeats its questions; collects its batches."""
    seen = []

    def fake(predictor, samples, questions, *, features, ratios, max_new_tokens):
        seen.append((list(questions), [r.tolist() for r in ratios], max_new_tokens))
        assert [len(f) for f in features] == [len(s.tiles) for s in samples] == [len(r) for r in ratios]
        return [f"{q} {r.tolist()}" for q, r in zip(questions, ratios, strict=True)]

    monkeypatch.setattr("vico_pl.inference.predictor.Predictor.answer", fake)
    return seen


def choice(*of_samples):
    return [torch.tensor(ratios, dtype=torch.int64) for ratios in of_samples]


FULL = choice([4], [4] * 5, [])


def test_answers_come_in_the_order_of_the_questions_whatever_the_order_of_the_batch(
    predictor, group, batches
):
    (given,) = answer_group(predictor, group, [choice([4], [4, 16, 4, 4, 4], [])])
    assert given == ["long question about it? [4, 16, 4, 4, 4]", "Who? [4]", "Why? []", "B? [4, 16, 4, 4, 4]"]
    assert batches[0][0] != [q.text for q in group.questions], "the batch was sorted by length"


def test_several_choices_are_answered_in_one_batch_and_equal_ones_once(predictor, group, batches):
    several = [choice([a], [b, 4, 4, 4, 4], []) for a in (4, 16) for b in (4, 16)]
    answers = answer_group(predictor, group, [*several, FULL])
    assert answers[0] == answers[-1] != answers[1]
    assert [of_choice[1] for of_choice in answers] == ["Who? [4]"] * 2 + ["Who? [16]"] * 2 + ["Who? [4]"]
    assert len(batches) == 1
    # First sample: 2 ways, second: 2 ways x 2 questions, text alone: 1.
    assert len(batches[0][0]) == 2 + 4 + 1


def test_batches_keep_within_the_token_budget_but_a_long_prompt_is_asked_alone(
    predictor, group, batches, monkeypatch
):
    monkeypatch.setattr(questions_module, "TOKENS_PER_BATCH", 60)
    expected = answer_group(predictor, group, [FULL])
    assert len(batches) > 1
    for asked, ratios, limit in batches:
        lengths = [sum(16 // r for r in rs) + len(q) for q, rs in zip(asked, ratios, strict=True)]
        assert len(asked) == 1 or len(asked) * (max(lengths) + limit) <= 60 + len(asked) * limit
    assert sorted(q for asked, _, _ in batches for q in asked) == sorted(q.text for q in group.questions)
    monkeypatch.setattr(questions_module, "TOKENS_PER_BATCH", 1)
    batches.clear()
    assert answer_group(predictor, group, [FULL]) == expected
    assert [len(asked) for asked, _, _ in batches] == [1, 1, 1, 1]


@torch.no_grad()
def test_a_long_expected_answer_can_be_right(predictor, samples):
    """With a fixed limit of tokens it never was."""
    predictor.model.head[predictor.tokenizer.eos_token_id] = 0  # never ends
    sample = samples[1]
    features = [predictor.model.encode_tiles(sample.tiles)]
    settings = {"features": features, "ratios": full_ratios(sample)}
    expected = "x" * 40
    length = len(predictor.tokenizer.encode(expected, add_special_tokens=False)) + EXTRA_TOKENS
    ids = predictor.generate_ids([sample], ["A?"], **settings, max_new_tokens=length)
    question = EvalQuestion(sample=0, skill="ocr", text="A?", expected=expected)
    group = Group(samples=[sample], features=features, questions=[question], first=0)
    ((given,),) = answer_group(predictor, group, [full_ratios(sample)])
    assert given == predictor.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert length > 40


def test_right_and_wrong_follow_the_questions(group):
    assert group.grade([" RED", "a b", "x", "x"]) == [True, False, True, False]


def test_groups_number_samples_through_and_hold_their_own_features(predictor, monkeypatch):
    monkeypatch.setattr(questions_module, "SAMPLES_PER_GROUP", 2)
    sizes = [((32, 32),), ((64, 64),), (), ((64, 32), (32, 32)), ((32, 64),)]
    samples = [tiled(predictor, *size, seed=i) for i, size in enumerate(sizes)]
    samples = [replace(s, turns=[s.turns[0], replace(s.turns[1], group="ocr")]) for s in samples]
    groups = list(read_groups(predictor, samples))
    assert [(g.first, len(g.samples)) for g in groups] == [(0, 2), (2, 2), (4, 1)]
    assert [q.sample for g in groups for q in g.questions] == [0, 1, 2, 3, 4]
    with torch.no_grad():
        for features, sample in zip((f for g in groups for f in g.features), samples, strict=True):
            torch.testing.assert_close(features, predictor.model.encode_tiles(sample.tiles))


def test_only_turns_with_a_known_skill_are_questions(predictor):
    asked = [("<image>\nA?", "a", "perception"), ("B?", "b", None), ("C?", "c", "smell"), ("D?", "d", "ocr")]
    turns = [
        turn
        for text, reply, skill in asked
        for turn in (Turn(role="human", text=text), Turn(role="gpt", text=reply, group=skill))
    ]
    (group,) = read_groups(predictor, [replace(tiled(predictor, (32, 32)), turns=turns)])
    assert [(q.text, q.expected, q.skill) for q in group.questions] == [asked[0], asked[3]]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_knows_the_number_of_groups_and_fills_no_log_file(
    predictor, answered, monkeypatch, capsys, is_terminal
):
    monkeypatch.setattr(questions_module, "SAMPLES_PER_GROUP", 5)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert len(list(folder_groups(predictor, answered, title="reading"))) == 3
    shown = capsys.readouterr().err
    assert ("reading: 100%" in shown, "3/3" in shown, shown == "") == (
        is_terminal,
        is_terminal,
        not is_terminal,
    )


def scores(*of_samples):
    return [torch.tensor(values) for values in of_samples]


@pytest.mark.parametrize(("fraction", "compressed"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_a_threshold_compresses_the_given_fraction_of_all_tiles(fraction, compressed):
    given = scores([0.1, 0.9], [0.4], [0.6])
    threshold = threshold_for(given, compressed_fraction=fraction)
    chosen = torch.cat(at_threshold(given, threshold, ratios=[4, 16]))
    assert int((chosen == 16).sum()) == compressed
    ranked = sorted(torch.cat(given).tolist(), reverse=True)
    assert {float(s) for s in torch.cat(given)[chosen == 16]} == set(ranked[:compressed])


def test_tiles_of_equal_score_are_treated_alike():
    given = scores([0.5, 0.5], [0.5, 0.1])
    threshold = threshold_for(given, compressed_fraction=0.25)
    assert [r.tolist() for r in at_threshold(given, threshold, ratios=[4, 16])] == [[16, 16], [16, 4]]
