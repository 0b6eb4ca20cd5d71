"""What a plan starts from, without downloads or weights: GPUs, the shape of a model, the size of samples."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache

from vico_pl.data.collate import collate
from vico_pl.data.module import DataConfig
from vico_pl.data.shards.index import INDEX_NAME, open_sidecar, parse_entries, side_index_path
from vico_pl.data.shards.locations import parse_source
from vico_pl.data.shards.tars import SampleSize
from vico_pl.data.tiling import estimated_tiles
from vico_pl.files import read_json
from vico_pl.model.families.base import CONFIG_NAME
from vico_pl.model.families.folder import read_shape
from vico_pl.model.families.hub import is_hub_id, split_revision
from vico_pl.model.vlm import ModelSpec, VisionLanguageModel, open_clip_config
from vico_pl.stages.settings import ModelConfig
from vico_pl.tokens import SPECIAL_TOKENS
from vico_pl.types import Batch, EncodedSample

TEXT_TOKENS, TILES = 200.0, 5  # of a sample whose shards are not here; half of the text is response
USABLE = 0.92  # fraction of a GPU's memory: the CUDA context, NCCL and fragmentation take the rest
MAX_MEASURED = 20_000  # samples of a source whose sizes are averaged


def _shape(width: int, mlp_width: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": mlp_width, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, **others}


_vit = partial(_shape, model_type="internvl_vision", image_size=448, patch_size=14)
_qwen3 = partial(
    _shape,
    model_type="qwen3",
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    tie_word_embeddings=False,
)
_VIT_300M = _vit(1024, 4096, 24, 16, attention_bias=True)
_VIT_6B = _vit(3200, 12800, 45, 25, attention_bias=False, use_qk_norm=True, norm_type="rms_norm")
_EXPERTS = {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
# InternVL3.5 as released: vision tower and language model.
RELEASED = {
    "1b": (_VIT_300M, _qwen3(1024, 3072, 28, 16)),
    "2b": (_VIT_300M, _qwen3(2048, 6144, 28, 16)),
    "4b": (_VIT_300M, _qwen3(2560, 9728, 36, 32)),
    "8b": (_VIT_300M, _qwen3(4096, 12288, 36, 32)),
    "14b": (_VIT_300M, _qwen3(5120, 17408, 40, 40)),
    "38b": (_VIT_6B, _qwen3(5120, 25600, 64, 64)),
    "30b-a3b": (
        _VIT_300M,
        _qwen3(2048, 6144, 48, 32, model_type="qwen3_moe", num_key_value_heads=4, **_EXPERTS),
    ),
}
# Language models that recipes start from, as released.
LANGUAGE = {"Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tie_word_embeddings=True)}


class Gpu(NamedTuple):
    """A GPU by NVIDIA's data sheet, its speed without sparsity."""

    memory_gib: float  # as the driver reports it, a little less than the name says
    half_tflops: float  # bfloat16 and float16 on tensor cores
    full_tflops: float  # float32 without TF32

    def tflops(self, precision: str) -> float:
        """Return the peak at one of Lightning's precisions."""
        return self.full_tflops if precision.startswith("32") else self.half_tflops

    @property
    def usable_gib(self) -> float:
        """What a run may take of the memory."""
        return self.memory_gib * USABLE


GPUS = {
    "L40S": Gpu(44.4, 362.0, 91.6),
    "A100-80": Gpu(79.2, 312.0, 19.5),
    "H100-80": Gpu(79.1, 989.0, 67.0),
    "H200": Gpu(139.8, 989.0, 67.0),
}


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
    for path in filter(None, (config.path, config.reference)):
        size = split_revision(path)[0].removeprefix("OpenGVLab/InternVL3_5-").lower()
        if file := find_config(path):
            spec, dtype = read_shape(file)
            return ModelShape(name=f"{path} (cached)" if is_hub_id(path) else path, spec=spec, dtype=dtype)
        if is_hub_id(path) and size in RELEASED:
            return _released(size, f"{path} (as released)")
    raise ValueError(
        f"{config.path}: its shape is not known here; fetch its {CONFIG_NAME}, set model.path to a folder, "
        f"or pass --shape {'|'.join(RELEASED)}"
    )


