"""The embedded default's tokenizer, built in code, and what every tokenizer here must know.

Byte-level: each string has tokens, whatever it holds. A few merges make whole words of GlyphDocs' questions,
so that sequences stay short; letters and digits that carry values remain tokens of their own.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

IMAGE_START, IMAGE_END, PLACEHOLDER = "<img>", "</img>", "<IMG_CONTEXT>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
PADDING = "<|endoftext|>"
MARKS = [TURN_START, TURN_END, IMAGE_START, IMAGE_END, PLACEHOLDER]
SPECIAL_TOKENS = [PADDING, *MARKS]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerBase:
    """Learn merges from `texts`; the same texts and size give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    words_and_single_glyphs = Regex(r" ?[A-Za-z]?[a-z]+|[A-Za-z0-9]|\s|[^\sA-Za-z0-9]")
    split = pre_tokenizers.Split(words_and_single_glyphs, "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PADDING,
        additional_special_tokens=[TURN_START, IMAGE_START, IMAGE_END, PLACEHOLDER],
        chat_template=CHAT_TEMPLATE,
    )


def extend_tokenizer(path: str, *, revision: str | None = None) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """Load the tokenizer of a language model and add the marks of images and turns that it lacks.

    Returns the tokenizer and the ids of the new tokens.

    Raises:
        ValueError: there is no tokenizer at `path`.
    """
    tokenizer = _read(path, f"model.language.path {path}: no tokenizer to load", revision=revision)
    known = tokenizer.get_added_vocab()
    new = [token for token in MARKS if token not in known]
    tokenizer.add_tokens(new, special_tokens=True)
    return tokenizer, [token_id(tokenizer, token) for token in new]


def load_tokenizer(folder: Path | str, *, required: Sequence[str] = MARKS) -> PreTrainedTokenizerBase:
    """Read a tokenizer from a model folder; nothing is fetched and no code of the folder runs.

    Raises:
        ValueError: the folder has no readable tokenizer, or it lacks one of the `required` tokens.
    """
    if not (Path(folder) / "tokenizer_config.json").exists():
        raise ValueError(f"{folder}: no tokenizer_config.json; a model folder holds its tokenizer")
    # An empty config, as that of a model folder is of a class that transformers does not know.
    options = {"config": PreTrainedConfig(), "local_files_only": True}
    tokenizer = _read(folder, f"{folder}: its tokenizer files are incomplete or unreadable", **options)
    known = tokenizer.get_added_vocab()
    missing = [token for token in required if token not in known]
    if missing:
        raise ValueError(f"{folder}: the tokenizer lacks the special tokens {', '.join(missing)}")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer into a model folder.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers package raises no class of its own
        raise OSError(f"{folder}: the tokenizer cannot be written ({error}); free space") from error


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Return the id of a special token: ids differ between model families, so they are looked up."""
    return tokenizer.get_added_vocab()[token]


class TextEncoder:
    """Encodes the texts of data and prompts, none of which can pose as a turn, a tile or the end.

    Other special tokens of the language model, such as `<ref>` and `<box>`, remain one token each.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        ends = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
        marks = {*MARKS, *filter(None, ends)}
        vocabulary = tokenizer.get_vocab()
        begin = tokenizer.encode("")[:1]
        # The BOS, if the tokenizer puts one before every text (Llama 3, Gemma, Mistral).
        self.leading = begin if begin == [tokenizer.bos_token_id] else []
        self.longest = max(map(len, vocabulary))  # characters that a token stands for at most
        self._tokenizer = tokenizer
        self._ids = {vocabulary[mark] for mark in marks if mark in vocabulary}
        longest_first = sorted(marks, key=len, reverse=True)  # as one mark may begin another
        self._marks = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def __call__(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return [token for part in self._marks.split(text) for token in self._encode(part)]

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        if self._ids.isdisjoint(ids):
            return ids
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _read(path: Path | str, complaint: str, **options: Any) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # damaged files fail in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{complaint} ({reason})") from error
