"""A model family: folders of an imaginary project `plain`, whose `config.json` and tensors have other names.

Its tensors:  encoder.*   the vision tower        projector.*   the connector of ratio 4
              llm.*       the language model
"""

from pathlib import Path

from vico_pl.model.families.base import Family, FolderContents, Json, Shape, TensorPart
from vico_pl.model.families.official import placeholder_id
from vico_pl.model.vlm import ModelSpec

RENAMES = {  # our names -> stored names
    "vision.tower.": "encoder.",
    "connectors.by_ratio.4.": "projector.",
    "language.": "llm.",
}


def _parts_of(name: str, shape: Shape) -> list[TensorPart]:
    """Say where a tensor of ours is stored: here each is one stored tensor with another name."""
    for own, stored in RENAMES.items():
        if name.startswith(own):
            return [TensorPart(name, stored + name.removeprefix(own))]
    raise ValueError(f"layout plain has no place for {name}")


def _read(folder: Path, config: Json, names: set[str] | None) -> FolderContents:
    """Describe the model; `names` are those of the tensors, None: only the configuration is there."""
    spec = ModelSpec(
        vision=config["encoder"],
        language=config["llm"],
        ratios=[4],
        placeholder_id=0 if names is None else placeholder_id(folder),
    )
    tiling = {"tile_size": config["encoder"]["image_size"], "max_tiles": config["max_tiles"]}
    return FolderContents(spec=spec, processing={"tiling": tiling, "chat": {}})


def _reduce(contents: FolderContents) -> FolderContents:
    """Keep what the layout can hold: the model at full tokens, without a router."""
    spec = contents.spec
    base = ModelSpec(
        vision=spec.vision, language=spec.language, ratios=[4], placeholder_id=spec.placeholder_id
    )
    return FolderContents(spec=base, processing=contents.processing)


def _write(folder: Path, contents: FolderContents, dtype: str) -> Json:
    """Return config.json; tokenizer files are copied by the export."""
    tiling = (contents.processing or {}).get("tiling", {})
    return {
        "architectures": ["PlainVLM"],
        "encoder": contents.spec.vision,
        "llm": contents.spec.language,
        "max_tiles": tiling.get("max_tiles", 12),
        "dtype": dtype,
    }


PLAIN = Family(
    name="plain", marks=("PlainVLM",), read=_read, parts_of=_parts_of, reduce=_reduce, write=_write
)
