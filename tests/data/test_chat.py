import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from vico_pl.data.chat import ChatConfig, ChatEncoder
from vico_pl.errors import RecordError
from vico_pl.tokens import MARKS, SPECIAL_TOKENS, build_tokenizer
from vico_pl.types import TiledSample, Turn

START, END, IMG, IMG_END, TILE = "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"


def sample(*texts, tiles_per_image=()):
    """A sample whose turns alternate between human and gpt."""
    roles = ["human", "gpt"] * len(texts)
    turns = [Turn(role=role, text=text) for role, text in zip(roles, texts, strict=False)]
    tiles = torch.zeros(sum(tiles_per_image), 3, 4, 4, dtype=torch.uint8)
    counts = list(tiles_per_image)
    return TiledSample(id="x", tiles=tiles, tiles_per_image=counts, turns=turns, metadata={})


def response(tokenizer, encoded):
    return tokenizer.decode(encoded.input_ids[encoded.response_mask])


@pytest.fixture
def encoder(tokenizer):
    return ChatEncoder(tokenizer)


def test_the_exact_ids_of_a_worked_example():
    # Without merges a token is a byte: ids 0-5 are the special tokens, then printable bytes from "!" = 6 on.
    tokenizer = build_tokenizer([], vocab_size=len(SPECIAL_TOKENS) + 256)
    encoded = ChatEncoder(tokenizer).encode(sample("<image>\nHi", "9", tiles_per_image=[2]))
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    user, assistant = ([ord(c) - ord("!") + 6 for c in role] for role in ("user", "assistant"))
    hi, nine = [ord("H") - 27, ord("i") - 27], [ord("9") - 27]
    question = [1, *user, newline, 3, 5, 5, 4, newline, *hi, 2, newline]
    answer = [1, *assistant, newline, *nine, 2, newline]
    assert encoded.input_ids.tolist() == question + answer
    assert encoded.response_mask.nonzero().squeeze(1).tolist() == [len(question) + 11, len(question) + 12]


def test_the_text_is_internvls_chat_format(tokenizer, encoder):
    encoded = encoder.encode(sample("<image>\nWhat?", "A cat", "Sure?", "Yes", tiles_per_image=[2]))
    assert tokenizer.decode(encoded.input_ids) == (
        f"{START}user\n{IMG}{TILE}{TILE}{IMG_END}\nWhat?{END}\n"
        f"{START}assistant\nA cat{END}\n"
        f"{START}user\nSure?{END}\n"
        f"{START}assistant\nYes{END}\n"
    )


def test_a_system_message_comes_first_and_carries_no_loss(tokenizer):
    encoded = ChatEncoder(tokenizer, ChatConfig(system="Be brief.")).encode(sample("q", "a"))
    expected = f"{START}system\nBe brief.{END}\n{START}user\nq{END}\n{START}assistant\na{END}\n"
    assert tokenizer.decode(encoded.input_ids) == expected
    assert response(tokenizer, encoded) == f"a{END}"


def test_the_template_of_the_tokenizer_says_the_same(tokenizer, encoder):
    messages = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello"}]
    ours = tokenizer.decode(encoder.encode(sample("Hi there", "Hello")).input_ids)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == ours


@pytest.mark.parametrize("answer", ["9", "A9 O4 A", "", "two\nlines", " spaces "])
def test_the_mask_covers_an_answer_and_the_end_of_its_turn(tokenizer, encoder, answer):
    encoded = encoder.encode(sample("q", answer))
    assert response(tokenizer, encoded) == f"{answer}{END}"
    places = encoded.response_mask.nonzero().squeeze(1)
    assert (places.diff() == 1).all()
    assert tokenizer.decode(encoded.input_ids[: places[0]]).endswith("assistant\n")


def test_all_answers_of_a_conversation_carry_loss(tokenizer, encoder):
    encoded = encoder.encode(sample("one?", "1", "two?", "2", "three?", "3"))
    assert response(tokenizer, encoded) == f"1{END}2{END}3{END}"


def test_each_image_stands_where_its_mark_is_with_a_placeholder_per_tile(tokenizer, encoder):
    conversation = sample("<image><image>\nWhich?", "a", "And <image>?", "b", tiles_per_image=[3, 1, 2])
    text = tokenizer.decode(encoder.encode(conversation).input_ids)
    assert f"user\n{IMG}{TILE * 3}{IMG_END}{IMG}{TILE}{IMG_END}\nWhich?{END}" in text
    assert f"user\nAnd {IMG}{TILE * 2}{IMG_END}?{END}" in text


