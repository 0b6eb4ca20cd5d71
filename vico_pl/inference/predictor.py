"""The Python API: a model folder opened for inference, routed and batched greedy generation.

Prompts run packed, as samples do in training; only the key-value cache is padded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from vico_pl.data.chat import ChatConfig, ChatEncoder
from vico_pl.data.collate import collate
from vico_pl.data.decode import IMAGE_TOKEN
from vico_pl.data.shards.inspect import read_samples
from vico_pl.data.tiling import TilingConfig, tile_sample
from vico_pl.model.families.base import PROCESSING_NAME, FolderContents
from vico_pl.model.families.folder import load_model, open_folder
from vico_pl.model.language import KeyValues, run_packed
from vico_pl.model.router import RoutingRule, choose_ratios
from vico_pl.model.vlm import Spliced, VisionLanguageModel
from vico_pl.tokens import PLACEHOLDER, TURN_END, load_tokenizer, token_id
from vico_pl.types import Batch, Image, Sample, TiledSample

MAX_TILES = 1024  # per sample; all grids of so many are tried


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
        cls, folder: Path, *, device: str = "auto", dtype: torch.dtype | str | None = "auto"
    ) -> "Predictor":
        """Open a model folder in any layout, on a GPU if there is one.

        By default weights keep their stored type on a GPU, as with None; on a CPU they are float32, which is
        faster there.

        Raises:
            ValueError: a part of the folder is missing or invalid.
        """
        contents = open_folder(folder).contents
        tiling, chat = _processing(folder, contents)
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        if isinstance(dtype, str):
            dtype = torch.float32 if place.type == "cpu" else None
        model, tokenizer = load_model(folder, dtype=dtype).to(place), load_tokenizer(folder)
        for name, found, expected in (
            ("the tile_size of its tiling", tiling.tile_size, model.vision.tile_size),
            ("its placeholder_id", model.spec.placeholder_id, token_id(tokenizer, PLACEHOLDER)),
        ):
            if found != expected:
                raise ValueError(f"{folder}: {name} is {found!r}; its tower and tokenizer have {expected}")
        encoder = ChatEncoder(tokenizer, chat, model.tokens_per_full_tile, model.max_positions)
        rule = contents.rule
        return cls(folder=folder, model=model, tokenizer=tokenizer, tiling=tiling, chat=encoder, rule=rule)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.head.device

    def samples(self, folder: Path) -> Iterator[TiledSample]:
        """Read the usable samples of a folder of shards, tiled as in training."""
        return (tile_sample(sample, self.tiling) for sample in read_samples(folder))

    def encode(self, tiles: UInt8[Tensor, "T 3 H W"]) -> Float[Tensor, "T P C"]:
        """Return the patch features of tiles."""
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

    def route(self, features: Float[Tensor, "T P C"]) -> Int64[Tensor, " T"]:
        """Choose a ratio for each tile of a sample; full tokens if there is no router or no calibration."""
        if self.model.router is None or self.rule is None:
            return torch.full((len(features),), self.model.ratios[0])
        return choose_ratios(self.router_logits(features), ratios=self.model.ratios, rule=self.rule)

    @torch.no_grad()
    def answer_image(self, image: Image, question: str, *, max_new_tokens: int = 128) -> str:
        """Answer a question about one image, routed."""
        sample = tile_sample(Sample(id="image", images=[image], turns=[], metadata={}), self.tiling)
        features = self.encode(sample.tiles)
        given = {"features": [features], "ratios": [self.route(features)]}
        (text,) = self.answer([sample], [question], **given, max_new_tokens=max_new_tokens)
        return text

    def answer(self, samples: Sequence[TiledSample], questions: Sequence[str], **settings: Any) -> list[str]:
        """Answer question i about sample i; takes the arguments of `generate_ids`."""
        ids = self.generate_ids(samples, questions, **settings)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @torch.no_grad()
    def generate_ids(
        self,
        samples: Sequence[TiledSample],
        questions: Sequence[str],
        *,
        features: Sequence[Float[Tensor, "_ P C"]],
        ratios: Sequence[Int64[Tensor, " _"]],
        max_new_tokens: int = 64,
    ) -> Int64[Tensor, "B n"]:
        """Return the token ids of the answers, padded on the right after the end of the turn.

        Question i is about sample i, whose tiles have `features[i]` and are compressed by `ratios[i]`, any
        number of them. An answer does not depend on the rest of the batch.
        """
        batch, language = self._encode_prompts(samples, questions), self.model.language
        chosen = torch.cat(list(ratios)).to(self.device)
        spliced = self.model.splice_batch(batch, torch.cat(list(features)), chosen)
        cache = prefill(language, spliced)
        language.set_attn_implementation("sdpa")
        generate: Any = language.generate  # typed by its mixin alone
        last = batch.input_ids[batch.sample_lengths.cumsum(0) - 1]
        # generate() needs only the number of cached tokens, not their ids.
        seen = last[:, None].expand(-1, cache.get_seq_length() + 1)
        mask = [torch.ones(length, dtype=torch.int64) for length in spliced.segment_lengths]
        ids = generate(
            inputs=seen,
            past_key_values=cache,
            attention_mask=pad_sequence(mask, batch_first=True, padding_side="left").to(self.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            # In some families the tokenizer's end of text is another token.
            eos_token_id=token_id(self.tokenizer, TURN_END),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return ids[:, seen.shape[1] :]

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

    def _encode_prompts(self, samples: Sequence[TiledSample], questions: Sequence[str]) -> Batch:
        prompts = [
            self.chat.encode_prompt(sample, question_text(question, num_images=len(sample.tiles_per_image)))
            for sample, question in zip(samples, questions, strict=True)
        ]
        return collate(prompts).to(self.device)


def prefill(language: PreTrainedModel, spliced: Spliced) -> DynamicCache:
    """Run prompts; return the keys and values of all but their last tokens, where decoding starts."""
    kept: KeyValues = {}
    run_packed(language, spliced.embeddings, spliced.segment_lengths, keep=kept)
    cache = DynamicCache()
    for layer in sorted(kept):
        # From (1, heads, S, width) to left-padded rows (B, heads, longest, width).
        samples = [x[0].transpose(0, 1).split(spliced.segment_lengths) for x in kept.pop(layer)]
        rows = [pad_sequence(list(x), batch_first=True, padding_side="left") for x in samples]
        key, value = (x.transpose(1, 2)[:, :, :-1] for x in rows)
        cache.update(key, value, layer)
    return cache


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


def _processing(folder: Path, contents: FolderContents) -> tuple[TilingConfig, ChatConfig]:
    settings = contents.processing
    if settings is None:
        raise ValueError(f"{folder}: no {PROCESSING_NAME}; 'vico train' writes it next to the weights")
    try:
        tiling, chat = TilingConfig(**settings["tiling"]), ChatConfig(**settings["chat"])
        if tiling.max_tiles > MAX_TILES:
            raise ValueError(f"max_tiles is {tiling.max_tiles}; expected at most {MAX_TILES}")
        if not isinstance(chat.system, str | None):
            raise ValueError(f"system is {chat.system!r}; expected a text")
        return tiling, chat
    except (KeyError, TypeError, ValueError) as error:  # missing or unknown settings, or invalid values
        problem = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{folder / PROCESSING_NAME}: {problem}") from error
