import json
import re

import pytest
import torch

from tests.support.released import (
    LANGUAGE_CONFIG,
    TILE,
    VISION_CONFIG,
    WIDTH,
    official_config,
    official_tensors,
    write_official,
)
from vico_pl.model.families.folder import load_model, open_folder
from vico_pl.model.router import RoutingRule

ABSENT = object()
KNOWN = "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM"
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json")
QKV = "vision_model.encoder.layers.1.attn.qkv.weight"
EMBEDDINGS, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def refusal(folder):
    """The one sentence with which a folder is refused."""
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        load_model(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message.removeprefix(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ps_version": "v1", "select_layer": -4, "template": "Hermes-2"},
            "ps_version is 'v1'; only 'v2' is read; select_layer is -4; only -1 is read; "
            "template is 'Hermes-2'; only 'internvl2_5' is read",
        ),
        ({"downsample_ratio": 0.25}, "downsample_ratio is 0.25; only 0.5 is read"),
        ({"ps_version": ABSENT}, "ps_version is 'v1'; only 'v2' is read"),  # the default of released code
        ({"template": ABSENT}, "template is None; only 'internvl2_5' is read"),
        ({"vision_config": ABSENT}, "vision_config or llm_config is missing"),
        ({"llm_config": None}, "vision_config or llm_config is missing"),
        (
            {"llm_config": {"architectures": ["InternLM2ForCausalLM"]}, "force_image_size": 448},
            f"llm_config.architectures is ['InternLM2ForCausalLM']; expected one of {KNOWN}; "
            f"force_image_size is 448 but the position embeddings are of {TILE} px",
        ),
        ({"llm_config": {}}, f"llm_config.architectures is None; expected one of {KNOWN}"),
    ],
)
def test_a_configuration_that_we_would_misread_is_refused(tmp_path, changes, message):
    config = {key: value for key, value in official_config(**changes).items() if value is not ABSENT}
    write_official(tmp_path, tensors=official_tensors(official_config()), config=config)
    assert refusal(tmp_path) == f"/config.json: {message}"


@pytest.mark.parametrize(
    ("side", "flash", "message"),
    [
        (60, False, ": the vision tower sees tiles of 60 px, which patches of 14 px do not divide"),
        (42, False, ": tiles of 42 px are 3 x 3 patches, which do not fold by 2 for ratio 4"),
        (84, True, ": tiles of 84 px are 6 x 6 patches, which do not fold by 4 for ratio 16"),
    ],
)
def test_tiles_that_do_not_divide_are_refused(tmp_path, side, flash, message):
    vision = {**VISION_CONFIG, "image_size": side}
    write_official(tmp_path, flash=flash, config=official_config(vision_config=vision, force_image_size=side))
    assert refusal(tmp_path).startswith(message)


@pytest.mark.parametrize(
    ("names", "damage", "message"),
    [
        (
            TOKENIZER_NAMES,
            ("IMG_CONTEXT", "IMG_OTHER"),
            "the tokenizer lacks the special tokens <IMG_CONTEXT>",
        ),
        (["tokenizer.json"], ('"', ""), "its tokenizer files are incomplete or unreadable ("),
    ],
)
def test_a_tokenizer_that_is_of_no_use_is_refused(tmp_path, names, damage, message):
    write_official(tmp_path)
    for path in (tmp_path / name for name in names):
        path.write_text(path.read_text().replace(*damage))
    assert refusal(tmp_path).startswith(f": {message}")


@pytest.mark.parametrize("content", [{"architectures": None}, {"model_type": "qwen3"}, {"architectures": []}])
def test_a_configuration_of_something_else_is_refused(tmp_path, content):
    write_official(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert "/config.json: its 'architectures' is" in refusal(tmp_path)


def test_tensors_that_do_not_fit_are_listed_under_their_official_names(tmp_path):
    tensors = official_tensors(official_config(flash=True), flash=True)
    del tensors["vision_model.embeddings.class_embedding"], tensors["mlp2.7.bias"]
    del tensors["pooling_before_gating.attn4.in_proj_bias"]
    tensors["vision_model.head.weight"] = torch.zeros(2)
    tensors[QKV] = torch.zeros(2 * WIDTH, WIDTH)
    tensors["mlp1.1.weight"] = torch.zeros(3, 5)
    write_official(tmp_path, flash=True, tensors=tensors)
    count, *problems = re.split(": |; ", refusal(tmp_path).removeprefix(": "))
    assert count == "6 tensors do not fit"
    assert problems == [
        "missing mlp2.7.bias",
        "missing pooling_before_gating.attn4.in_proj_bias",
        "missing vision_model.embeddings.class_embedding",
        "mlp1.1.weight has shape [3, 5], expected [48, 128]",
        "unknown vision_model.head.weight",
        f"{QKV} has shape [{2 * WIDTH}, {WIDTH}], expected [{3 * WIDTH}, {WIDTH}]",
    ]


def test_the_list_of_tensors_ends_after_twenty(tmp_path):
    extra = {f"vision_model.extra.{i}": torch.zeros(1) for i in range(33)}
    write_official(tmp_path, tensors={**official_tensors(official_config()), **extra})
    listed = r": 33 tensors do not fit: unknown vision_model\.extra\.0(; unknown [\w.]+){19}; and 13 more"
    assert re.fullmatch(listed, refusal(tmp_path))


def test_a_tied_head_without_embeddings_is_reported_with_the_missing(tmp_path):
    config = official_config(llm_config={**LANGUAGE_CONFIG, "tie_word_embeddings": True})
    tensors = official_tensors(config)
    tensors[HEAD] = tensors.pop(EMBEDDINGS)
    write_official(tmp_path, config=config, tensors=tensors)
    assert refusal(tmp_path) == f": 2 tensors do not fit: missing {EMBEDDINGS}; unknown {HEAD}"


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (official_config(), None),
        (official_config(flash_absolute_threshold=0.4), RoutingRule(threshold=0.4)),
        (official_config(flash_relative_threshold=0.4), None),
    ],
)
def test_a_router_is_calibrated_if_its_absolute_threshold_is_known(tmp_path, config, rule):
    write_official(tmp_path, config=config, tensors=official_tensors(config, flash=True))
    contents = open_folder(tmp_path).contents
    assert (contents.spec.router_heads, contents.rule) == (16, rule)
