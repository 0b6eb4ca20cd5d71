"""Small random checkpoints in released layouts, made from lists of names and not through our mapping."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Tokenizer

from tests.support.tiny import batch_of
from vico_pl.model.language import run_packed
from vico_pl.types import EncodedSample

WIDTH, LANGUAGE_WIDTH, LAYERS, HEADS, VOCAB = 32, 48, 2, 4, 320
TILE, PATCH = 56, 14  # 16 patches per tile: 4 vision tokens at ratio 4, 1 at ratio 16
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>"]
SPECIAL += ["<IMG_CONTEXT>", "<box>", "</box>"]

VISION_CONFIG = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": TILE,
    "patch_size": PATCH,
    "norm_type": "layer_norm",
    "qkv_bias": True,
    "qk_normalization": False,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "initializer_factor": 0.1,
    "use_flash_attn": True,
    "drop_path_rate": 0.1,
}
# As transformers 4 stored it.
LANGUAGE_CONFIG = {
    "_name_or_path": "somewhere/else",
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": LANGUAGE_WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "transformers_version": "4.52.4",
}
# What a mixture of experts has otherwise.
MIXTURE = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4}
MIXTURE |= {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


def official_config(*, flash=False, **changes):
    config = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": TILE,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 4,
        "use_thumbnail": True,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": VISION_CONFIG,
        "llm_config": LANGUAGE_CONFIG,
    }
    if flash:
        config |= {"flash_mode": True, "flash_absolute_threshold": 0.45, "flash_relative_threshold": 0.25}
    return {**config, **changes}


def official_tensors(config, *, flash=False, seed=0, dtype=torch.float32):
    """Random tensors under the official names of FACTS: vision_model, language_model, mlp1, and Flash's."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(official_shapes(config, flash=flash))
    return {
        name: (torch.randn(shape, generator=generator) * 0.15 + name.endswith(NORMS)).to(dtype)
        for name, shape in shapes.items()
    }


NORMS = ("norm1.weight", "norm2.weight", "norm.weight", "layernorm.weight", "mlp1.0.weight", "mlp2.0.weight")


def official_shapes(config, *, flash):
    vision, language = config["vision_config"], config["llm_config"]
    yield from vision_shapes(vision)
    yield from language_shapes(language)
    yield from perceptron("mlp1", vision["hidden_size"] * 4, [language["hidden_size"]] * 2, [1, 3])
    if flash:
        c, d = vision["hidden_size"], language["hidden_size"]
        yield from perceptron("mlp2", c * 16, [2 * d, 2 * d, d], [1, 4, 7])
        yield from router_shapes(c)


def linear(name, rows, columns, *, bias=True):
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def norm(name, width, *, bias=True):
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


def perceptron(prefix, folded, widths, places):
    yield from norm(f"{prefix}.0", folded)
    for place, before, after in zip(places, [folded, *widths], widths, strict=False):
        yield from linear(f"{prefix}.{place}", after, before)


