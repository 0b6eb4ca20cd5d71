"""A LLaVA-like model by its recipes: a tower and a language model, stage by stage, to an answer."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from tests.support.folders import write_set
from tests.support.released import qwen_tokenizer
from tests.support.tiny import encoded_image, write_tower
from vico_pl.model.families.folder import load_model
from vico_pl.tokens import MARKS, PLACEHOLDER, load_tokenizer

NAME = "vico-test-llava"


@pytest.fixture
def parts(tmp_path):
    """Overrides that put small parts in the place of the recipe's: a tower's file and a folder."""
    write_tower(tmp_path, NAME)
    tokenizer = qwen_tokenizer()
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    language = AutoModelForCausalLM.from_config(LlamaConfig(**settings, vocab_size=len(tokenizer)))
    language.save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    return [
        f"model.vision={{open_clip: {NAME}, pretrained: {tmp_path}/tower.pt, image_size: 64}}",
        f"model.language={{path: {tmp_path}/language}}",
        "data.tiling.tile_size=64",
    ]


@pytest.fixture
def shards(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "shapes"}]
    files = [{"jpg": encoded_image(size=(128, 64), seed=i)} for i in range(4)]
    content = json.dumps({"conversations": turns}).encode()
    return write_set(tmp_path / "captions", [(str(i), {**f, "json": content}) for i, f in enumerate(files)])


def test_parts_become_a_model_that_routes(vico, train, parts, tmp_path):
    pretrained = train("llava/pretrain", *parts)
    instructed = train("llava/instruct", f"model.path={pretrained}")
    policy = train("llava/consistency", f"model.path={instructed}")
    start = [f"model.path={policy}", f"model.reference={instructed}", "model.router_heads=4"]
    routed = train("llava/router", *start, "router.min_history=1")
    loaded = [load_model(folder) for folder in (pretrained, instructed, policy, routed)]
    tower, words = "vision.tower.conv1.weight", "language.model.embed_tokens.weight"
    before = torch.load(tmp_path / "tower.pt")
    states = [model.state_dict() for model in loaded]
    assert torch.equal(states[0][tower], before["visual.conv1.weight"]), "pretrain leaves the tower alone"
    assert torch.equal(states[1][tower], states[0][tower])
    assert not torch.equal(states[1][words], states[0][words]), "instruct trains the language model"
    assert not torch.equal(states[2][tower], states[1][tower]), "stage 1 trains all of it"
    assert torch.equal(states[3][words], states[2][words])
    assert [model.ratios for model in loaded] == [[4], [4], [4, 16], [4, 16]]
    assert len(load_tokenizer(routed)) <= len(loaded[-1].head)

    photo = tmp_path / "photo.jpg"
    photo.write_bytes(encoded_image(size=(128, 64)))
    answer = ["--prompt", "What is it?", "--max-new-tokens", "3"]
    assert vico("generate", routed, photo, *answer)[0] == 0
    code, _, err = vico("export", routed, tmp_path / "flash")
    assert (code, "InternViT towers alone" in err) == (2, True)


@pytest.fixture
def unmarked(tmp_path, parts):
    """The weights of a language model whose tokenizer has none of our marks."""
    words = {"<unk>": 0, "shapes": 1, "What": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "language")
    return load_file(tmp_path / "language" / "model.safetensors")


@pytest.mark.parametrize("trainable", ["connectors", "connectors,lora"])
def test_rows_of_new_tokens_alone_are_trained_of_frozen_embeddings(train, parts, unmarked, trainable):
    start = [*parts, f"model.trainable=[{trainable}]"]
    new = [3, 4, 5, 6, 7]
    trained = load_model(train("llava/pretrain", *start)).state_dict()
    read = [token for token, mark in zip(new, MARKS, strict=True) if mark != PLACEHOLDER]
    for name, expected in (("model.embed_tokens.weight", read), ("lm_head.weight", new)):
        differs = (trained[f"language.{name}"] != unmarked[name]).any(1)
        assert differs.nonzero().flatten().tolist() == expected
