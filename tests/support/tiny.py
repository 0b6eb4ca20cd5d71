"""Tiny models, samples, batches, records and images for tests."""

import io
import json

import numpy as np
import open_clip
import torch
from PIL import Image

from vico_pl.data.collate import collate
from vico_pl.model.vlm import ModelSpec, VisionLanguageModel
from vico_pl.types import Batch, EncodedSample, Record

VOCAB_SIZE = 61
PLACEHOLDER_ID = 5
TILE = 32  # px; patches of 8 px make 16 per tile: 4 vision tokens at ratio 4, 1 at ratio 16
WIDTH = 32


def tiny_spec(**changes):
    settings = {
        "vision": {"image_size": TILE, "patch_size": 8, "width": WIDTH, "layers": 1, "head_width": 16},
        "language": {
            "model_type": "qwen3",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
        },
        "ratios": [4, 16],
        "router_heads": 4,
        "placeholder_id": PLACEHOLDER_ID,
    }
    return ModelSpec(**{**settings, **changes})


def tiny_model(seed=0, **changes):
    """A model in eval mode whose weights are large enough for inputs to make a difference."""
    torch.manual_seed(seed)
    model = VisionLanguageModel(tiny_spec(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2)
    return model


def write_tower(folder, name):
    """Make open_clip know a small tower by a name; returns it and the file of its weights."""
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 4, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
    config = folder / f"{name}.json"
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    torch.save(model.state_dict(), folder / "tower.pt")
    return model.eval(), folder / "tower.pt"


def encoded_sample(seed, *, images=(1,), answers=(3,)):
    """A sample with `images[i]` tiles in image i and a turn with `answers[j]` response tokens for each j."""
    rng = np.random.default_rng(seed)
    ids, mask = [1], [False]
    for num_tiles in images:
        ids += [2, *[PLACEHOLDER_ID] * num_tiles, 3]
        mask += [False] * (num_tiles + 2)
    for num_tokens in answers:
        question = int(rng.integers(1, 6))
        ids += rng.integers(6, VOCAB_SIZE, question + num_tokens).tolist()
        mask += [False] * question + [True] * num_tokens
    return EncodedSample(
        id=f"sample-{seed}",
        tiles=torch.from_numpy(rng.integers(0, 256, (sum(images), 3, TILE, TILE), dtype=np.uint8)),
        tiles_per_image=list(images),
        input_ids=torch.tensor(ids),
        response_mask=torch.tensor(mask),
    )


def intern_vit(**changes):
    """The configuration of a small InternViT."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"model_type": "internvl_vision", **sizes, "image_size": TILE, "patch_size": 8, **changes}


def experts(**changes):
    """The configuration of a small mixture of experts."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return {**tiny_spec().language, "model_type": "qwen3_moe", **sizes, **changes}


def mixed_samples():
    """Samples with one tile, several images, text only and several turns."""
    return [
        encoded_sample(1, images=(3,), answers=(4,)),
        encoded_sample(2, images=(), answers=(2, 3)),
        encoded_sample(3, images=(1, 2), answers=(5, 1)),
        encoded_sample(4, images=(1,), answers=(2,)),
    ]


def batch_of(*samples) -> Batch:
    return collate(samples)


def encoded_image(image_format="JPEG", *, size=(40, 30), seed=0, **options):
    """The bytes of an image file of `size` (width, height) with smooth content."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, image_format, **options)
    return buffer.getvalue()


def record(*, key="000000", text="<image>\nWhat is it?", answer="a cat", files=None, **fields):
    """A record with one image and one turn; `files` and `fields` add or replace parts."""
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    annotation = {"conversations": turns, **fields}
    content = {"jpg": encoded_image(), "json": json.dumps(annotation).encode(), **(files or {})}
    return Record(
        shard="train-000000.tar",
        key=key,
        files={name: data for name, data in content.items() if data is not None},
    )
