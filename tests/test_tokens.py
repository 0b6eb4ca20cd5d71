import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from vico_pl.data.glyphs import question_words
from vico_pl.tokens import (
    MARKS,
    PLACEHOLDER,
    SPECIAL_TOKENS,
    TURN_END,
    build_tokenizer,
    extend_tokenizer,
    load_tokenizer,
    save_tokenizer,
    token_id,
)


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_letters_and_digits_that_carry_values_are_tokens_of_their_own(tokenizer):
    assert tokenizer.tokenize("F0 A9 Z7") == ["F", "0", "Ġ", "A", "9", "Ġ", "Z", "7"]


def test_whole_words_of_the_questions_are_one_token_each(tokenizer):
    assert tokenizer.tokenize("What colour is the ring?") == ["What", "Ġcolour", "Ġis", "Ġthe", "Ġring", "?"]


def test_the_same_texts_give_the_same_tokenizer(tokenizer):
    again = build_tokenizer(question_words(), vocab_size=384)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) <= 384


def test_special_tokens_are_single_ids(tokenizer):
    ids = [token_id(tokenizer, token) for token in SPECIAL_TOKENS]
    assert len(set(ids)) == len(SPECIAL_TOKENS)
    assert tokenizer.encode("".join(SPECIAL_TOKENS)) == ids
    assert tokenizer.eos_token == TURN_END


def test_a_tokenizer_comes_back_from_its_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    restored = load_tokenizer(tmp_path)
    text = "Which is greater, A or B?"
    assert restored.encode(text) == tokenizer.encode(text)
    assert token_id(restored, PLACEHOLDER) == token_id(tokenizer, PLACEHOLDER)
    messages = [{"role": "user", "content": "x"}]
    assert restored.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\nx<|im_end|>\n"


def test_a_tokenizer_for_which_there_is_no_room_is_an_error_of_the_system(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"{tmp_path}: the tokenizer cannot be written .*No space left"):
        save_tokenizer(tokenizer, tmp_path)


def test_marks_that_a_tokenizer_lacks_get_the_ids_behind_its_own(tmp_path):
    vocab = {"a": 0, "<unk>": 1}
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<unk>")))
    plain.save_pretrained(tmp_path)
    extended, new = extend_tokenizer(str(tmp_path))
    assert extended.convert_ids_to_tokens(new) == MARKS
    assert new == [2, 3, 4, 5, 6]
    extended.save_pretrained(tmp_path)
    assert extend_tokenizer(str(tmp_path))[1] == []


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "[]")])
def test_damaged_tokenizer_files_are_refused_in_a_sentence(tokenizer, tmp_path, name, content):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="tokenizer files are incomplete or unreadable"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_with_our_special_tokens_is_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=f"{tmp_path}: no tokenizer_config.json"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / name
        path.write_text(path.read_text().replace("<img>", "<picture>"))
    with pytest.raises(ValueError, match=f"{tmp_path}: the tokenizer lacks the special tokens <img>$"):
        load_tokenizer(tmp_path)
