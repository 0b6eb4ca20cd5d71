"""Generation: images of any kind, prompts and options in, token by token, text and what it took out."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from vico_pl.data.decode import DEFAULT_LIMITS, IMAGE_TOKEN, decode_content, pillow_pixels, read_image
from vico_pl.model.language import KeyValues, run_packed
from vico_pl.model.vlm import Spliced, VisionLanguageModel
from vico_pl.tokens import TURN_END, token_id
from vico_pl.types import Batch, Image, TiledSample

ImageLike = str | Path | bytes | PIL.Image.Image | np.ndarray | Tensor  # bytes: of an image file
Prompt = str | Sequence[str]  # a question, or questions and answers in turn up to the question to answer

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
OPTIONS = (*SAMPLING, "do_sample", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "max_time")
_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # at the end of a text: the next token may complete it


@dataclass(frozen=True, kw_only=True)
class ImageRouting:
    """How the tiles of an image are routed: row by row, the thumbnail last."""

    ratios: list[int]  # patches per vision token
    scores: list[float] | None  # P(compress), from 0 to 1; None: the model has no router
    vision_tokens: list[int]
    grid: tuple[int, int]  # columns and rows
    has_thumbnail: bool


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer, and what it took."""

    text: str
    images: list[ImageRouting]
    prompt_tokens: int  # vision tokens among them
    new_tokens: int  # with the end of the turn
    vision_tokens: int  # of all images
    full_vision_tokens: int  # what they would be without compression
    finish_reason: str  # "stop": it has ended, or was ended by `stop`; "length": at max_new_tokens
    seconds: dict[str, float]  # "encode": of its images; "generate": of its batch, prompts included


class RoutedSample(NamedTuple):
    """The images of a prompt, encoded and routed."""

    sample: TiledSample
    features: Float[Tensor, "t P C"]
    ratios: Int64[Tensor, " t"]
    images: list[ImageRouting]
    seconds: float

    def first(self, num_images: int) -> "RoutedSample":
        """Return the first of the images alone, cut and routed as among all."""
        lengths = self.sample.tiles_per_image[:num_images]
        sample = replace(self.sample, tiles=self.sample.tiles[: sum(lengths)], tiles_per_image=lengths)
        tensors = self.features[: sum(lengths)], self.ratios[: sum(lengths)]
        return RoutedSample(sample, *tensors, self.images[:num_images], self.seconds)


def pixels(image: Any) -> Image:
    """Return an image of any kind as pixels.

    Raises:
        ValueError: it is of another kind, shape or dtype, or the file is no image.
    """
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, bytes):
        return decode_content("image", image, DEFAULT_LIMITS)
    if isinstance(image, PIL.Image.Image):
        return pillow_pixels(image)
    is_tensor, shape = isinstance(image, Tensor), tuple(getattr(image, "shape", ()))
    dtype = str(getattr(image, "dtype", "no dtype")).removeprefix("torch.")
    is_rgb = len(shape) == 3 and shape[0 if is_tensor else 2] == 3
    if dtype != "uint8" or 0 in shape or not (is_rgb or (len(shape) == 2 and not is_tensor)):
        found = f"image is a {type(image).__name__} of {dtype} with shape {shape}"
        kinds = "a path, bytes of a file, a Pillow image, or uint8: an array (H, W, 3) or (H, W), a tensor"
        raise ValueError(f"{found}; expected {kinds} (3, H, W)")
    if isinstance(image, Tensor):
        return image.cpu()
    return torch.from_numpy(image.copy() if is_rgb else np.stack([image] * 3, 2)).permute(2, 0, 1)


def pair(images: Any, prompts: Any) -> list[tuple[list[ImageLike], list[str]]]:
    """Return images and texts of each prompt; a text instead of a sequence of prompts is one prompt.

    Raises:
        ValueError: there are not as many entries of images as prompts, or a prompt ends in no question.
    """
    if isinstance(prompts, str):
        images, prompts = [images], [prompts]
    images = [None] * len(prompts) if images is None else images
    if isinstance(images, ImageLike) or len(images) != len(prompts):
        expected = "a list with an entry for each prompt: an image, a list of images or None"
        raise ValueError(f"{len(prompts)} prompts with other images; expected {expected}")
    pairs = []
    for number, (given, prompt) in enumerate(zip(images, prompts, strict=True)):
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if len(texts) % 2 == 0:
            turns = f"prompt {number} has {len(texts)} turns"
            raise ValueError(f"{turns}; expected questions and answers in turn up to a question")
        pairs.append((list(([given] if isinstance(given, ImageLike) else given) or []), texts))
    return pairs


def prompt_texts(prompt: Prompt, *, num_images: int) -> list[str]:
    r"""Return the texts of a prompt; all image marks come first unless it has exactly one per image.

    >>> prompt_texts("How many?", num_images=1)
    ['<image>\nHow many?']
    >>> prompt_texts(["From <image> to <image>, what changed?", "Nothing.", "Sure?"], num_images=2)
    ['From <image> to <image>, what changed?', 'Nothing.', 'Sure?']
    """
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if sum(text.count(IMAGE_TOKEN) for text in texts) == num_images:
        return texts
    first, *others = (text.replace(IMAGE_TOKEN, "").strip() for text in texts)
    return [f"{IMAGE_TOKEN}\n" * num_images + first, *others]


