"""The whole multimodal model: tiles and token ids in, response hidden states out.

It is built from a description, from a model folder (see `families`), or assembled from pretrained parts:

    vision:    {open_clip: ViT-SO400M-14-SigLIP-384, pretrained: webli, image_size: 448}
    language:  {path: Qwen/Qwen3-0.6B}

The connectors between them are randomly initialised; stage `pretrain` trains them first.
"""

import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import open_clip
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, PreTrainedModel

from vico_pl.errors import check_settings
from vico_pl.model.adapters import NewTokens
from vico_pl.model.connector import FULL_RATIO, Connectors
from vico_pl.model.dropout import tile_keys
from vico_pl.model.language import build_language_model, run_packed
from vico_pl.model.router import DEFAULT_ROUTER, build_router
from vico_pl.model.vision import VisionEncoder
from vico_pl.types import Batch


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The description a model is built from, without weights; `config.json` of a model folder holds it."""

    vision: dict[str, Any]  # an open_clip vision_cfg, or a transformers config with its model_type
    language: dict[str, Any]  # a transformers config with its model_type
    ratios: list[int]  # patches per vision token, rising from 4
    router_heads: int | None = None  # attention heads of the router; None: the model has no router
    placeholder_id: int  # token id that stands for a tile
    router: str = DEFAULT_ROUTER  # name of its builder in `router.ROUTERS`

    def __post_init__(self) -> None:
        ratios: Any = self.ratios  # read from a file
        are_numbers = isinstance(ratios, list) and all(isinstance(ratio, int) for ratio in ratios)
        check_settings(
            "model",
            self,
            vision=(isinstance(self.vision, dict), "settings of a vision tower"),
            language=(isinstance(self.language, dict), "settings of a language model"),
            ratios=(are_numbers, "a list of whole numbers"),
            router_heads=(type(self.router_heads) in (int, type(None)), "a whole number"),
            placeholder_id=(isinstance(self.placeholder_id, int), "a token id"),
        )


@dataclass(frozen=True, kw_only=True)
class Spliced:
    """Samples after expansion, end to end, ready for the language model."""

    embeddings: Float[Tensor, "S D"]
    segment_lengths: list[int]  # tokens of each sample
    tile_starts: Int64[Tensor, " T"]  # position of each tile's first vision token
    response_positions: Int64[Tensor, " R"]  # of the tokens that predict it: one before each response token


def splice(
    text_embeddings: Float[Tensor, "L D"],
    vision_tokens: Float[Tensor, "TN D"],
    tokens_per_tile: Int64[Tensor, " T"],
    *,
    is_placeholder: Bool[Tensor, " L"],
    response_mask: Bool[Tensor, " L"],
    sample_lengths: Int64[Tensor, " B"],
) -> Spliced:
    """Put the vision tokens of the i-th tile in the place of the i-th placeholder.

    With ids `a # b`, one tile of 4 tokens: `a v v v v b`.
    """
    expansion = torch.ones_like(is_placeholder, dtype=torch.int64)
    expansion[is_placeholder] = tokens_per_tile
    origin = torch.arange(len(expansion), device=expansion.device).repeat_interleave(expansion)  # (S,)
    embeddings = text_embeddings[origin]
    embeddings[is_placeholder[origin]] = vision_tokens.to(embeddings.dtype)
    ends, samples = expansion.cumsum(0), pad(sample_lengths.cumsum(0), (1, 0))  # in L: where samples begin
    return Spliced(
        embeddings=embeddings,
        segment_lengths=pad(ends, (1, 0))[samples].diff().tolist(),
        tile_starts=(ends - expansion)[is_placeholder],
        response_positions=response_mask[origin].nonzero().squeeze(1) - 1,
    )


class VisionLanguageModel(nn.Module):
    """Vision encoder, connectors, language model and router."""

    def __init__(self, spec: ModelSpec) -> None:
        """Build the model with random weights.

        Raises:
            ValueError: no such part can be built, or patches do not divide into vision tokens.
        """
        super().__init__()
        self.spec, self.dropout_seed = spec, 0
        try:
            self._build(spec)
        except ValueError:
            raise
        except Exception as error:  # libraries fail in their own ways at sizes that make no model
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"no such model can be built ({type(error).__name__}: {reason})") from error

    def _build(self, spec: ModelSpec) -> None:
        self.vision = VisionEncoder(spec.vision)
        _check_ratios(spec.ratios, self.vision)
        self.language = build_language_model(spec.language)
        self.connectors = Connectors(
            spec.ratios, vision_width=self.vision.width, language_width=self.language.config.hidden_size
        )
        self.new_tokens: NewTokens | None = None
        self.router: nn.Module | None = None
        if spec.router_heads is not None:
            self.router = build_router(
                spec.router, self.vision.width, num_ratios=len(spec.ratios), num_heads=spec.router_heads
            )

    @property
    def ratios(self) -> list[int]:
        """Compression ratios the model has connectors for, full tokens first."""
        return self.spec.ratios

    @property
    def tokens_per_full_tile(self) -> int:
        """Vision tokens of a tile at full tokens."""
        return self.vision.num_patches // FULL_RATIO

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest sequence the language model knows positions for; None: any number."""
        return getattr(self.language.config, "max_position_embeddings", None)

    @property
    def head(self) -> Float[Tensor, "V D"]:
        """Weight of the output layer: hidden states times its transpose are logits."""
        weight = self.language.get_output_embeddings().weight
        return weight if self.new_tokens is None else self.new_tokens.head(weight)

    def encode_tiles(self, tiles: UInt8[Tensor, "T 3 H W"]) -> Float[Tensor, "T P C"]:
        """Return the patch features of tiles."""
        return self.vision(tiles)

    def splice_batch(
        self, batch: Batch, features: Float[Tensor, "T P C"], ratios: Int64[Tensor, " T"]
    ) -> Spliced:
        """Turn patch features into vision tokens at the given ratios and put them among the text."""
        keys = tile_keys(batch, seed=self.dropout_seed) if self.training else None
        vision_tokens, counts = self.connectors(features, ratios, keys=keys)
        words: Any = self.language.get_input_embeddings()
        embed = words if self.new_tokens is None else partial(self.new_tokens.embed, words)
        return splice(
            embed(batch.input_ids),
            vision_tokens,
            counts,
            is_placeholder=batch.input_ids == self.spec.placeholder_id,
            response_mask=batch.response_mask,
            sample_lengths=batch.sample_lengths,
        )

    def response_states(
        self, batch: Batch, features: Float[Tensor, "T P C"], ratios: Int64[Tensor, " T"]
    ) -> Float[Tensor, "R D"]:
        """Return the hidden states that predict the response tokens."""
        spliced = self.splice_batch(batch, features, ratios)
        hidden = run_packed(self.language, spliced.embeddings, spliced.segment_lengths)
        return hidden[spliced.response_positions]

    def train_tokens(self, ids: list[int]) -> None:
        """Train the embeddings and output rows of these tokens, though the language model is frozen."""
        self.new_tokens = NewTokens(self.language, ids) if ids else None

    def set_dropout(self, probability: float, *, seed: int = 0) -> None:
        """Set the dropout of connectors and router, active only in training mode, and its seed."""
        self.dropout_seed = seed
        parts = [self.connectors, *([] if self.router is None else [self.router])]
        for module in (module for part in parts for module in part.modules()):
            if isinstance(module, nn.Dropout):
                module.p = probability

    def full_ratios(self, batch: Batch) -> Int64[Tensor, " T"]:
        """Return full tokens for every tile."""
        return torch.full_like(batch.tile_to_sample, FULL_RATIO)


