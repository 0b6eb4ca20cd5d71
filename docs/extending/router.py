"""A router without attention: the mean of a tile's patch features, and a small MLP."""

from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from vico_pl.files import read_json, write_json
from vico_pl.model.router import ROUTERS


class MeanRouter(nn.Module):
    """Classifies the mean of a tile's patch features."""

    def __init__(self, width: int, *, num_ratios: int = 2, num_heads: int = 1) -> None:
        """Build a router for patch features of `width` channels; it has no use for attention heads."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, num_ratios)
        )

    def forward(self, features: Float[Tensor, "T P C"]) -> Float[Tensor, "T K"]:
        """Return logits over ratios, coarsest first; patch features are not changed by the gradient."""
        features = features.detach().to(self.layers[1].weight.dtype)  # float32 while it is trained
        return self.layers(features.mean(1))


ROUTERS["mean"] = MeanRouter


def choose_router(model_folder: Path, name: str) -> None:
    """Name the router that stage 2 adds to the model of stage 1."""
    config = read_json(model_folder / "config.json")
    write_json({**config, "router": name}, model_folder / "config.json", indent=2)