def generation_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options for `generate` of transformers; greedy without any for sampling, or at temperature 0.

    >>> generation_options({"temperature": 0.5}), generation_options({"temperature": 0, "top_p": 0.9})
    ({'temperature': 0.5, 'do_sample': True}, {'do_sample': False})

    Raises:
        ValueError: there is no such option.
    """
    for name in given:
        if name not in OPTIONS:
            close = difflib.get_close_matches(name, OPTIONS, n=1)
            expected = f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(OPTIONS)}"
            raise ValueError(f"'{name}' is no option of generation; {expected}")
    if given.get("do_sample", any(name in given for name in SAMPLING)) and given.get("temperature") != 0:
        floats = {name: float(value) for name, value in given.items() if name in ("temperature", "top_p")}
        return {**given, **floats, "do_sample": True}
    return {**{name: value for name, value in given.items() if name not in SAMPLING}, "do_sample": False}


@dataclass(kw_only=True)
class TextReader:
    """Reads tokens as text: no special tokens, no white space around it, up to a stop string."""

    tokenizer: PreTrainedTokenizerBase
    stop_strings: Sequence[str] = ()
    stop: Callable[[], bool] | None = None  # ends answers from outside
    streamer: Callable[[str], object] | None = None  # takes the text of a single answer in pieces
    _num_sent: int = 0  # characters

    def __post_init__(self) -> None:
        if isinstance(self.stop_strings, str) or not all(self.stop_strings):
            given = f"stop_strings is {self.stop_strings!r}"
            raise ValueError(f"{given}; expected a list of texts that are not empty")

    def ends(self, ids: list[int]) -> bool:
        """Say after each token of an answer whether it was the last."""
        if self.streamer is not None:
            self.read(ids, is_whole=False)
        is_stopped = self.stop is not None and self.stop()
        return is_stopped or any(string in self._decode(ids) for string in self.stop_strings)

    def trim(self, row: list[int]) -> tuple[list[int], bool]:
        """Return the ids of an answer without padding, and whether the end of its turn is among them."""
        end, padding = token_id(self.tokenizer, TURN_END), self.tokenizer.pad_token_id
        if end in row:
            return row[: row.index(end) + 1], True
        return row[: max((i + 1 for i, token in enumerate(row) if token != padding), default=0)], False

    def read(self, ids: list[int], *, is_whole: bool = True) -> str:
        """Return and pass on the text, or as much of its beginning as no further token changes."""
        text = self._decode(ids)
        end = min((place for string in self.stop_strings if (place := text.find(string)) >= 0), default=None)
        if end is None and not is_whole:
            text = text.rstrip(_HALF_CHARACTER)
            begun = (
                n for string in self.stop_strings for n in range(len(string)) if text.endswith(string[:n])
            )
            end = len(text) - max(begun, default=0)
        text = text[:end].strip()
        if self.streamer is not None and len(text) > self._num_sent:
            self.streamer(text[self._num_sent :])
            self._num_sent = len(text)
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


@torch.no_grad()
def decode(
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Batch,
    *,
    features: Sequence[Float[Tensor, "_ P C"]],
    ratios: Sequence[Int64[Tensor, " _"]],
    ends: Callable[[list[int]], bool] | None = None,
    **settings: Any,
) -> Int64[Tensor, "B n"]:
    """Return the token ids of the answers, padded on the right after the end of the turn.

    `ends` is asked after each token whether the answer ends; `settings` go to generate() of transformers.
    """
    of_tiles = torch.cat([x for x in features if len(x)] or [features[0]])  # none may be of another dtype
    spliced = model.splice_batch(prompts, of_tiles, torch.cat(list(ratios)).to(model.head.device))
    cache = prefill(model.language, spliced)
    model.language.set_attn_implementation("sdpa")
    last = prompts.input_ids[prompts.sample_lengths.cumsum(0) - 1]
    # generate() runs the last token; of the cached ones it needs the number, not the ids.
    seen = pad(last[:, None], (cache.get_seq_length(), 0), value=tokenizer.pad_token_id)
    start = seen.shape[1]
    mask = [torch.ones(length, dtype=torch.int64) for length in spliced.segment_lengths]

    def have_ended(ids: Tensor, _: Any, **__: Any) -> Tensor:
        assert ends is not None  # or it is not called
        return torch.tensor([ends(row) for row in ids[:, start:].tolist()], device=ids.device)

    generate: Any = model.language.generate  # typed by its mixin alone
    ids = generate(
        inputs=seen,
        past_key_values=cache,
        attention_mask=pad_sequence(mask, batch_first=True, padding_side="left").to(seen.device),
        stopping_criteria=StoppingCriteriaList([have_ended] if ends else []),
        # In some families the tokenizer's end of text is another token.
        eos_token_id=token_id(tokenizer, TURN_END),
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    return ids[:, start:]


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
