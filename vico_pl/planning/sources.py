"""The shape of a recipe's model and the mean size of its samples, without downloads or weights."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import open_clip
import torch
from huggingface_hub import try_to_load_from_cache

from vico_pl.data.module import DataConfig
from vico_pl.data.shards.index import INDEX_NAME, parse_entries, read_sizes
from vico_pl.data.shards.locations import parse_source
from vico_pl.data.shards.sizes import SampleSize
from vico_pl.data.tiling import estimated_tiles
from vico_pl.files import read_json
from vico_pl.model.families.base import CONFIG_NAME
from vico_pl.model.families.folder import read_shape
from vico_pl.model.families.hub import is_hub_id, split_revision
from vico_pl.model.vlm import ModelSpec
from vico_pl.stages.settings import ModelConfig
from vico_pl.tokens import SPECIAL_TOKENS

TEXT_TOKENS, TILES = 200.0, 5  # of a sample whose shards are not here; half of the text is response
MAX_MEASURED = 20_000  # samples of a source whose sizes are averaged
INTERN_VIT_300M = {
    "model_type": "internvl_vision",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "attention_bias": True,
    "image_size": 448,
    "patch_size": 14,
}
INTERN_VIT_6B = {
    **INTERN_VIT_300M,
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "attention_bias": False,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
}


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    }


_EXPERTS = {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
# InternVL3.5 as released: vision tower and language model.
RELEASED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1b": (INTERN_VIT_300M, _qwen3(1024, 3072, 28, 16)),
    "2b": (INTERN_VIT_300M, _qwen3(2048, 6144, 28, 16)),
    "4b": (INTERN_VIT_300M, _qwen3(2560, 9728, 36, 32)),
    "8b": (INTERN_VIT_300M, _qwen3(4096, 12288, 36, 32)),
    "14b": (INTERN_VIT_300M, _qwen3(5120, 17408, 40, 40)),
    "38b": (INTERN_VIT_6B, _qwen3(5120, 25600, 64, 64)),
    "30b-a3b": (INTERN_VIT_300M, {**_qwen3(2048, 6144, 48, 32), **_EXPERTS}),
}
# Language models that recipes start from, as released: their embeddings are tied.
LANGUAGE = {"Qwen/Qwen3-0.6B": {**RELEASED["1b"][1], "tie_word_embeddings": True}}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The model that a run starts from, without its weights."""

    name: str  # where the shape was found
    spec: ModelSpec
    dtype: torch.dtype  # of the stored weights


