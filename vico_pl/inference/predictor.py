"""The Python API: a model folder opened for inference, routed and batched generation.

Prompts run packed, as samples do in training; only the key-value cache is padded.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vico_pl.data.chat import ChatConfig, ChatEncoder
from vico_pl.data.collate import collate
from vico_pl.data.shards.reader import read_samples
from vico_pl.data.tiling import TilingConfig, choose_grid, tile_sample
from vico_pl.inference.generate import (
    Answer,
    ImageRouting,
    Prompt,
    RoutedSample,
    TextReader,
    decode,
    generation_options,
    pair,
    pixels,
    prompt_texts,
)
from vico_pl.model.families.base import PROCESSING_NAME, FolderContents
from vico_pl.model.families.folder import load_model, open_folder
from vico_pl.model.families.hub import local_folder
from vico_pl.model.language import run_packed
from vico_pl.model.router import ResolutionRouter, RoutingRule, choose_ratios, compress_probability
from vico_pl.model.vlm import VisionLanguageModel
from vico_pl.tokens import PLACEHOLDER, load_tokenizer, token_id
from vico_pl.types import Batch, EncodedSample, Sample, TiledSample


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
    def load(
        cls, model: Path | str, *, device: str = "auto", dtype: torch.dtype | str | None = "auto"
    ) -> "Predictor":
        """Open a model folder in any layout, on a GPU if there is one.

        A text may also be a name on the Hugging Face Hub, NAME or NAME@REVISION; it is fetched once.
        By default weights keep their stored type on a GPU, as with None; on a CPU they are float32, which is
        faster there.

        Raises:
            ValueError: a part of the folder is missing or invalid, or the Hub cannot be reached.
        """
        folder = local_folder(model) if isinstance(model, str) else model
        contents = open_folder(folder).contents
        tiling, chat = _processing(folder, contents)
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        if isinstance(dtype, str):
            dtype = torch.float32 if place.type == "cpu" else None
        network, tokenizer = load_model(folder, dtype=dtype).to(place), load_tokenizer(folder)
        for name, found, expected in (
            ("the tile_size of its tiling", tiling.tile_size, network.vision.tile_size),
            ("its placeholder_id", network.spec.placeholder_id, token_id(tokenizer, PLACEHOLDER)),
        ):
            if found != expected:
                raise ValueError(f"{folder}: {name} is {found!r}; its tower and tokenizer have {expected}")
        if isinstance(network.router, ResolutionRouter):
            network.router.fuse()
        encoder = ChatEncoder(tokenizer, chat, network.tokens_per_full_tile, network.max_positions)
        rule = contents.rule
        return cls(folder=folder, model=network, tokenizer=tokenizer, tiling=tiling, chat=encoder, rule=rule)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.head.device

    def samples(self, folder: Path) -> Iterator[TiledSample]:
        """Read the usable samples of a folder of shards, tiled as in training."""
        return (tile_sample(sample, self.tiling) for sample in read_samples(folder))

    def encode(self, tiles: UInt8[Tensor, "T 3 H W"]) -> Float[Tensor, "T P C"]:
        """Return the patch features of tiles."""
        if not len(tiles):  # not all encoders take none
            return self.model.head.new_empty(0, self.model.vision.num_patches, self.model.vision.width)
        return self.model.encode_tiles(tiles.to(self.device))

    def router_logits(self, features: Float[Tensor, "T P C"]) -> Float[Tensor, "T K"]:
        """Run the router.

        Raises:
            ValueError: the model has none, or its output is not finite.
        """
        if self.model.router is None:
            lacks = "the model has no router; train one with a recipe of stage router"
            raise ValueError(f"{self.folder}: {lacks}")
        logits = self.model.router(features).float().cpu()
        if not logits.isfinite().all():
            raise ValueError(f"{self.folder}: the router gives NaN or infinity; train or export it again")
        return logits

    def choose_ratios(
        self, features: Float[Tensor, "T P C"], logits: Float[Tensor, "T K"] | None = None
    ) -> Int64[Tensor, " T"]:
        """Choose a ratio for each tile of a sample; full tokens if there is no router or no calibration.

        `logits` are those of the router, if it has run already.
        """
        if self.model.router is None or self.rule is None or not len(features):
            return torch.full((len(features),), self.model.ratios[0])
        logits = self.router_logits(features) if logits is None else logits
        return choose_ratios(logits, ratios=self.model.ratios, rule=self.rule)

    @torch.no_grad()
    def route(self, image: Any) -> ImageRouting:
        """Say how the tiles of an image are routed, of any kind that `generate` takes."""
        return self.prepare([image]).images[0]

    @torch.no_grad()
    def generate(
        self,
        images: Any,
        prompts: str | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        ratios: int | Sequence[int | Sequence[int]] | None = None,
        stop_strings: Sequence[str] = (),
        streamer: Callable[[str], object] | None = None,
        stop: Callable[[], bool] | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Answer prompts about images, routed if the model is calibrated; greedily without `options`.

        A greedy answer does not depend on its batch, nor the routing of an image on other prompts.

        Args:
            images: of each prompt: an image, a list of images, or None for text only. An image is a path,
                the bytes of a file, a Pillow image, or uint8: an array (H, W, 3) or (H, W), a tensor
                (3, H, W). Unless a prompt has one `<image>` for each, its images come first.
            prompts: a text each, or questions and answers in turn up to the question to answer. A text
                instead of a list of prompts is one prompt, and `images` are its images.
            max_new_tokens: length limit of each answer.
            batch_size: number of prompts that run together.
            ratios: instead of the router's: one for all tiles, or for each prompt one, or one for each tile.
            stop_strings: an answer ends before any of these texts.
            streamer: gets the text of a single prompt in pieces as they come; together they are its text.
            stop: is asked after each token; True ends the answers of its batch, and no other is begun.
            options: of transformers' GenerationConfig, such as temperature, top_p or do_sample.

        Returns:
            An answer for each prompt; fewer only after `stop`.

        Raises:
            ValueError: an image, a prompt, a ratio or an option is invalid, or a prompt is too long.
        """
        reader = TextReader(tokenizer=self.tokenizer, stop_strings=stop_strings, stop=stop, streamer=streamer)
        asked = pair(images, prompts)  # images and texts of each prompt
        given = ratios if isinstance(ratios, Sequence) else [ratios] * len(asked)
        for problem, is_found in (
            (f"max_new_tokens is {max_new_tokens}; expected at least 1", max_new_tokens < 1),
            (f"batch_size is {batch_size}; expected at least 1", batch_size < 1),
            (f"ratios of {len(given)} prompts for {len(asked)}", len(given) != len(asked)),
            (f"{len(asked)} prompts with a streamer; expected one", streamer and len(asked) != 1),
        ):
            if is_found:
                raise ValueError(problem)
        settings = {**generation_options(options), "max_new_tokens": max_new_tokens}
        answers: list[Answer] = []
        for start in range(0, len(asked), batch_size):
            numbers = range(start, min(start + batch_size, len(asked)))
            routed = [self.prepare(asked[i][0], name=f"prompt {i}", ratios=given[i]) for i in numbers]
            encoded = [
                self.encode_prompt(one.sample, asked[i][1]) for i, one in zip(numbers, routed, strict=True)
            ]
            answers += self.answer_batch(routed, encoded, reader=reader, **settings)
            if stop is not None and stop():
                break
        return answers

    @torch.no_grad()
    def prepare(
        self, images: Any, *, name: str = "image", ratios: int | Sequence[int] | None = None
    ) -> RoutedSample:
        """Encode and route the images of a prompt, alone: rounding must not let other prompts decide."""
        start, found = self._now(), [pixels(image) for image in images]
        sample = tile_sample(Sample(id=name, images=found, turns=[], metadata={}), self.tiling)
        features, lengths = self.encode(sample.tiles), sample.tiles_per_image
        logits = self.router_logits(features) if self.model.router is not None and found else None
        chosen = (
            self.choose_ratios(features, logits) if ratios is None else self._fixed_ratios(sample, ratios)
        )
        scores: Sequence[list[float] | None] = [None] * len(found)
        if logits is not None:
            scores = [p.tolist() for p in compress_probability(logits).split(lengths)]
        grids = (choose_grid(x.shape[2], x.shape[1], self.tiling.per_image(len(found))) for x in found)
        routings = [
            ImageRouting(
                ratios=of_image.tolist(),
                scores=score,
                vision_tokens=(self.model.vision.num_patches // of_image).tolist(),
                grid=grid,
                has_thumbnail=len(of_image) > grid[0] * grid[1],
            )
            for of_image, score, grid in zip(chosen.split(lengths), scores, grids, strict=True)
        ]
        return RoutedSample(sample, features, chosen, routings, self._now() - start)

    def encode_prompt(self, sample: TiledSample, prompt: Prompt) -> EncodedSample:
        """Encode a prompt about the images of a sample; a RecordError says that it is too long."""
        return self.chat.encode_prompt(sample, *prompt_texts(prompt, num_images=len(sample.tiles_per_image)))

    def answer_batch(
        self,
        routed: Sequence[RoutedSample],
        prompts: Sequence[EncodedSample],
        *,
        reader: TextReader,
        **settings: Any,
    ) -> Iterator[Answer]:
        """Answer a batch of prompts about prepared images; takes settings of generate() of transformers."""
        start, batch = self._now(), collate(prompts).to(self.device)
        settings["ends"] = reader.ends
        rows = decode(
            self.model,
            self.tokenizer,
            batch,
            features=[one.features for one in routed],
            ratios=[one.ratios for one in routed],
            **settings,
        ).tolist()
        seconds = self._now() - start
        for one, length, row in zip(routed, batch.sample_lengths.tolist(), rows, strict=True):
            ids, has_ended = reader.trim(row)
            num_tiles, spent = len(one.ratios), sum(sum(image.vision_tokens) for image in one.images)
            yield Answer(
                text=reader.read(ids),
                images=one.images,
                prompt_tokens=length - num_tiles + spent,
                new_tokens=len(ids),
                vision_tokens=spent,
                full_vision_tokens=num_tiles * self.model.tokens_per_full_tile,
                finish_reason="stop" if has_ended or len(ids) < settings["max_new_tokens"] else "length",
                seconds={"encode": one.seconds, "generate": seconds},
            )

    def answer(self, samples: Sequence[TiledSample], prompts: Sequence[Prompt], **settings: Any) -> list[str]:
        """Answer prompt i about sample i; takes the arguments of `generate_ids`."""
        ids = self.generate_ids(samples, prompts, **settings)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @torch.no_grad()
    def generate_ids(
        self,
        samples: Sequence[TiledSample],
        prompts: Sequence[Prompt],
        *,
        features: Sequence[Float[Tensor, "_ P C"]],
        ratios: Sequence[Int64[Tensor, " _"]],
        max_new_tokens: int = 64,
    ) -> Int64[Tensor, "B n"]:
        """Return the token ids of the answers, padded on the right after the end of the turn.

        Prompt i is about sample i, whose tiles have `features[i]` and are compressed by `ratios[i]`, any
        number of them. An answer does not depend on the rest of the batch.
        """
        batch = self._encode_prompts(samples, prompts)
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens}
        return decode(self.model, self.tokenizer, batch, features=features, ratios=ratios, **settings)

    @torch.no_grad()
    def first_token(self, sample: TiledSample, ratios: Int64[Tensor, " t"], *, routes: bool) -> int:
        """Run everything from tiles to the first answer token, for timing; `routes` runs the router too."""
        features = self.encode(sample.tiles)
        if routes:
            self.router_logits(features)
        batch = self._encode_prompts([sample], [sample.turns[0].text])
        spliced = self.model.splice_batch(batch, features, ratios.to(self.device))
        states = run_packed(self.model.language, spliced.embeddings, spliced.segment_lengths)
        return int((states[-1] @ self.model.head.T).argmax())

    def _encode_prompts(self, samples: Sequence[TiledSample], prompts: Sequence[Prompt]) -> Batch:
        encoded = [self.encode_prompt(*one) for one in zip(samples, prompts, strict=True)]
        return collate(encoded).to(self.device)

    def _fixed_ratios(self, sample: TiledSample, given: int | Sequence[int]) -> Int64[Tensor, " t"]:
        count = len(sample.tiles)
        ratios = [given] * count if isinstance(given, int) else list(given)
        if len(ratios) != count or not set(ratios) <= set(self.model.ratios):
            expected = f"one for each of {count} tiles, all in {self.model.ratios}"
            raise ValueError(f"{sample.id}: ratios are {given}; expected {expected}")
        return torch.tensor(ratios, dtype=torch.int64)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _processing(folder: Path, contents: FolderContents) -> tuple[TilingConfig, ChatConfig]:
    settings = contents.processing
    if settings is None:
        raise ValueError(f"{folder}: no {PROCESSING_NAME}; 'vico train' writes it next to the weights")
    try:
        tiling, chat = TilingConfig(**settings["tiling"]), ChatConfig(**settings["chat"])
        if not isinstance(chat.system, str | None):
            raise ValueError(f"system is {chat.system!r}; expected a text")
        return tiling, chat
    except (KeyError, TypeError, ValueError) as error:  # missing or unknown settings, or invalid values
        problem = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{folder / PROCESSING_NAME}: {problem}") from error
