"""A model folder opened for use: model, tokenizer, tiling, chat format and calibrated threshold together."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vico_pl.data.chat import ChatConfig, ChatEncoder
from vico_pl.data.collate import collate
from vico_pl.data.decode import IMAGE_TOKEN
from vico_pl.data.inspect import read_samples
from vico_pl.data.tiling import TilingConfig, tile_sample
from vico_pl.data.tokenizer import load_tokenizer
from vico_pl.inference.routing import NEVER, choose_ratios
from vico_pl.model.checkpoint import PROCESSING_NAME, load_model
from vico_pl.model.language import run_packed
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.types import TiledSample

CALIBRATION_NAME = "calibration.json"


@dataclass(frozen=True, kw_only=True)
class Session:
    """What is needed to answer questions about images."""

    folder: Path  # what was opened
    model: VisionLanguageModel
    tokenizer: PreTrainedTokenizerBase
    tiling: TilingConfig
    chat: ChatEncoder
    threshold: float | None  # calibrated P(compress); None: not calibrated

    @classmethod
    def load(cls, folder: Path) -> "Session":
        """Open a model folder.

        Raises:
            ValueError: a part of the folder is missing or does not fit.
        """
        model, tokenizer = load_model(folder), load_tokenizer(folder)
        tiling, chat = _read_processing(folder / PROCESSING_NAME)
        return cls(
            folder=folder,
            model=model,
            tokenizer=tokenizer,
            tiling=tiling,
            chat=ChatEncoder(tokenizer, chat, model.tokens_per_full_tile),
            threshold=_read_threshold(folder / CALIBRATION_NAME),
        )

    def router_logits(self, features: Float[Tensor, "T P C"]) -> Float[Tensor, "T K"]:
        """Run the router.

        Raises:
            ValueError: the model has none.
        """
        if self.model.router is None:
            raise ValueError(
                f"{self.folder}: the model has no router; train one with a recipe of stage router"
            )
        return self.model.router(features)

    def route(self, features: Float[Tensor, "T P C"]) -> Int64[Tensor, " T"]:
        """Choose a ratio per tile by the calibrated threshold; a model without router keeps full tokens."""
        if self.model.router is None:
            return torch.full((len(features),), self.model.ratios[0])
        threshold = NEVER if self.threshold is None else self.threshold
        return choose_ratios(self.router_logits(features), ratios=self.model.ratios, threshold=threshold)

    @torch.no_grad()
    def first_token(self, sample: TiledSample, ratios: Int64[Tensor, " t"], *, routes: bool) -> int:
        """Go from tiles to the first token of an answer, the work that first-token time is made of."""
        features = self.model.encode_tiles(sample.tiles)
        if routes:
            self.router_logits(features)
        question = question_text(sample.turns[0].text, num_images=len(sample.tiles_per_image))
        batch = collate([self.chat.encode_prompt(sample, question)])
        spliced = self.model.splice_batch(batch, features, ratios)
        states = run_packed(
            self.model.language, spliced.embeddings, spliced.position_ids, spliced.segment_lengths
        )
        return int((states[-1] @ self.model.head.T).argmax())

    def samples(self, folder: Path) -> Iterator[TiledSample]:
        """Read the usable samples of a folder of shards, cut as the model was trained."""
        return (tile_sample(sample, self.tiling) for sample in read_samples(folder))


def question_text(prompt: str, *, num_images: int) -> str:
    r"""Put all images before a question that does not say where each of them belongs.

    >>> question_text("How many?", num_images=1)
    '<image>\nHow many?'
    >>> question_text("From <image> to <image>, what changed?", num_images=2)
    'From <image> to <image>, what changed?'
    """
    if prompt.count(IMAGE_TOKEN) == num_images:
        return prompt
    return f"{IMAGE_TOKEN}\n" * num_images + prompt.replace(IMAGE_TOKEN, "").strip()


def _read_processing(path: Path) -> tuple[TilingConfig, ChatConfig]:
    content = _read_json(path)
    try:
        return TilingConfig(**content["tiling"]), ChatConfig(**content["chat"])
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing") from error
    except (TypeError, ValueError) as error:  # unknown settings, or values that do not fit
        raise ValueError(f"{path}: {error}") from error


def _read_threshold(path: Path) -> float | None:
    if not path.exists():
        return None
    threshold = _read_json(path).get("threshold")
    if not isinstance(threshold, float | int):
        raise ValueError(f"{path}: its threshold is {threshold!r}, no number; run 'vico calibrate' again")
    return float(threshold)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent}: no {path.name}; 'vico train' writes it beside the weights")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content