@dataclass(frozen=True, kw_only=True)
class SampleShape:
    """A sample of mean size."""

    tiles: float
    text_tokens: float
    response_tokens: float
    num_samples: int | None  # of all sources; None: the shards are not here
    origin: str  # where the figures come from


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What goes through the model at a time: identical samples."""

    num_samples: int
    tiles: int  # of a sample
    text_tokens: int  # of a sample, including the response
    response_tokens: int  # of a sample


def find_model(config: ModelConfig, shape: str | None = None) -> ModelShape:
    """Find the shape of the model that a recipe starts from, or that of a released size.

    Raises:
        ValueError: it cannot be found without fetching it.
    """
    if shape is not None:
        return _released(shape, f"InternVL3.5 {shape}")
    if config.path is None:
        return _from_parts(config)
    for path in (config.path, config.reference):
        found = None if path is None else _named(path)
        if found is not None:
            return found
    raise ValueError(
        f"{config.path}: its shape is not known here; fetch its {CONFIG_NAME}, set model.path to a folder, "
        f"or pass --shape {'|'.join(RELEASED)}"
    )


def find_config(path: str) -> Path | None:
    """Return the config.json of a model folder or of a cached name on the Hub; None: neither is here."""
    file = Path(path) / CONFIG_NAME
    if file.is_file():
        return file
    if not is_hub_id(path):
        return None
    name, revision = split_revision(path)
    cached = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def _named(path: str) -> ModelShape | None:
    file = find_config(path)
    if file is not None:
        spec, dtype = read_shape(file)
        return ModelShape(name=f"{path} (cached)" if is_hub_id(path) else path, spec=spec, dtype=dtype)
    size = split_revision(path)[0].removeprefix("OpenGVLab/InternVL3_5-").lower()
    return _released(size, f"{path} (as released)") if is_hub_id(path) and size in RELEASED else None


def _released(shape: str, name: str) -> ModelShape:
    if shape not in RELEASED:
        raise ValueError(f"--shape is '{shape}'; expected one of {', '.join(RELEASED)}")
    vision, language = RELEASED[shape]
    spec = ModelSpec(vision=vision, language=language, ratios=[4], placeholder_id=0)
    return ModelShape(name=name, spec=spec, dtype=torch.bfloat16)


def _from_parts(config: ModelConfig) -> ModelShape:
    """Describe an assembled model, whose weights are float32."""
    vision, language = dict(config.vision), dict(config.language)
    if "open_clip" in vision:
        known = open_clip.get_model_config(vision["open_clip"])
        if known is None:
            raise ValueError(
                f"model.vision.open_clip is '{vision['open_clip']}', which open_clip does not know"
            )
        shape = known["vision_cfg"]
        vision = {**shape, "image_size": vision.get("image_size") or shape["image_size"]}
    if "path" in language:
        language = _language_shape(language["path"])
    else:
        language["vocab_size"] = max(config.vocab_size, len(SPECIAL_TOKENS))
    spec = ModelSpec(vision=vision, language=language, ratios=config.ratios, placeholder_id=0)
    return ModelShape(name="the parts that the recipe names", spec=spec, dtype=torch.float32)


def _language_shape(path: str) -> dict[str, Any]:
    file = find_config(path)
    if file is not None:
        return read_json(file)
    if path not in LANGUAGE:
        raise ValueError(
            f"model.language.path {path}: its shape is not known here; fetch its {CONFIG_NAME} first"
        )
    return LANGUAGE[path]


def read_samples(config: DataConfig) -> SampleShape:
    """Read the sizes stored next to a recipe's shards; without them, assume typical figures."""
    found = [_read_source(source.path) for source in config.sources]
    sizes = [SampleSize(*row) for _, rows in found for row in rows.tolist()]
    counts = [count for count, _ in found]
    num_samples = sum(counts) if counts and all(counts) else None
    if not sizes:
        return SampleShape(
            tiles=float(min(TILES, config.tiling.max_tiles)),
            text_tokens=TEXT_TOKENS,
            response_tokens=TEXT_TOKENS / 2,
            num_samples=num_samples,
            origin="assumed: the shards have no sizes" if num_samples else "assumed: no index of shards here",
        )
    text = fmean(size.text_tokens for size in sizes)
    return SampleShape(
        tiles=fmean(sum(estimated_tiles(size, config.tiling)) for size in sizes),
        text_tokens=max(text, 2.0),
        response_tokens=max(text / 2, 1.0),
        num_samples=num_samples,
        origin=f"mean of {len(sizes)} samples; half of the text taken as response",
    )


def largest_micro_batch(
    config: DataConfig, sample: SampleShape, *, tokens_per_tile: int, world: int
) -> MicroBatch:
    """Return the largest micro-batch that the limits and the batch of a rank allow."""
    tiles, text = max(round(sample.tiles), 1), max(round(sample.text_tokens), 2)
    length = tiles * tokens_per_tile + text
    limits, rank_samples = config.micro_batch, max(config.batch_size // world, 1)
    fitting = min(limits.max_tiles // tiles, limits.max_tokens // length, rank_samples)
    response = min(max(round(sample.response_tokens), 1), text - 1)
    return MicroBatch(num_samples=max(fitting, 1), tiles=tiles, text_tokens=text, response_tokens=response)


def _read_source(text: str) -> tuple[int, np.ndarray]:
    """Return the number of samples of local shards and the sizes of the first; 0 and none: unknown."""
    unknown = 0, np.empty((0, 4), dtype=np.int32)
    try:
        source = parse_source(text, allow_pipe=True)
    except ValueError:  # the shards are on another machine
        return unknown
    index = Path(source.base, INDEX_NAME)
    if not source.is_local or not index.is_file():
        return unknown
    known = {entry.name: entry for entry in parse_entries(index.read_bytes(), where=str(index))}
    names = list(known) if source.names is None else source.names
    if not known.keys() >= set(names):  # the run counts the others
        return unknown
    sizes = [unknown[1]]
    for name in names:
        stored = read_sizes(index.parent / name, known[name].num_samples)
        if stored is not None and sum(map(len, sizes)) < MAX_MEASURED:
            sizes.append(np.asarray(stored))
    return sum(known[name].num_samples for name in names), np.concatenate(sizes)[:MAX_MEASURED]
