"""Conversation -> token ids in InternVL's chat format: a placeholder per tile, a mask of response tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from transformers import PreTrainedTokenizerBase

from vico_pl.data.decode import IMAGE_TOKEN
from vico_pl.errors import RecordError
from vico_pl.tokens import IMAGE_END, IMAGE_START, MARKS, PLACEHOLDER, TURN_END, TURN_START, token_id
from vico_pl.types import EncodedSample, TiledSample, Turn

Piece = tuple[list[int], bool]  # token ids, and whether they carry loss


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How conversations become tokens."""

    system: str | None = None  # text of the system message; none: the conversation begins with the user
    max_tokens: int = 8192  # per sample at full vision tokens; longer samples are bad records


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes conversations with one tokenizer.

    Template tokens are added by id and texts are split without special tokens, so that no text of a data set
    can pose as the end of a turn or as a tile.
    """

    tokenizer: PreTrainedTokenizerBase
    config: ChatConfig = field(default_factory=ChatConfig)
    full_tokens_per_tile: int = 256  # to hold `max_tokens` against

    def encode(self, sample: TiledSample) -> EncodedSample:
        """Encode a whole conversation; the tokens of answers and the end of their turns carry loss.

        Raises:
            RecordError: it has more than `max_tokens`.
        """
        encoded = _join(sample, self._messages(sample))
        num_tokens = len(encoded.input_ids) + len(sample.tiles) * (self.full_tokens_per_tile - 1)
        if num_tokens > self.config.max_tokens:
            limit = f"chat.max_tokens is {self.config.max_tokens}"
            raise RecordError(f"{num_tokens} tokens at full vision tokens; {limit}", kind="length")
        return encoded

    def encode_prompt(self, sample: TiledSample, question: str) -> EncodedSample:
        """Encode one question up to where the answer begins."""
        asked = replace(sample, turns=[Turn(role="human", text=question)])
        return _join(sample, [*self._messages(asked), (self._opening("assistant"), False)])

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {mark: token_id(self.tokenizer, mark) for mark in MARKS}

    def _messages(self, sample: TiledSample) -> list[Piece]:
        pieces, tiles_per_image = list[Piece](), iter(sample.tiles_per_image)
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

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _join(sample: TiledSample, pieces: list[Piece]) -> EncodedSample:
    return EncodedSample(
        id=sample.id,
        tiles=sample.tiles,
        tiles_per_image=sample.tiles_per_image,
        input_ids=torch.tensor([token for ids, _ in pieces for token in ids]),
        response_mask=torch.tensor([carries_loss for ids, carries_loss in pieces for _ in ids]),
    )
