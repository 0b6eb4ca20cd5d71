from dataclasses import replace

import pytest
import torch
from torch.nn.functional import kl_div

import vico_pl.evaluation.answering as answering
from tests.support.folders import full_ratios, log_probabilities, tiled
from vico_pl.evaluation.answering import (
    EXTRA_TOKENS,
    EvalQuestion,
    Group,
    agreement,
    answer_group,
    score_answers,
)
from vico_pl.types import Turn


def question(sample, text, *answers, metric="exact"):
    return EvalQuestion(sample=sample, group="ocr", metric=metric, prompt=(text,), answers=answers)


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
        questions=[question(s, text, e) for s, text, e in asked],
        first=64,
    )


@pytest.fixture
def batches(monkeypatch):
    """Replace the model by one that repeats its questions; collects its batches."""
    seen = []

    def fake(predictor, samples, questions, *, features, ratios, max_new_tokens):
        questions = [text for (text,) in questions]
        seen.append((questions, [r.tolist() for r in ratios], max_new_tokens))
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
    assert batches[0][0] != [q.prompt[0] for q in group.questions], "the batch was sorted by length"


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
    monkeypatch.setattr(answering, "TOKENS_PER_BATCH", 60)
    expected = answer_group(predictor, group, [FULL])
    assert len(batches) > 1
    for asked, ratios, limit in batches:
        lengths = [sum(16 // r for r in rs) + len(q) for q, rs in zip(asked, ratios, strict=True)]
        assert len(asked) == 1 or len(asked) * (max(lengths) + limit) <= 60 + len(asked) * limit
    assert sorted(q for asked, _, _ in batches for q in asked) == sorted(q.prompt[0] for q in group.questions)
    monkeypatch.setattr(answering, "TOKENS_PER_BATCH", 1)
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
    group = Group(samples=[sample], features=features, questions=[question(0, "A?", expected)], first=0)
    ((given,),) = answer_group(predictor, group, [full_ratios(sample)])
    assert given == predictor.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert length > 40


def scores_of(results):
    return [[result.score for result in of_choice] for of_choice in results]


def test_answers_are_scored_by_the_metric_of_their_question(group):
    scored = score_answers(group, [[" RED", "a b", "x", "x"], ["red", "", "X", "y"]])
    assert scores_of(scored) == [[1, 0, 1, 0], [1, 0, 1, 1]]
    assert scored[0][0].answer == " RED"


def agreement_by_hand(predictor, sample, ratios):
    """exp(-KL) of a sample's response tokens, from two forward passes of its own."""
    full, got = (log_probabilities(predictor, sample, r) for r in (torch.full_like(ratios, 4), ratios))
    return kl_div(got, full, reduction="none", log_target=True).sum(-1).mean().neg().exp().item()


@pytest.mark.parametrize("budget", [1, 10_000])
def test_agreement_is_that_of_each_conversation_with_full_tokens(
    predictor, other, samples, monkeypatch, budget
):
    monkeypatch.setattr(answering, "TOKENS_PER_BATCH", budget)
    turns = [Turn(role=("human", "gpt")[i % 2], text=text) for i, text in enumerate(["B?", "b", "C?", "no"])]
    samples = [*samples[:2], replace(samples[2], turns=turns)]
    features = [predictor.model.encode_tiles(sample.tiles).detach() for sample in samples]
    group = Group(samples=samples, features=features, questions=[], first=0)
    choices = [FULL, choice([16], [4, 16, 4, 16, 16], []), FULL]
    full, mixed, again = scores_of(agreement(predictor, group, choices, reference=predictor))
    assert full == again == pytest.approx([1, 1, 1], abs=1e-6)
    expected = [agreement_by_hand(predictor, s, r) for s, r in zip(samples, choices[1], strict=True)]
    assert mixed == pytest.approx(expected, rel=1e-4)
    assert max(mixed[:2]) < 0.999
    # Another model does not agree with full tokens either: on the samples with images.
    (with_other,) = scores_of(agreement(predictor, group, [FULL], reference=other))
    assert max(with_other[:2]) < 0.999