def find_config(path: str) -> Path | None:
    """Return the config.json of a model folder or of a cached name on the Hub; None: neither is here."""
    file = Path(path) / CONFIG_NAME
    if file.is_file() or not is_hub_id(path):
        return file if file.is_file() else None
    name, revision = split_revision(path)
    cached = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def _released(size: str, name: str) -> ModelShape:
    if size not in RELEASED:
        raise ValueError(f"--shape is '{size}'; expected one of {', '.join(RELEASED)}")
    vision, language = RELEASED[size]
    spec = ModelSpec(vision=vision, language=language, ratios=[4], placeholder_id=0)
    return ModelShape(name=name, spec=spec, dtype=torch.bfloat16)


def _from_parts(config: ModelConfig) -> ModelShape:
    """Describe an assembled model, whose weights are float32."""
    vision, language = dict(config.vision), dict(config.language)
    if "open_clip" in vision:
        shape = open_clip_config(vision["open_clip"])["vision_cfg"]
        vision = {**shape, "image_size": vision.get("image_size") or shape["image_size"]}
    if "path" not in language:
        language["vocab_size"] = max(config.vocab_size, len(SPECIAL_TOKENS))
    elif file := find_config(language["path"]):
        language = read_json(file)
    elif language["path"] in LANGUAGE:
        language = LANGUAGE[language["path"]]
    else:
        unknown = f"model.language.path {language['path']}: its shape is not known here"
        raise ValueError(f"{unknown}; fetch its {CONFIG_NAME} first")
    spec = ModelSpec(vision=vision, language=language, ratios=config.ratios, placeholder_id=0)
    return ModelShape(name="the parts that the recipe names", spec=spec, dtype=torch.float32)


def read_samples(config: DataConfig) -> SampleShape:
    """Read the sizes stored next to a recipe's shards; without them, assume typical figures."""
    found = [_read_source(source.path) for source in config.sources]
    sizes = [size for _, sizes in found for size in sizes]
    num_samples = sum(count for count, _ in found) if found and all(count for count, _ in found) else None
    if sizes:
        tiles = fmean(sum(estimated_tiles(size, config.tiling)) for size in sizes)
        text = fmean(size.text_tokens for size in sizes)
        origin = f"mean of {len(sizes)} samples; half of the text taken as response"
    else:
        tiles, text = float(min(TILES, config.tiling.max_tiles)), TEXT_TOKENS
        origin = f"assumed: {'the shards have no sizes' if num_samples else 'no index of shards here'}"
    return SampleShape(
        tiles=tiles,
        text_tokens=max(text, 2.0),
        response_tokens=max(text / 2, 1.0),
        num_samples=num_samples,
        origin=origin,
    )


def _read_source(text: str) -> tuple[int, list[SampleSize]]:
    """Return the number of samples of local shards and the sizes of the first; 0 and none: unknown."""
    try:
        source = parse_source(text, allow_pipe=True)
    except ValueError:  # the shards are on another machine
        return 0, []
    index = Path(source.base, INDEX_NAME)
    if not source.is_local or not index.is_file():
        return 0, []
    entries, _ = parse_entries(index.read_bytes(), where=str(index))
    known = {entry.name: entry.num_samples for entry in entries}
    names = source.names or list(known)
    if not known.keys() >= set(names):  # the run counts the others
        return 0, []
    sizes: list[SampleSize] = []
    for name in names:
        sidecar = open_sidecar(side_index_path(index.parent / name)) if len(sizes) < MAX_MEASURED else None
        if sidecar is not None and sidecar.num_samples == known[name]:
            sizes += map(sidecar.size, range(min(known[name], MAX_MEASURED)))
    return sum(known[name] for name in names), sizes[:MAX_MEASURED]


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


def draw_batch(model: VisionLanguageModel, micro_batch: MicroBatch) -> Batch:
    """Return a batch of identical samples with tiles on `meta`."""
    size = model.vision.tile_size
    text = torch.zeros(micro_batch.text_tokens, dtype=torch.int64) + (model.spec.placeholder_id == 0)
    tiles = torch.full((micro_batch.tiles,), model.spec.placeholder_id)
    length = micro_batch.tiles + micro_batch.text_tokens
    sample = EncodedSample(
        id="drawn",
        tiles=torch.empty(micro_batch.tiles, 3, size, size, dtype=torch.uint8, device="meta"),
        tiles_per_image=[micro_batch.tiles],
        input_ids=torch.cat([text[:1], tiles, text[1:]]),
        response_mask=torch.arange(length) >= length - micro_batch.response_tokens,
    )
    return collate([sample] * micro_batch.num_samples)