def _check_ratios(ratios: list[int], vision: VisionEncoder) -> None:
    is_square = all(math.isqrt(ratio) ** 2 == ratio for ratio in ratios)
    if not is_square or ratios != sorted(set(ratios)) or ratios[:1] != [FULL_RATIO]:
        expected = f"rising square numbers that begin with {FULL_RATIO}"
        raise ValueError(f"ratios {ratios}: expected {expected}")
    side = math.isqrt(vision.num_patches)
    for ratio, factor in ((ratio, math.isqrt(ratio)) for ratio in ratios):
        if side % factor:
            raise ValueError(
                f"tiles of {vision.tile_size} px are {side} x {side} patches, which do not fold by {factor} "
                f"for ratio {ratio}; choose another image_size or other ratios"
            )


def assemble_model(
    vision: dict[str, Any],
    language: dict[str, Any],
    *,
    ratios: list[int],
    vocab_size: int,
    placeholder_id: int,
) -> VisionLanguageModel:
    """Build a model from descriptions of its parts; a named part is loaded with its weights.

    The embeddings of a pretrained language model grow to the size of the tokenizer.

    Raises:
        ValueError: a part cannot be loaded.
    """
    tower, language_model = None, None
    if "open_clip" in vision:
        _check_settings("vision", vision, "open_clip", "pretrained", "image_size", "image_mean", "image_std")
        vision, tower = _pretrained_tower(vision)
    if "path" in language:
        _check_settings("language", language, "path", "revision")
        language_model = _pretrained_language_model(language, vocab_size)
        language = language_model.config.to_dict()
    else:
        language = {**language, "vocab_size": vocab_size}
    spec = ModelSpec(vision=vision, language=language, ratios=ratios, placeholder_id=placeholder_id)
    model = VisionLanguageModel(spec)
    if tower is not None:
        state = tower.state_dict()  # with weights of the pooled embedding, which are not needed
        own = model.vision.tower
        own.load_state_dict({name: state[name] for name in own.state_dict()})
    if language_model is not None:
        model.language = language_model
    return model


