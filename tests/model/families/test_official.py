import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.model.families.recomputed import Recomputed
from tests.support.released import (
    LANGUAGE_CONFIG,
    MIXTURE,
    TILE,
    VISION_CONFIG,
    image_sample,
    logits_of,
    official_config,
    official_shapes,
    official_tensors,
    qwen_tokenizer,
    write_official,
)
from tests.support.tiny import batch_of
from vico_pl.model.families.folder import load_model, open_folder, own_tensors
from vico_pl.model.families.official import FLASH, SYSTEM_MESSAGE
from vico_pl.model.flops import build_without_weights
from vico_pl.model.router import RoutingRule

# InternViT-6B: RMS norms without bias, normalised queries and keys, projections without bias.
VISION_6B = {**VISION_CONFIG, "norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}
ARCHITECTURES = {
    "LlamaForCausalLM": {"model_type": "llama", "head_dim": None},
    "Qwen2ForCausalLM": {"model_type": "qwen2", "head_dim": None},
    "Qwen3ForCausalLM": {},
    "Qwen3MoeForCausalLM": MIXTURE,
}
TIED = {**LANGUAGE_CONFIG, "tie_word_embeddings": True}
EMBEDDINGS, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    """A Flash folder and its tensors."""
    folder = tmp_path_factory.mktemp("released") / "flash"
    return folder, write_official(folder, flash=True)


@pytest.fixture(scope="module")
def model(flash):
    return load_model(flash[0])


@pytest.fixture(scope="module")
def recomputed(flash):
    return Recomputed(flash[1], official_config())


def tiles(count, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, TILE, TILE), generator=generator, dtype=torch.uint8)


def assert_close(actual, expected, *, atol=2e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# --- values -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_patch_features_are_those_of_internvit(model, recomputed):
    assert_close(model.encode_tiles(tiles(3)), recomputed.patch_features(tiles(3)))


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [{}, {"qk_normalization": False}, {"norm_type": "layer_norm"}, {"qkv_bias": True}],
    ids=["6B", "without qk_normalization", "with layer_norm", "with qkv_bias"],
)
def test_patch_features_are_those_of_an_internvit_like_the_6b(tmp_path, change):
    config = official_config(vision_config={**VISION_6B, **change})
    tensors = write_official(tmp_path, config=config)
    has_bias = any(name.endswith("norm1.bias") for name in tensors)
    assert has_bias == (change.get("norm_type") == "layer_norm")
    features = load_model(tmp_path).encode_tiles(tiles(2))
    assert_close(features, Recomputed(tensors, config).patch_features(tiles(2)))


@torch.no_grad()
def test_vision_tokens_are_those_of_mlp1_and_mlp2(model, recomputed):
    features = recomputed.patch_features(tiles(3))
    short, long = (model.connectors.by_ratio[ratio](features) for ratio in ("4", "16"))
    assert (short.shape[1], long.shape[1]) == (4, 1)
    assert_close(short, recomputed.mlp1(features))
    assert_close(long, recomputed.mlp2(features))


@torch.no_grad()
def test_the_router_runs_the_second_attention_layer_three_times(model, recomputed):
    features = recomputed.patch_features(tiles(8))
    gates = model.router(features)
    assert_close(gates, recomputed.gates(features, layers=(1, 2, 2, 2)))
    assert (gates - recomputed.gates(features, layers=(1, 2, 3, 4))).abs().max() > 0.02


@torch.no_grad()
def test_kept_tiles_are_four_tokens_and_compressed_ones_one_in_their_places(flash, model, recomputed):
    batch = batch_of(*(image_sample(seed, images=images) for seed, images in ((1, (3,)), (2, ()), (3, (2,)))))
    ratios = torch.tensor([16, 4, 16, 4, 16])
    spliced = model.splice_batch(batch, model.encode_tiles(batch.tiles), ratios)

    expected, remaining = [], iter(zip(recomputed.patch_features(batch.tiles), ratios, strict=True))
    for token in batch.input_ids:
        if token != model.spec.placeholder_id:
            expected.append(flash[1][EMBEDDINGS][token][None])
            continue
        features, ratio = next(remaining)
        connector = recomputed.mlp1 if ratio == 4 else recomputed.mlp2
        expected.append(connector(features[None])[0])
    assert [len(tokens) for tokens in expected if len(tokens) > 1] == [4, 4]
    assert spliced.segment_lengths == [1 + 1 + 4 + 1 + 4, 2, 1 + 4 + 1 + 4]
    assert_close(spliced.embeddings, torch.cat(expected))


