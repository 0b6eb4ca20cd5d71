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
from vico_pl.data.decode import IMAGE_TOKEN, decode_record
from vico_pl.data.pipeline import apply
from vico_pl.data.shards import RecordReader, read_index
from vico_pl.data.tiling import TilingConfig, tile_sample
from vico_pl.data.tokenizer import load_tokenizer
from vico_pl.inference.routing import NEVER, choose_ratios
from vico_pl.model.checkpoint import PROCESSING_NAME, load_model
from vico_pl.model.language import run_packed
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.types import Sample, TiledSample

CALIBRATION_NAME = "calibration.json"


@dataclass(frozen=True, kw_only=True)
class Session:
    """What is needed to answer questions about images."""

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
        processing = _read_json(folder / PROCESSING_NAME)
        calibration = folder / CALIBRATION_NAME
        return cls(
            model=model,
            tokenizer=tokenizer,
            tiling=TilingConfig(**processing["tiling"]),
            chat=ChatEncoder(tokenizer, ChatConfig(**processing["chat"]), model.tokens_per_full_tile),
            threshold=_read_json(calibration)["threshold"] if calibration.exists() else None,
        )

    def router_logits(self, features: Float[Tensor, "T P C"]) -> Float[Tensor, "T K"]:
        """Run the router.

        Raises:
            ValueError: the model has none.
        """
        if self.model.router is None:
            raise ValueError(
                "the model has no router; train one with 'vico train' and a recipe of stage router"
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
        batch = collate([self.chat.encode_prompt(sample, sample.turns[0].text)])
        spliced = self.model.splice_batch(batch, features, ratios)
        states = run_packed(self.model.language, spliced.embeddings, spliced.position_ids, spliced.segment_lengths)
        return int((states[-1] @ self.model.head.T).argmax())

    def decoded(self, folder: Path) -> Iterator[Sample]:
        """Read the samples of a folder of shards in their order; bad records are left out."""
        index = read_index(folder)
        records = map(RecordReader(index), range(index.num_samples))
        return (s for s in apply(records, function=decode_record) if isinstance(s, Sample))

    def samples(self, folder: Path) -> Iterator[TiledSample]:
        """Read samples and cut them as the model was trained."""
        return (tile_sample(sample, self.tiling) for sample in self.decoded(folder))


def question_text(prompt: str, *, num_images: int) -> str:
    """Put one image mark per image before a question that has none.

    >>> question_text("How many?", num_images=1)
    '<image>\\nHow many?'
    """
    return f"{IMAGE_TOKEN}\n" * num_images + prompt.replace(IMAGE_TOKEN, "").strip()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path.parent}: no {path.name}; 'vico train' writes it beside the weights")
    return json.loads(path.read_text())