def _check_settings(part: str, given: dict[str, Any], beside: str, *known: str) -> None:
    for name in given.keys() - {beside, *known}:
        raise ValueError(f"model.{part} has no setting '{name}' beside {beside}; expected {', '.join(known)}")


def open_clip_config(name: str) -> dict[str, Any]:
    """Return how open_clip describes a model of its own.

    Raises:
        ValueError: it knows none of this name.
    """
    known: dict[str, Any] | None = open_clip.get_model_config(name)
    if known is None:
        raise ValueError(f"model.vision.open_clip is '{name}', which open_clip does not know")
    return known


def _pretrained_tower(settings: dict[str, Any]) -> tuple[dict[str, Any], nn.Module]:
    """Return the description of an open_clip tower and the tower with its weights."""
    name, pretrained, image_size = (settings.get(key) for key in ("open_clip", "pretrained", "image_size"))
    known = open_clip_config(str(name))
    try:
        tower = open_clip.create_model(
            name,
            pretrained=pretrained,  # a tag or a file
            force_image_size=image_size,  # fits position embeddings to other tiles
            require_pretrained=pretrained is not None,
        ).visual
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.vision: open_clip has no weights '{pretrained}' for {name} ({reason})"
        ) from error
    norm = _pixel_norm(str(name), pretrained, tower)
    config = known["vision_cfg"] | norm | {"quick_gelu": known.get("quick_gelu", False)}
    given = {key: settings[key] for key in ("image_size", *norm) if settings.get(key)}
    return config | given, tower


def _pixel_norm(name: str, pretrained: str | None, tower: Any) -> dict[str, list[float]]:
    """Return mean and std of the pixels: those of a tag, or of a file those that the tower's tags share."""
    own, tags = tower.preprocess_cfg, open_clip.list_pretrained_tags_by_model(name)
    if open_clip.is_pretrained_cfg(name, pretrained or ""):
        tags = []
    known = [{**own, **open_clip.get_pretrained_cfg(name, tag)} for tag in tags] or [own]
    norms = {(tuple(cfg["mean"]), tuple(cfg["std"])) for cfg in known}
    if len(norms) > 1:
        unknown = (
            f"model.vision: the tags of {name} differ in image_mean and image_std; those of CLIP are taken"
        )
        warnings.warn(f"{unknown} unless you set them beside open_clip", stacklevel=2)
        norms = {(tuple(own["mean"]), tuple(own["std"]))}
    ((mean, std),) = norms
    return {"image_mean": list(mean), "image_std": list(std)}


def _pretrained_language_model(settings: dict[str, Any], vocab_size: int) -> PreTrainedModel:
    """Load a causal language model of transformers in float32; code of the folder never runs."""
    path, revision = settings["path"], settings.get("revision")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model.language.path {path}: no language model to load ({reason})") from error
    if vocab_size > model.config.vocab_size:
        model.resize_token_embeddings(vocab_size)
    return model