# --- language models ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_the_language_model_in_transformers(tmp_path, architecture):
    language = {**LANGUAGE_CONFIG, "architectures": [architecture], **ARCHITECTURES[architecture]}
    language = {key: value for key, value in language.items() if value is not None}
    config = official_config(llm_config=language)
    tensors = write_official(tmp_path / "whole", config=config)
    part = {
        k.removeprefix("language_model."): v for k, v in tensors.items() if k.startswith("language_model.")
    }
    (tmp_path / "part").mkdir()
    (tmp_path / "part/config.json").write_text(json.dumps(language))
    save_file(part, tmp_path / "part/model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "part", dtype=torch.float32).eval()
    assert type(theirs).__name__ == architecture

    ours, sample = load_model(tmp_path / "whole"), image_sample(1, images=(2,))
    batch = batch_of(sample)
    spliced = ours.splice_batch(batch, ours.encode_tiles(batch.tiles), ours.full_ratios(batch))
    expected = theirs(inputs_embeds=spliced.embeddings[None]).logits[0]
    assert_close(logits_of(ours, sample)[0], expected, atol=1e-5)


@pytest.mark.parametrize("with_head", [False, True])
def test_a_tied_head_may_be_stored_or_not(tmp_path, with_head):
    config = official_config(llm_config=TIED)
    tensors = official_tensors(config)
    extra = {HEAD: tensors[EMBEDDINGS].clone()} if with_head else {}
    write_official(tmp_path, config=config, tensors={**tensors, **extra})
    model = load_model(tmp_path)
    assert model.head is model.language.get_input_embeddings().weight
    assert torch.equal(model.head, tensors[EMBEDDINGS])


def test_a_tied_head_that_differs_from_the_embeddings_is_refused(tmp_path):
    config = official_config(llm_config=TIED)
    tensors = official_tensors(config)
    write_official(tmp_path, config=config, tensors={**tensors, HEAD: tensors[EMBEDDINGS] + 1})
    with pytest.raises(ValueError, match=f"1 tensors do not fit: unknown {HEAD}"):
        load_model(tmp_path)


# --- what a folder is ---------------------------------------------------------------------------------------


def test_flash_has_two_ratios_a_router_both_thresholds_and_its_own_placeholder(flash):
    contents = open_folder(flash[0]).contents
    assert (contents.spec.ratios, contents.spec.router_heads) == ([4, 16], 16)
    assert contents.spec.placeholder_id == qwen_tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>")
    assert contents.rule == RoutingRule(threshold=0.45, relative_threshold=0.25)


def test_without_the_tensors_of_flash_it_is_the_base_model(tmp_path):
    write_official(tmp_path)
    contents = open_folder(tmp_path).contents
    assert (contents.spec.ratios, contents.spec.router_heads, contents.rule) == ([4], None, None)
    assert load_model(tmp_path).router is None


def test_tiling_and_system_message_are_those_of_the_configuration(flash):
    processing = open_folder(flash[0]).contents.processing
    assert processing == {
        "tiling": {"tile_size": TILE, "min_tiles": 1, "max_tiles": 4, "use_thumbnail": True},
        "chat": {"system": SYSTEM_MESSAGE},
    }
    assert "InternVL" in processing["chat"]["system"]


def test_a_model_without_dynamic_tiling_has_one_tile(tmp_path):
    write_official(tmp_path, config=official_config(dynamic_image_size=False, use_thumbnail=False))
    tiling = open_folder(tmp_path).contents.processing["tiling"]
    assert tiling == {"tile_size": TILE, "min_tiles": 1, "max_tiles": 1, "use_thumbnail": False}


def test_python_files_in_the_folder_are_never_run(tmp_path):
    write_official(tmp_path, flash=True)
    (tmp_path / "tokenization_own.py").write_text((tmp_path / "modeling_internvl_chat.py").read_text())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "auto_map" in (tmp_path / "config.json").read_text()
    assert load_model(tmp_path).router is not None  # either file would have exited


# --- released sizes -----------------------------------------------------------------------------------------


def sizes(*values):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, values, strict=True))


VISION_300M = sizes(1024, 4096, 24, 16)
VISION_5_5B = {**VISION_6B, "image_size": 448, **sizes(3200, 12800, 45, 25)}
QWEN3_8B = {**sizes(4096, 12288, 36, 32), "num_key_value_heads": 8}
QWEN3_32B = {**sizes(5120, 25600, 64, 64), "num_key_value_heads": 8}
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
QWEN3_30B_A3B = {**MIXTURE, **sizes(2048, 6144, 48, 32), "num_key_value_heads": 4, **EXPERTS}
SIZES = {
    "8B": (VISION_300M, QWEN3_8B, 8.5e9),
    "38B": (VISION_5_5B, QWEN3_32B, 38e9),
    "30B-A3B": (VISION_300M, QWEN3_30B_A3B, 31e9),
}


@pytest.mark.parametrize("size", SIZES)
def test_every_tensor_of_a_released_size_is_mapped(tmp_path, size):
    vision, language, num_parameters = SIZES[size]
    vision = {**VISION_CONFIG, "image_size": 448, **vision}
    language = {**LANGUAGE_CONFIG, "vocab_size": 151936, "head_dim": 128, **language}
    config = official_config(flash=True, force_image_size=448, vision_config=vision, llm_config=language)
    expected = dict(official_shapes(config, flash=True))
    qwen_tokenizer().save_pretrained(tmp_path)
    own = own_tensors(build_without_weights(FLASH.read(tmp_path, config, set(expected)).spec))
    assert FLASH.stored_shapes(own) == expected
    assert sum(tensor.numel() for tensor in own.values()) == pytest.approx(num_parameters, rel=0.05)
