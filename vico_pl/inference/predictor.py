"""A model folder opened for inference: model, tokenizer, tiling, chat format and calibrated threshold."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vico_pl.data.chat import ChatConfig, ChatEncoder
from vico_pl.data.collate import collate
from vico_pl.data.decode import IMAGE_TOKEN
from vico_pl.data.shards.inspect import read_samples
from vico_pl.data.tiling import TilingConfig, tile_sample
from vico_pl.inference.routing import choose_ratios
from vico_pl.model.families.base import PROCESSING_NAME, Contents
from vico_pl.model.families.folder import load_model, open_folder
from vico_pl.model.language import run_packed
from vico_pl.model.router import RoutingRule
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.tokens import load_tokenizer
from vico_pl.types import Batch, TiledSample


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Routes images and answers questions about them.

    Patch features stay on the model's device; router logits and ratios are on the CPU.
    """

    folder: Path  # of the model
    model: VisionLanguageModel
    tokenizer: PreTrainedTokenizerBase
    tiling: TilingConfig
    chat: ChatEncoder
    rule: RoutingRule | None  # None: not calibrated

    @classmethod
    def load(cls, folder: Path, *, device: str = "auto") -> "Predictor":
        """Open a model folder in any layout, on a GPU if there is one.

        On a GPU weights keep their stored type; on a CPU they are float32, which is faster there.

        Raises:
            ValueError: a part of the folder is missing or invalid.
        """
        contents = open_folder(folder).contents
        tiling, chat = _processing(folder, contents)
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        dtype = torch.float32 if place.type == "cpu" else None
        model, tokenizer = load_model(folder, dtype=dtype).to(place), load_tokenizer(folder)
        encoder, rule = ChatEncoder(tokenizer, chat, model.tokens_per_full_tile), contents.rule
        return cls(folder=folder, model=model, tokenizer=tokenizer, tiling=tiling, chat=encoder, rule=rule)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.head.device

    def encode(self, tiles: UInt8[Tensor, "T 3 H W"]) -> Float[Tensor, "T P C"]:
        """Return the patch features of tiles."""
        return self.model.encode_tiles(tiles.to(self.device))

    def router_logits(self, features: Float[Tensor, "T P C"]) -> Float[Tensor, "T K"]:
        """Run the router.

        Raises:
            ValueError: the model has none.
        """
        if self.model.router is None:
            lacks = "the model has no router; train one with a recipe of stage router"
            raise ValueError(f"{self.folder}: {lacks}")
        return self.model.router(features).float().cpu()

    def route(self, features: Float[Tensor, "T P C"]) -> Int64[Tensor, " T"]:
        """Choose a ratio for each tile of a sample; full tokens if there is no router or no calibration."""
        if self.model.router is None or self.rule is None:
            return torch.full((len(features),), self.model.ratios[0])
        return choose_ratios(self.router_logits(features), ratios=self.model.ratios, rule=self.rule)

    def encode_prompts(self, samples: Sequence[TiledSample], questions: Sequence[str]) -> Batch:
        """Encode question i about sample i."""
        prompts = [
            self.chat.encode_prompt(sample, question_text(question, num_images=len(sample.tiles_per_image)))
            for sample, question in zip(samples, questions, strict=True)
        ]
        return collate(prompts).to(self.device)

    @torch.no_grad()
    def first_token(self, sample: TiledSample, ratios: Int64[Tensor, " t"], *, routes: bool) -> int:
        """Run everything from tiles to the first answer token, for timing; `routes` runs the router too."""
        features = self.encode(sample.tiles)
        if routes:
            self.router_logits(features)
        batch = self.encode_prompts([sample], [sample.turns[0].text])
        spliced = self.model.splice_batch(batch, features, ratios.to(self.device))
        states = run_packed(self.model.language, spliced.embeddings, spliced.segment_lengths)
        return int((states[-1] @ self.model.head.T).argmax())

    def samples(self, folder: Path) -> Iterator[TiledSample]:
        """Read the usable samples of a folder of shards, tiled as in training."""
        return (tile_sample(sample, self.tiling) for sample in read_samples(folder))


def question_text(prompt: str, *, num_images: int) -> str:
    r"""Put all image marks first unless the prompt has exactly one per image.

    >>> question_text("How many?", num_images=1)
    '<image>\nHow many?'
    >>> question_text("From <image> to <image>, what changed?", num_images=2)
    'From <image> to <image>, what changed?'
    """
    if prompt.count(IMAGE_TOKEN) == num_images:
        return prompt
    return f"{IMAGE_TOKEN}\n" * num_images + prompt.replace(IMAGE_TOKEN, "").strip()


def _processing(folder: Path, contents: Contents) -> tuple[TilingConfig, ChatConfig]:
    settings = contents.processing
    if settings is None:
        raise ValueError(f"{folder}: no {PROCESSING_NAME}; 'vico train' writes it next to the weights")
    try:
        return TilingConfig(**settings["tiling"]), ChatConfig(**settings["chat"])
    except KeyError as error:
        raise ValueError(f"{folder / PROCESSING_NAME}: {error} is missing") from error
    except (TypeError, ValueError) as error:  # unknown settings or invalid values
        raise ValueError(f"{folder / PROCESSING_NAME}: {error}") from error
