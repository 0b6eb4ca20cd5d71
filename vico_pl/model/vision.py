"""Tiles -> patch features: a vision tower behind pixel normalisation.

The configuration selects the kind of tower:

    {"model_type": "internvl_vision", ...}    InternViT as transformers has it (300M and 6B)
    anything else                             an open_clip `vision_cfg`: its own ViT, or a timm model by name

Both give the patch tokens of their last layer; class tokens are dropped.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import open_clip
import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, UInt8
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The towers' text halves are never used; this is the smallest one that open_clip builds.
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


class Tower(NamedTuple):
    """A vision tower and its properties."""

    module: nn.Module
    patch_features: Callable[[Any, Tensor], Tensor]  # module, normalised pixels (T, 3, H, W) -> (T, P, C)
    width: int
    tile_size: int  # px
    patch_size: int  # px
    mean: Sequence[float]  # of the pixels that such towers are trained on, 0 to 1
    std: Sequence[float]


class VisionEncoder(nn.Module):
    """Turns tiles into patch features, whatever the tower."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        """Build the tower with random weights.

        `config` may hold `image_mean` and `image_std` next to the tower's own settings.

        Raises:
            ValueError: no such tower can be built, or it has no square grid of patches.
        """
        super().__init__()
        tower = _build_tower(config)
        side, rest = divmod(tower.tile_size, tower.patch_size)
        if rest:
            raise ValueError(
                f"the vision tower sees tiles of {tower.tile_size} px, which patches of {tower.patch_size} px"
                " do not divide; set image_size to a multiple"
            )
        self.tower, self._patch_features = tower.module, partial(tower.patch_features, tower.module)
        self.width, self.tile_size, self.num_patches = tower.width, tower.tile_size, side * side
        for name, default in (("mean", tower.mean), ("std", tower.std)):
            values = torch.tensor(config.get(f"image_{name}", default)).view(3, 1, 1) * 255
            self.register_buffer(name, values, persistent=False)

    def forward(self, tiles: UInt8[Tensor, "T 3 H W"]) -> Float[Tensor, "T P C"]:
        """Encode tiles.

        Without tiles a blank one is encoded and dropped, so that every parameter takes part on every rank.
        A frozen tower always runs in eval mode, so that all models that share it get the same features.
        """
        some_tiles = tiles if len(tiles) else tiles.new_zeros(1, *tiles.shape[1:])
        pixels = ((some_tiles - self.mean) / self.std).to(next(self.tower.parameters()).dtype)
        is_trained = any(p.requires_grad for p in self.tower.parameters())
        with nullcontext() if is_trained else switched(self.tower.modules(), "training", to=False):
            return self._patch_features(pixels)[: len(tiles)]


@contextmanager
def switched(modules: Iterable[nn.Module], name: str, *, to: bool) -> Iterator[None]:
    """Switch an attribute of modules, and back at the end."""
    others = [module for module in modules if getattr(module, name) is not to]
    for module in others:
        setattr(module, name, to)
    try:
        yield
    finally:
        for module in others:
            setattr(module, name, not to)


def _build_tower(config: dict[str, Any]) -> Tower:
    kind = config.get("model_type")
    if kind not in TOWERS:
        known = ", ".join(filter(None, TOWERS))
        raise ValueError(f"vision tower: model_type is '{kind}'; expected {known} or an open_clip vision_cfg")
    # `auto_map` names code in the model folder, which must never run.
    not_its_own = ("model_type", "image_mean", "image_std", "auto_map")
    try:
        return TOWERS[kind]({key: value for key, value in config.items() if key not in not_its_own})
    # What open_clip, timm and transformers raise at settings they do not know.
    except (KeyError, TypeError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"vision tower: {type(error).__name__}: {reason}") from error


def _intern_vit(config: dict[str, Any]) -> Tower:
    settings = AutoConfig.for_model("internvl_vision", **config)
    # Tiles all have the same length, so the tower needs none of the language model's packed attention.
    module = AutoModel.from_config(settings, attn_implementation="sdpa", dtype=torch.float32)
    sizes = (settings.hidden_size, settings.image_size[0], settings.patch_size[0])
    return Tower(module, _last_patch_states, *sizes, IMAGENET_MEAN, IMAGENET_STD)


def _last_patch_states(module: Any, pixels: Tensor) -> Tensor:
    return module(pixel_values=pixels).last_hidden_state[:, 1:]


def _open_clip_tower(config: dict[str, Any]) -> Tower:
    config = {**config, "timm_model_pretrained": False}  # weights come from the model folder
    if ":" in str(config.get("timm_model_name")):  # timm would fetch the description of a tower
        found = f"timm_model_name is '{config['timm_model_name']}'"
        raise ValueError(f"vision tower: {found}; expected the name of a model of timm, without a source")
    quick_gelu, stage = config.pop("quick_gelu", False), config.pop("timm_stage", -1)
    clip = open_clip.CLIP(embed_dim=8, vision_cfg=config, text_cfg=_NO_TEXT, quick_gelu=quick_gelu)
    module: Any = clip.visual
    if "timm_model_name" in config:
        width, patch_size = _prepare_timm(module, config["image_size"], stage=stage)
    elif isinstance(config.get("layers"), int) and not config.get("attentional_pool"):
        # The pooled image embedding is not used, so what makes it would never be trained.
        module.proj = None
        width, patch_size = config["width"], config["patch_size"]
    else:
        advice = "take a plain ViT or a timm tower"
        raise ValueError(f"the vision tower pools its patches (ResNet or CoCa); {advice}")
    sizes, pixels = (width, config["image_size"], patch_size), (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    return Tower(module, _last_intermediates, *sizes, *pixels)


def _prepare_timm(module: Any, image_size: int, *, stage: int) -> tuple[int, int]:
    """Drop what pools the grid and what follows the stage, fit the grid; returns width and patch size."""
    trunk = module.trunk
    if not -1 <= stage < len(trunk.feature_info):
        last = len(trunk.feature_info) - 1
        raise ValueError(f"vision tower: timm_stage is {stage}; expected 0 to {last}, or -1 for all stages")
    if stage != -1:
        trunk.prune_intermediate_layers([stage])
    trunk.reset_classifier(0, global_pool="")
    module.head = nn.Identity()
    for unused in ("fc_norm", "final_conv", "head"):  # ConvNeXt's head has a norm
        if hasattr(trunk, unused):
            setattr(trunk, unused, nn.Identity())
    if hasattr(trunk, "set_input_size"):
        trunk.set_input_size(image_size)
    last = trunk.feature_info[stage]
    return last["num_chs"], last["reduction"]


def _last_intermediates(module: Any, pixels: Tensor) -> Tensor:
    """Return the normalised output of the last layer, of either library a grid (T, C, rows, columns)."""
    output = module.forward_intermediates(
        pixels, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NCHW"
    )
    return output["image_intermediates"][-1].flatten(2).transpose(1, 2)


# Builders by `model_type`; a configuration without one is an open_clip `vision_cfg`.
TOWERS: dict[str | None, Callable[[dict[str, Any]], Tower]] = {
    None: _open_clip_tower,
    "internvl_vision": _intern_vit,
}
