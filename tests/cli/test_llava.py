"""A LLaVA-like model by its recipes: a tower and a language model, stage by stage, to an answer."""

import json

import open_clip
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.helpers import encoded_image
from tests.released import qwen_tokenizer
from tests.sessions import write_set
from vico_pl.model.families.folder import load_model
from vico_pl.tokens import load_tokenizer

NAME = "vico-test-llava"
FIXED = [
    "data.batch_size=2",
    "trainer.max_steps=2",
    "optim.warmup_steps=0",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "data.num_workers=0",
]


@pytest.fixture
def parts(tmp_path):
    """Overrides that put small parts in the place of the recipe's: a tower's file and a folder."""
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 4, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
    config = tmp_path / f"{NAME}.json"
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(config)
    torch.save(open_clip.create_model(NAME).state_dict(), tmp_path / "tower.pt")
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


def test_parts_become_a_model_that_routes(vico, parts, shards, tmp_path):
    def train(stage, *settings):
        common = [
            *FIXED,
            "data.batch_size=2",
            f"data.sources=[{{path: {shards}}}]",
            f"run_dir={tmp_path}/{stage}",
        ]
        code, _, err = vico("train", f"recipes/llava/{stage}.yaml", *common, *settings)
        assert code == 0, err
        return load_model(tmp_path / stage / "model")

    pretrained = train("pretrain", *parts)
    instructed = train("instruct", f"model.path={tmp_path}/pretrain/model")
    policy = train("consistency", f"model.path={tmp_path}/instruct/model")
    start = [f"model.path={tmp_path}/consistency/model", f"model.reference={tmp_path}/instruct/model"]
    routed = train("router", *start, "router.min_history=1", "model.router_heads=4")

    tower, words = "vision.tower.conv1.weight", "language.model.embed_tokens.weight"
    before = torch.load(tmp_path / "tower.pt")
    states = [model.state_dict() for model in (pretrained, instructed, policy, routed)]
    assert torch.equal(states[0][tower], before["visual.conv1.weight"]), "pretrain leaves the tower alone"
    assert torch.equal(states[1][tower], states[0][tower])
    assert not torch.equal(states[1][words], states[0][words]), "instruct trains the language model"
    assert not torch.equal(states[2][tower], states[1][tower]), "stage 1 trains all of it"
    assert torch.equal(states[3][words], states[2][words])
    assert [model.ratios for model in (instructed, policy)] == [[4], [4, 16]]
    assert len(load_tokenizer(tmp_path / "router" / "model")) <= len(routed.head)

    photo = tmp_path / "photo.jpg"
    photo.write_bytes(encoded_image(size=(128, 64)))
    answer = ["--prompt", "What is it?", "--max-new-tokens", "3"]
    assert vico("generate", tmp_path / "router" / "model", photo, *answer)[0] == 0
    code, _, err = vico("export", tmp_path / "router" / "model", tmp_path / "flash")
    assert (code, "InternViT towers alone" in err) == (2, True)
