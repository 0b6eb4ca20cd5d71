"""Conversation -> token ids in InternVL's chat format: a placeholder per tile, a mask of response tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, field
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
        encoded = self._join(sample, self._turns(sample, sample.turns))
        num_tokens = len(encoded.input_ids) + len(sample.tiles) * (self.full_tokens_per_tile - 1)
        if num_tokens > self.config.max_tokens:
            limit = f"chat.max_tokens is {self.config.max_tokens}"
            raise RecordError(f"{num_tokens} tokens at full vision tokens; {limit}", kind="length")
        return encoded

    def encode_prompt(self, sample: TiledSample, question: str) -> EncodedSample:
        """Encode one question up to where the answer begins."""
        pieces = self._turns(sample, [Turn(role="human", text=question)])
        return self._join(sample, [*pieces, (self._opening("assistant"), False)])

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {mark: token_id(self.tokenizer, mark) for mark in MARKS}

    def _turns(self, sample: TiledSample, turns: list[Turn]) -> list[Piece]:
        tiles_per_image, pieces = iter(sample.tiles_per_image), list[Piece]()
        if self.config.system is not None:
            pieces += self._turn("system", self._text(self.config.system), carries_loss=False)
        for turn in turns:
            role, text = (
                ("user" if turn.role == "human" else "assistant"),
                self._content(turn, tiles_per_image),
            )
            pieces += self._turn(role, text, carries_loss=turn.role == "gpt")
        return pieces

    def _turn(self, role: str, text: list[int], *, carries_loss: bool) -> list[Piece]:
        ended = [*text, self._ids[TURN_END]]
        return [(self._opening(role), False), (ended, carries_loss), (self._text("\n"), False)]

    def _opening(self, role: str) -> list[int]:
        return [self._ids[TURN_START], *self._text(f"{role}\n")]

    def _content(self, turn: Turn, tiles_per_image: Iterator[int]) -> list[int]:
        """Encode a turn's text, with the placeholders of an image where its mark is."""
        first, *others = turn.text.split(IMAGE_TOKEN)
        ids = self._text(first)
        for text in others:
            placeholders = [self._ids[PLACEHOLDER]] * next(tiles_per_image)
            ids += [self._ids[IMAGE_START], *placeholders, self._ids[IMAGE_END], *self._text(text)]
        return ids

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _join(self, sample: TiledSample, pieces: list[Piece]) -> EncodedSample:
        return EncodedSample(
            id=sample.id,
            tiles=sample.tiles,
            tiles_per_image=sample.tiles_per_image,
            input_ids=torch.tensor([token for ids, _ in pieces for token in ids]),
            response_mask=torch.tensor([carries_loss for ids, carries_loss in pieces for _ in ids]),
        )
