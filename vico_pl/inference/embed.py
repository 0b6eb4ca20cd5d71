"""`vico embed`: routed vision tokens in files, for engines that take finished ones."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vico_pl.files import atomic_path
from vico_pl.inference.predictor import Predictor

EMBEDDINGS = "image_embeds"  # name of the tensor, (N, D)


@torch.no_grad()
def embed_image(predictor: Predictor, image: Path, output: Path) -> tuple[int, int]:
    """Write the routed vision tokens of an image; return their number, and that of full tokens.

    The file has one tensor (N, D), D being the width of the language model, and the ratio of each tile in its
    metadata, row by row, the thumbnail last.

    Raises:
        ValueError: the file is no image.
    """
    routed = predictor.prepare([image])
    tokens, _ = predictor.model.connectors(routed.features, routed.ratios.to(routed.features.device))
    metadata = {"ratios": json.dumps(routed.ratios.tolist()), "image": image.name}
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as temporary:
        save_file({EMBEDDINGS: tokens.cpu().contiguous()}, temporary, metadata)
    return len(tokens), len(routed.ratios) * predictor.model.tokens_per_full_tile
