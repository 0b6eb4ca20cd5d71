"""Conversation -> token ids in InternVL's chat format: a placeholder per tile, a mask of response tokens."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import cycle
from typing import get_args

import torch
from transformers import PreTrainedTokenizerBase

from vico_pl.data.decode import IMAGE_TOKEN
from vico_pl.errors import RecordError
from vico_pl.tokens import (
    IMAGE_END,
    IMAGE_START,
    MARKS,
    PLACEHOLDER,
    TURN_END,
    TURN_START,
    TextEncoder,
    token_id,
)
from vico_pl.types import EncodedSample, Role, TiledSample, Turn

_FEW_CHARACTERS = 100_000  # are tokenized to be counted, as it takes no time; 60 million take minutes
Piece = tuple[list[int], bool]  # token ids, and whether they carry loss


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How conversations become tokens."""

    system: str | None = None  # text of the system message; none: the conversation begins with the user
    max_tokens: int = 8192  # per sample at full vision tokens; longer samples are bad records


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes conversations with one tokenizer; the tokens of the template are added by id."""

    tokenizer: PreTrainedTokenizerBase
    config: ChatConfig = field(default_factory=ChatConfig)
    full_tokens_per_tile: int = 256  # to hold the limits against
    max_positions: int | None = None  # of the language model; None: any number

    def encode(self, sample: TiledSample) -> EncodedSample:
        """Encode a whole conversation; the tokens of answers and the end of their turns carry loss.

        Raises:
            RecordError: it has more than `max_tokens`, or than the language model has positions.
        """
        return self._join(sample, self.config.max_tokens)

    def encode_prompt(self, sample: TiledSample, *texts: str) -> EncodedSample:
        """Encode a question, or questions and answers in turn up to a question, to where its answer begins.

        Raises:
            RecordError: it has more tokens than the language model has positions.
        """
        roles = cycle(get_args(Role))  # human, gpt
        asked = replace(
            sample, turns=[Turn(role=r, text=text) for r, text in zip(roles, texts, strict=False)]
        )
        try:
            return self._join(asked, sys.maxsize, [(self._opening("assistant"), False)])
        except RecordError as error:
            raise RecordError(f"{sample.id}: {error}", kind=error.kind) from error

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {mark: token_id(self.tokenizer, mark) for mark in MARKS}

    @cached_property
    def _text(self) -> TextEncoder:
        return TextEncoder(self.tokenizer)

    def _join(self, sample: TiledSample, max_tokens: int, ending: Sequence[Piece] = ()) -> EncodedSample:
        limit, reason = max_tokens, f"chat.max_tokens is {max_tokens}"
        if self.max_positions is not None and self.max_positions < limit:
            limit, reason = self.max_positions, f"the language model has {self.max_positions} positions"
        num_characters = sum(len(turn.text) for turn in sample.turns)
        if num_characters > max(limit * self._text.longest, _FEW_CHARACTERS):
            raise RecordError(f"{num_characters} characters of text; {reason}", kind="length")
        pieces = [*self._messages(sample), *ending]
        num_tokens = sum(len(ids) for ids, _ in pieces) + len(sample.tiles) * (self.full_tokens_per_tile - 1)
        if num_tokens > limit:
            raise RecordError(f"{num_tokens} tokens at full vision tokens; {reason}", kind="length")
        return EncodedSample(
            id=sample.id,
            tiles=sample.tiles,
            tiles_per_image=sample.tiles_per_image,
            input_ids=torch.tensor([token for ids, _ in pieces for token in ids]),
            response_mask=torch.tensor([carries_loss for ids, carries_loss in pieces for _ in ids]),
        )

    def _messages(self, sample: TiledSample) -> list[Piece]:
        pieces: list[Piece] = [(self._text.leading, False)]
        tiles_per_image = iter(sample.tiles_per_image)
        if self.config.system is not None:
            pieces += self._message("system", self._text(self.config.system))
        for turn in sample.turns:
            text = self._text_with_images(turn.text, tiles_per_image)
            pieces += self._message("user" if turn.role == "human" else "assistant", text)
        return pieces

    def _message(self, role: str, text: list[int]) -> list[Piece]:
        ended = [*text, self._ids[TURN_END]]
        return [(self._opening(role), False), (ended, role == "assistant"), (self._text("\n"), False)]

    def _opening(self, role: str) -> list[int]:
        return [self._ids[TURN_START], *self._text(f"{role}\n")]

    def _text_with_images(self, text: str, tiles_per_image: Iterator[int]) -> list[int]:
        first, *others = map(self._text, text.split(IMAGE_TOKEN))
        for ids in others:
            placeholders = [self._ids[PLACEHOLDER]] * next(tiles_per_image)
            first += [self._ids[IMAGE_START], *placeholders, self._ids[IMAGE_END], *ids]
        return first
