import pytest
import torch

from tests.support.folders import tiled
from vico_pl.data.collate import collate
from vico_pl.inference.generate import prompt_texts
from vico_pl.model.language import run_packed

MAX_NEW = 9


def naive_ids(predictor, sample, question, ratios, max_new_tokens=MAX_NEW):
    """Greedy tokens of one sample alone, recomputing the whole sequence for each token."""
    (text,) = prompt_texts(question, num_images=len(sample.tiles_per_image))
    batch = collate([predictor.chat.encode_prompt(sample, text)])
    features = predictor.model.encode_tiles(sample.tiles)
    embeddings = predictor.model.splice_batch(batch, features, ratios).embeddings
    embed = predictor.model.language.get_input_embeddings()
    ids = []
    while len(ids) < max_new_tokens and predictor.tokenizer.eos_token_id not in ids:
        states = run_packed(predictor.model.language, embeddings, [len(embeddings)])
        ids.append(int((states[-1] @ predictor.model.head.T).argmax()))
        embeddings = torch.cat([embeddings, embed(torch.tensor(ids[-1:]))])
    return ids


def batched_ids(predictor, samples, questions, ratios, max_new_tokens=MAX_NEW):
    features = [predictor.model.encode_tiles(sample.tiles) for sample in samples]
    return predictor.generate_ids(
        samples, questions, features=features, ratios=ratios, max_new_tokens=max_new_tokens
    )


@pytest.fixture
def mixed(predictor):
    """Samples of every sort, a question for each, and mixed ratios inside an image."""
    samples = [
        tiled(predictor, (64, 64), seed=1),
        tiled(predictor, seed=2),
        tiled(predictor, (32, 32), seed=3),
        tiled(predictor, (64, 32), (32, 32), seed=4),
        tiled(predictor, (32, 64), seed=5),
        tiled(predictor, (32, 32), (32, 32), (64, 64), seed=6),
    ]
    questions = ["What is A?", "Who?", "<image>\nHow many shapes are there?", "Which?", "What?", "Why red?"]
    ratios = [
        torch.tensor(r, dtype=torch.int64)
        for r in ([4, 16, 16, 4, 16], [], [16], [16, 4, 4, 4], [4, 4, 16], [4, 16, 16])
    ]
    return samples, questions, ratios


def never_ends(predictor):
    """Make the end of a turn the last thing the model would say."""
    with torch.no_grad():
        predictor.model.head[predictor.tokenizer.eos_token_id] = 0
    return predictor


@torch.no_grad()
def test_a_row_stops_at_the_end_of_its_turn_while_others_go_on(predictor, mixed):
    samples, questions, ratios = mixed
    for token in naive_ids(never_ends(predictor), samples[0], questions[0], ratios[0]):
        # Beats that token.
        predictor.model.head[predictor.tokenizer.eos_token_id] = 1.5 * predictor.model.head[token]
        alone = [naive_ids(predictor, *one) for one in zip(samples, questions, ratios, strict=True)]
        lengths = [len(ids) for ids in alone]
        if 1 < lengths[0] < max(lengths) == MAX_NEW:
            break
    assert 1 < lengths[0] < max(lengths) == MAX_NEW
    pad = predictor.tokenizer.pad_token_id
    expected = [ids + [pad] * (MAX_NEW - len(ids)) for ids in alone]
    assert batched_ids(predictor, samples, questions, ratios).tolist() == expected
    given = {"features": [predictor.model.encode_tiles(s.tiles) for s in samples], "ratios": ratios}
    texts = predictor.answer(samples, questions, **given, max_new_tokens=MAX_NEW)
    decode = predictor.tokenizer.decode
    assert texts == [decode(ids, skip_special_tokens=True).strip() for ids in alone]
    assert "<|im_end|>" not in texts[0]


def test_training_time_attention_does_not_leak_into_generation(predictor, mixed):
    first = batched_ids(predictor, *mixed)
    predictor.first_token(mixed[0][0], mixed[2][0], routes=False)  # runs packed attention on the same model
    assert torch.equal(batched_ids(predictor, *mixed), first)


def test_prompts_run_in_one_pass_without_padding_and_only_once(predictor, mixed):
    samples, questions, ratios = mixed
    seen = []

    def note(_, __, given):
        tokens = given.get("inputs_embeds")
        seen.append(tuple((given["input_ids"] if tokens is None else tokens).shape[:2]))

    predictor.model.language.base_model.register_forward_pre_hook(note, with_kwargs=True)
    batched_ids(never_ends(predictor), samples, questions, ratios, max_new_tokens=3)
    prompts = [
        predictor.chat.encode_prompt(sample, *prompt_texts(question, num_images=len(sample.tiles_per_image)))
        for sample, question in zip(samples, questions, strict=True)
    ]
    vision = sum(int((16 // r).sum()) - len(r) for r in ratios)
    total = sum(len(prompt.input_ids) for prompt in prompts) + vision
    assert seen == [(1, total), (6, 1), (6, 1), (6, 1)]
