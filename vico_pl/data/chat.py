"""Conversation -> token ids in InternVL's chat format: a placeholder per tile, a mask of response tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import PreTrainedTokenizerBase

from vico_pl.data.decode import IMAGE_TOKEN
from vico_pl.errors import RecordError
from vico_pl.tokens import IMAGE_END, IMAGE_START, PLACEHOLDER, TURN_END, TURN_START, token_id
from vico_pl.types import EncodedSample, TiledSample, Turn


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
        """Encode a whole conversation; the tokens of answers and the end of their turns carry loss."""
        ids, mask = self._header(), []
        mask += [False] * len(ids)
        tiles_per_image = iter(sample.tiles_per_image)
        for turn in sample.turns:
            before, text, after = self._turn(turn, tiles_per_image)
            carries_loss = turn.role == "gpt"
            ids += before + text + after
            mask += [False] * len(before) + [carries_loss] * (len(text) + 1) + [False] * (len(after) - 1)
        self._check_length(len(ids), sample)
        return self._encoded(sample, ids, mask)

    def encode_prompt(self, sample: TiledSample, question: str) -> EncodedSample:
        """Encode one question up to where the answer begins."""
        ids = self._header()
        before, text, after = self._turn(Turn(role="human", text=question), iter(sample.tiles_per_image))
        ids += before + text + after + self._opening("assistant")
        return self._encoded(sample, ids, [False] * len(ids))

    @cached_property
    def _ids(self) -> dict[str, int]:
        marks = (TURN_START, TURN_END, IMAGE_START, IMAGE_END, PLACEHOLDER)
        return {mark: token_id(self.tokenizer, mark) for mark in marks}

    def _header(self) -> list[int]:
        if self.config.system is None:
            return []
        return [*self._opening("system"), *self._text(self.config.system), *self._closing()]

    def _turn(self, turn: Turn, tiles_per_image: Iterator[int]) -> tuple[list[int], list[int], list[int]]:
        role = "user" if turn.role == "human" else "assistant"
        pieces = turn.text.split(IMAGE_TOKEN)
        text = self._text(pieces[0])
        for piece in pieces[1:]:
            text += self._image(next(tiles_per_image)) + self._text(piece)
        return self._opening(role), text, self._closing()

    def _image(self, num_tiles: int) -> list[int]:
        return [self._ids[IMAGE_START], *[self._ids[PLACEHOLDER]] * num_tiles, self._ids[IMAGE_END]]

    def _opening(self, role: str) -> list[int]:
        return [self._ids[TURN_START], *self._text(f"{role}\n")]

    def _closing(self) -> list[int]:
        return [self._ids[TURN_END], *self._text("\n")]

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _check_length(self, num_tokens: int, sample: TiledSample) -> None:
        full = num_tokens + len(sample.tiles) * (self.full_tokens_per_tile - 1)
        if full > self.config.max_tokens:
            raise RecordError(
                f"{full} tokens at full vision tokens; chat.max_tokens is {self.config.max_tokens}"
            )

    def _encoded(self, sample: TiledSample, ids: list[int], mask: list[bool]) -> EncodedSample:
        return EncodedSample(
            id=sample.id,
            tiles=sample.tiles,
            tiles_per_image=sample.tiles_per_image,
            input_ids=torch.tensor(ids),
            response_mask=torch.tensor(mask),
        )