@pytest.mark.parametrize("mark", SPECIAL_TOKENS)
def test_no_text_can_pose_as_a_special_token(tokenizer, encoder, mark):
    special = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    plain = encoder.encode(sample("a", "b"))
    posing = encoder.encode(sample(f"a{mark}", f"{mark}b{mark}"))

    def specials(encoded):
        return [token for token in encoded.input_ids.tolist() if token in special]

    assert specials(posing) == specials(plain)
    assert mark in tokenizer.decode(posing.input_ids[posing.response_mask])
    prompt = encoder.encode_prompt(sample(), f"a{mark}")
    assert specials(prompt) == specials(encoder.encode_prompt(sample(), "a"))


def test_a_prompt_ends_where_the_answer_begins(tokenizer, encoder):
    whole = encoder.encode(sample("<image>\nWhat?", "A cat", tiles_per_image=[2]))
    prompt = encoder.encode_prompt(sample(tiles_per_image=[2]), "<image>\nWhat?")
    begins = int(whole.response_mask.nonzero()[0])
    assert prompt.input_ids.tolist() == whole.input_ids[:begins].tolist()
    assert not prompt.response_mask.any()
    assert len(prompt.tiles) == 2


def test_length_is_held_against_the_limit_at_full_vision_tokens(tokenizer):
    conversation = sample("<image>\nq", "a", tiles_per_image=[3])
    num_tokens = len(ChatEncoder(tokenizer).encode(conversation).input_ids) - 3 + 3 * 16
    fits = ChatEncoder(tokenizer, ChatConfig(max_tokens=num_tokens), 16)
    assert fits.encode(conversation).tiles_per_image == [3]
    short = ChatEncoder(tokenizer, ChatConfig(max_tokens=num_tokens - 1), 16)
    expected = f"{num_tokens} tokens at full vision tokens; chat.max_tokens is {num_tokens - 1}"
    with pytest.raises(RecordError, match=expected):
        short.encode(conversation)


BOS = "<|begin|>"


def a_language_models(*tokens, bos=None):
    """A tokenizer of bytes as language models have it: with special tokens of its own, or a BOS."""
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.add_special_tokens(["<|end|>", BOS, *tokens, *MARKS])
    if bos is not None:
        special = [(bos, inner.token_to_id(bos))]
        inner.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", bos_token=BOS)


@pytest.mark.parametrize("bos", [None, BOS])
def test_samples_and_prompts_begin_with_the_bos_if_texts_of_the_language_model_do(bos):
    tokenizer = a_language_models(bos=bos)
    encoder = ChatEncoder(tokenizer, ChatConfig(system="s"))
    whole, prompt = encoder.encode(sample("q", "a")), encoder.encode_prompt(sample(), "q")
    for encoded in (whole, prompt):
        text = tokenizer.decode(encoded.input_ids)
        assert (text.startswith(BOS), text.count(BOS)) == (bos is not None, int(bos is not None))
        assert not encoded.response_mask[0]
    text = f"{START}system\ns{END}\n{START}user\nq{END}\n{START}assistant\na{END}\n"
    assert whole.input_ids.tolist() == tokenizer.encode(text)


def test_special_tokens_of_the_language_model_in_texts_remain_one_token_each():
    tokenizer = a_language_models("<ref>", "</ref>")
    encoder = ChatEncoder(tokenizer)
    answer = "<ref>the dog</ref>"
    encoded = encoder.encode(sample("Where?", answer))
    expected = tokenizer.encode(f"{answer}{END}", add_special_tokens=False)
    assert encoded.input_ids[encoded.response_mask].tolist() == expected
    for mark in (END, TILE, "<|end|>", BOS):
        posing = encoder.encode(sample("Where?", f"{answer}{mark}{mark}"))
        found = posing.input_ids[posing.response_mask].tolist()
        split = tokenizer.encode(mark, add_special_tokens=False, split_special_tokens=True)
        assert found == [*expected[:-1], *split, *split, expected[-1]]


def test_a_sample_or_prompt_longer_than_the_language_model_has_positions_is_refused(tokenizer):
    num_tokens = len(ChatEncoder(tokenizer).encode(sample("q", "a")).input_ids)
    assert ChatEncoder(tokenizer, max_positions=num_tokens).encode(sample("q", "a"))
    short = ChatEncoder(tokenizer, max_positions=num_tokens - 1)
    message = rf"{num_tokens} tokens at full vision tokens; the language model has {num_tokens - 1} positions"
    with pytest.raises(RecordError, match=message):
        short.encode(sample("q", "a"))
    with pytest.raises(RecordError, match=f"x: .* the language model has {num_tokens - 1} positions"):
        short.encode_prompt(sample(), "question " * 100)


def test_megabytes_of_text_are_refused_before_they_are_tokenized(encoder):
    with pytest.raises(RecordError, match=r"60000001 characters of text; chat\.max_tokens is 8192"):
        encoder.encode(sample("ab " * 20_000_000, "a"))
