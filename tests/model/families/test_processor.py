"""What transformers' processor makes of an exported folder, held against our own tiles and tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, InternVLForConditionalGeneration

from tests.support.released import LANGUAGE_CONFIG, write_native, write_official
from vico_pl.data.chat import ChatConfig, ChatEncoder
from vico_pl.data.tiling import TilingConfig, tile_sample
from vico_pl.model.families.folder import export, load_model, open_folder
from vico_pl.tokens import load_tokenizer
from vico_pl.types import Sample

TOKENS_PER_TILE = 4


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder in transformers' layout, made from one of InternVL's; and what that says of tiles and chat."""
    folder = tmp_path_factory.mktemp("processor")
    write_official(folder / "released")
    export(folder / "released", folder / "hf", layout="hf")
    return folder / "hf", open_folder(folder / "released").contents.processing


@pytest.fixture
def processor(exported):
    return AutoProcessor.from_pretrained(exported[0])


def pixels(height, width):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8))


def theirs(processor, *content, add_generation_prompt=True, before=()):
    messages = [*before, {"role": "user", "content": list(content)}]
    options = {"add_generation_prompt": add_generation_prompt, "tokenize": True, "return_dict": True}
    return processor.apply_chat_template(messages, **options, return_tensors="pt")


def ours(exported, text, *images):
    folder, processing = exported
    tiled = tile_sample(
        Sample(id="x", images=list(images), turns=[], metadata={}), TilingConfig(**processing["tiling"])
    )
    encoder = ChatEncoder(load_tokenizer(folder), ChatConfig(**processing["chat"]), TOKENS_PER_TILE)
    return encoder.encode_prompt(tiled, text)


def expanded(ids, placeholder):
    return [i for token in ids.tolist() for i in [token] * (TOKENS_PER_TILE if token == placeholder else 1)]


@pytest.mark.parametrize(("height", "width", "tiles"), [(56, 56, 1), (60, 120, 3), (130, 120, 5)])
def test_an_image_and_a_question_become_the_same_pixels_and_tokens(exported, processor, height, width, tiles):
    image, question = pixels(height, width), "What is the value?"
    found = theirs(processor, {"type": "image", "image": image}, {"type": "text", "text": question})
    sample = ours(exported, f"<image>\n{question}", image)
    assert len(sample.tiles) == tiles
    assert found["input_ids"][0].tolist() == expanded(sample.input_ids, processor.image_token_id)
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{k}")) for k in ("mean", "std"))
    expected = (sample.tiles / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(found["pixel_values"], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_model_takes_what_the_processor_makes(exported, processor):
    image = {"type": "image", "image": pixels(60, 120)}
    found = theirs(processor, image, {"type": "text", "text": "How many shapes?"})
    model = InternVLForConditionalGeneration.from_pretrained(exported[0]).eval()
    assert model(**found).logits.shape == (1, found["input_ids"].shape[1], LANGUAGE_CONFIG["vocab_size"])
    assert len(processor.tokenizer) == len(load_tokenizer(exported[0])) <= len(load_model(exported[0]).head)


def test_text_alone_and_several_turns_are_the_same_tokens(exported, processor):
    question = {"type": "text", "text": "How many?"}
    sample = ours(exported, "How many?")
    assert theirs(processor, question)["input_ids"][0].tolist() == sample.input_ids.tolist()
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "shapes"}]
    found = theirs(processor, question, before=turns, add_generation_prompt=False)
    text = processor.tokenizer.decode(found["input_ids"][0])
    system = exported[1]["chat"]["system"]
    roles = ["user\nWhat?", "assistant\nshapes", "user\nHow many?"]
    assert text == "".join(f"<|im_start|>{part}<|im_end|>\n" for part in [f"system\n{system}", *roles])


@pytest.mark.parametrize("system", [None, "", 'Be "brief"\nor {{ 7 * 7 }} \U0001f600'])
def test_the_system_message_of_the_model_is_sent_unless_one_is_given(tmp_path, system):
    write_native(tmp_path / "source")
    folder = open_folder(tmp_path / "source")
    contents = replace(folder.contents, processing={"chat": {"system": system}})
    folder.family.write(tmp_path / "source", contents, "float32")
    processor = AutoProcessor.from_pretrained(tmp_path / "source")
    question = {"role": "user", "content": "What?"}
    sent = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    rest = "<|im_start|>user\nWhat?<|im_end|>\n"
    assert processor.apply_chat_template([question]) == sent + rest
    given = [{"role": "system", "content": "Short."}, question]
    assert processor.apply_chat_template(given) == f"<|im_start|>system\nShort.<|im_end|>\n{rest}"
