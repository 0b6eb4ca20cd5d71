"""The layout of transformers' own InternVL, `hf`: base model only, as transformers has no Flash.

transformers stores it as `language_model.model.*`, `vision_tower.*`, `multi_modal_projector.*` and loads that
and the names of its modules alike (`model.language_model.*`, `lm_head.weight`); so do we.
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from vico_pl.files import read_json, write_json
from vico_pl.model.families import official
from vico_pl.model.families.base import CONFIG_NAME, Family, FolderContents, Json
from vico_pl.model.vision import IMAGENET_MEAN, IMAGENET_STD
from vico_pl.model.vlm import ModelSpec
from vico_pl.tokens import IMAGE_END, IMAGE_START, PLACEHOLDER, TURN_END, TURN_START

ARCHITECTURE = "InternVLForConditionalGeneration"
PROCESSOR_NAME = "preprocessor_config.json"
TOKENIZER_NAME = "tokenizer_config.json"
WHOLE_PROCESSOR_NAME = "processor_config.json"  # transformers 5 keeps the image processor in here
TEMPLATE_NAME = "chat_template.jinja"
# Names by which transformers' processor asks for tokens. It wants one for videos, too, and refuses prompts
# that have it without a video: so it is one that no prompt may have.
TOKEN_NAMES = {
    "start_image_token": IMAGE_START,
    "end_image_token": IMAGE_END,
    "context_image_token": PLACEHOLDER,
    "video_token": IMAGE_START,
}
# Our chat format; an image stands before a line break, as in our data.
CHAT_TEMPLATE = (
    "{%% if %(system)s is not none and messages[0]['role'] != 'system' %%}"
    "%(start)ssystem\n{{ %(system)s }}%(end)s\n{%% endif %%}"
    "{%% for message in messages %%}%(start)s{{ message['role'] }}\n"
    "{%% if message['content'] is string %%}{{ message['content'] }}{%% else %%}"
    "{%% for part in message['content'] %%}"
    "{%% if part['type'] == 'image' %%}%(image)s\n{%% else %%}{{ part['text'] }}{%% endif %%}"
    "{%% endfor %%}{%% endif %%}%(end)s\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}%(start)sassistant\n{%% endif %%}"
)
RENAMES = {  # our names -> stored names
    "vision.tower.": "vision_tower.",
    "connectors.by_ratio.4.mlp.0.": "multi_modal_projector.layer_norm.",
    "connectors.by_ratio.4.mlp.1.": "multi_modal_projector.linear_1.",
    "connectors.by_ratio.4.mlp.3.": "multi_modal_projector.linear_2.",
}
MODULE_NAMES = {  # names of modules -> stored names
    r"^model\.language_model\.": "language_model.model.",
    r"^lm_head\.": "language_model.lm_head.",
    r"^model\.": "",
}


def _stored_name(name: str) -> str:
    for pattern, stored in MODULE_NAMES.items():
        name = re.sub(pattern, stored, name)
    return name


def _read(folder: Path, config: Json, names: set[str] | None) -> FolderContents:
    if problems := "; ".join(_problems(config)):
        raise ValueError(f"{folder / CONFIG_NAME}: {problems}")
    has_head = names is None or official.HEAD_NAME in names
    tied = config["text_config"].get("tie_word_embeddings", config.get("tie_word_embeddings", not has_head))
    vision = {k: v for k, v in config["vision_config"].items() if k not in ("dtype", "torch_dtype")}
    for name, default in (("image_size", 448), ("patch_size", 14)):
        size = vision.get(name, default)
        vision[name] = size if isinstance(size, int) else size[0]
    return FolderContents(
        spec=ModelSpec(
            vision={**vision, "model_type": "internvl_vision"},
            language={**config["text_config"], "tie_word_embeddings": tied},
            ratios=[4],
            placeholder_id=0 if names is None else official.placeholder_id(folder),
        ),
        processing={"tiling": _tiling(folder, vision["image_size"]), "chat": {"system": None}},
    )


def _problems(config: Json) -> Iterator[str]:
    yield from official.unread(config, downsample_ratio=0.5, vision_feature_layer=-1)
    vision, language = config.get("vision_config"), config.get("text_config")
    if not isinstance(vision, dict) or not isinstance(language, dict):
        yield "vision_config or text_config is missing"
        return
    kind, known = language.get("model_type"), official.LANGUAGE_MODELS.values()
    if kind not in known:
        yield f"text_config.model_type is {kind!r}; expected one of {', '.join(known)}"
    if not vision.get("use_mean_pooling", True):
        yield "use_mean_pooling is false: a final norm that InternVL's layouts have no place for"
    for name in ("image_size", "patch_size"):
        size = vision.get(name)
        if isinstance(size, list) and len(set(size)) != 1:
            yield f"vision_config.{name} is {size}; tiles and patches must be square"


def _tiling(folder: Path, tile_size: int) -> Json:
    """Read the image processor from where transformers looks first, if there is one."""
    whole, alone = folder / WHOLE_PROCESSOR_NAME, folder / PROCESSOR_NAME
    processor = read_json(whole).get("image_processor") if whole.exists() else None
    processor = processor or (read_json(alone) if alone.exists() else {})
    return {
        "tile_size": tile_size,
        "min_tiles": processor.get("min_patches", 1),
        "max_tiles": processor.get("max_patches", 12),
        "use_thumbnail": True,
    }


def _write(folder: Path, contents: FolderContents, dtype: str) -> Json:
    spec, tiling = contents.spec, (contents.processing or {}).get("tiling", {})
    side, patch = spec.vision["image_size"], spec.vision["patch_size"]
    write_json(_processor(tiling, side), folder / PROCESSOR_NAME, indent=2)
    tied, num_tokens = spec.language.get("tie_word_embeddings", False), (side // patch // 2) ** 2
    if not (folder / WHOLE_PROCESSOR_NAME).exists():  # none of a template
        _complete_processor(folder, num_tokens, (contents.processing or {}).get("chat", {}).get("system"))
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "image_token_id": spec.placeholder_id,
        "image_seq_length": num_tokens,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": tied,
        "dtype": dtype,
        "torch_dtype": dtype,
        "text_config": official.for_both_generations({**spec.language, "tie_word_embeddings": tied}, dtype),
        "vision_config": {**spec.vision, "image_size": [side] * 2, "patch_size": [patch] * 2},
    }


def _complete_processor(folder: Path, num_tokens: int, system: str | None) -> None:
    """Write what AutoProcessor needs besides the image processor: vision tokens, names of tokens, chat."""
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": num_tokens}
    write_json(processor, folder / WHOLE_PROCESSOR_NAME, indent=2)
    tokenizer = read_json(folder / TOKENIZER_NAME)
    write_json(TOKEN_NAMES | tokenizer, folder / TOKENIZER_NAME, indent=2)
    # Jinja reads a string as Python does, not as JSON: no surrogate pairs.
    literal = "none" if system is None else json.dumps(system, ensure_ascii=False)
    marks = {"start": TURN_START, "end": TURN_END, "image": PLACEHOLDER, "system": literal}
    (folder / TEMPLATE_NAME).write_text(CHAT_TEMPLATE % marks, encoding="utf-8")


def _processor(tiling: Json, side: int) -> Json:
    return {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "processor_class": "InternVLProcessor",
        "crop_to_patches": tiling.get("max_tiles", 12) > 1,
        "min_patches": tiling.get("min_tiles", 1),
        "max_patches": tiling.get("max_tiles", 12),
        "size": {"height": side, "width": side},
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "do_convert_rgb": True,
    }


HF = Family(
    name="hf",
    marks=(ARCHITECTURE, "internvl"),
    stored_name=_stored_name,
    read=_read,
    parts_of=partial(official.parts_of, renames=RENAMES),
    reduce=official.base_model,
    write=_write,
)