def vision_shapes(vision):
    c, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    yield "vision_model.embeddings.class_embedding", (1, 1, c)
    yield "vision_model.embeddings.position_embedding", (1, (vision["image_size"] // patch) ** 2 + 1, c)
    yield "vision_model.embeddings.patch_embedding.weight", (c, 3, patch, patch)
    yield "vision_model.embeddings.patch_embedding.bias", (c,)
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"vision_model.encoder.layers.{layer}"
        yield f"{prefix}.ls1", (c,)
        yield f"{prefix}.ls2", (c,)
        for name in ("norm1", "norm2"):
            yield from norm(f"{prefix}.{name}", c, bias=vision["norm_type"] == "layer_norm")
        yield from linear(f"{prefix}.attn.qkv", 3 * c, c, bias=vision["qkv_bias"])
        for name in ("q_norm", "k_norm") if vision["qk_normalization"] else ():
            yield from norm(f"{prefix}.attn.{name}", c, bias=False)
        yield from linear(f"{prefix}.attn.proj", c, c)
        yield from linear(f"{prefix}.mlp.fc1", inner, c)
        yield from linear(f"{prefix}.mlp.fc2", c, inner)


def language_shapes(language):
    d, heads, kv = language["hidden_size"], language["num_attention_heads"], language["num_key_value_heads"]
    kind = language["architectures"][0]
    head = language.get("head_dim") or d // heads
    yield "language_model.model.embed_tokens.weight", (language["vocab_size"], d)
    for layer in range(language["num_hidden_layers"]):
        prefix = f"language_model.model.layers.{layer}"
        yield from norm(f"{prefix}.input_layernorm", d, bias=False)
        yield from norm(f"{prefix}.post_attention_layernorm", d, bias=False)
        for name, rows in (("q_proj", heads * head), ("k_proj", kv * head), ("v_proj", kv * head)):
            yield from linear(f"{prefix}.self_attn.{name}", rows, d, bias=kind == "Qwen2ForCausalLM")
        yield f"{prefix}.self_attn.o_proj.weight", (d, heads * head)
        for name in ("q_norm", "k_norm") if kind.startswith("Qwen3") else ():
            yield from norm(f"{prefix}.self_attn.{name}", head, bias=False)
        yield from feed_forward(prefix, language)
    yield "language_model.model.norm.weight", (d,)
    if not language["tie_word_embeddings"]:
        yield "language_model.lm_head.weight", (language["vocab_size"], d)


def feed_forward(prefix, language):
    d = language["hidden_size"]
    if language["architectures"] != ["Qwen3MoeForCausalLM"]:
        blocks = [(f"{prefix}.mlp", language["intermediate_size"])]
    else:
        yield f"{prefix}.mlp.gate.weight", (language["num_experts"], d)
        inner = language["moe_intermediate_size"]
        blocks = [(f"{prefix}.mlp.experts.{e}", inner) for e in range(language["num_experts"])]
    for block, inner in blocks:
        yield f"{block}.gate_proj.weight", (inner, d)
        yield f"{block}.up_proj.weight", (inner, d)
        yield f"{block}.down_proj.weight", (d, inner)


def router_shapes(c):
    yield "pooling_before_gating.query_token", (1, c)
    for i in range(1, 5):
        attention = f"pooling_before_gating.attn{i}"
        yield f"{attention}.in_proj_weight", (3 * c, c)
        yield f"{attention}.in_proj_bias", (3 * c,)
        yield from linear(f"{attention}.out_proj", c, c)
        yield from norm(f"pooling_before_gating.norm{i}", c)
        yield from linear(f"gating.block{i}.0", 4 * c, c)
        yield from linear(f"gating.block{i}.3", c, 4 * c)
        yield from norm(f"gating.block{i}.5", c)
    yield from norm("gating.gate.0", c)
    yield from linear("gating.gate.1", 2, c)


def qwen_tokenizer():
    """A byte-pair tokenizer of Qwen's kind, from merges learned on a few words."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    learned.train_from_iterator(["What is the value? user assistant system How many shapes"] * 4, trainer)
    model = json.loads(learned.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"], merges=merges, eos_token="<|im_end|>", pad_token=SPECIAL[0]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def write_official(folder, *, flash=False, dtype=torch.float32, seed=0, config=None, tensors=None):
    """Write a checkpoint as OpenGVLab releases them; returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config or official_config(flash=flash)
    tensors = official_tensors(config, flash=flash, seed=seed, dtype=dtype) if tensors is None else tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    qwen_tokenizer().save_pretrained(folder)
    (folder / "modeling_internvl_chat.py").write_text("raise SystemExit('remote code was run')\n")
    return tensors


def write_native(folder, *, seed=0) -> InternVLForConditionalGeneration:
    """Write a checkpoint with transformers itself; returns its model."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = qwen_tokenizer()
    language = {
        k: v for k, v in LANGUAGE_CONFIG.items() if k not in ("_name_or_path", "transformers_version")
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": [TILE, TILE],
        "patch_size": [PATCH, PATCH],
        "attention_bias": True,
    }
    config = InternVLConfig(
        text_config={**language, "torch_dtype": "float32"},
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def folder_tensors(folder: Path):
    """All tensors of a folder, whatever its shards."""
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def image_sample(seed, *, images):
    """Text around images of so many tiles each."""
    generator = torch.Generator().manual_seed(seed)
    ids, placeholder = [3], qwen_tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>")
    for num_tiles in images:
        ids += [*[placeholder] * num_tiles, *torch.randint(0, 260, (3,), generator=generator).tolist()]
    total = sum(images)
    return EncodedSample(
        id=str(seed),
        tiles=torch.randint(0, 256, (total, 3, TILE, TILE), generator=generator, dtype=torch.uint8),
        tiles_per_image=list(images),
        input_ids=torch.tensor([*ids, 4]),
        response_mask=torch.arange(len(ids) + 1) == len(ids),
    )


def logits_of(model, *samples):
    """The logits of each sample at full tokens."""
    batch = batch_of(*samples)
    spliced = model.splice_batch(batch, model.encode_tiles(batch.tiles), model.full_ratios(batch))
    hidden = run_packed(model.language, spliced.embeddings, spliced.segment_lengths)
    return (hidden @ model.head.T).split(spliced.segment_lengths)
