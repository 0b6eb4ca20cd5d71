import json

import pytest
import torch
from safetensors import safe_open

from tests.support.folders import write_model_folder
from tests.support.tiny import encoded_image
from vico_pl.data.collate import collate
from vico_pl.inference.predictor import Predictor
from vico_pl.inference.responses import embed_image
from vico_pl.model.language import run_packed
from vico_pl.tokens import PLACEHOLDER, token_id


@pytest.fixture
def predictor(tmp_path):
    return Predictor.load(write_model_folder(tmp_path / "model", threshold=0.5))


def first_logits(predictor, embeddings, question):
    """Put finished vision tokens in the place of `<image>`, as another engine does: one mark per row."""
    mark = token_id(predictor.tokenizer, PLACEHOLDER)
    marks = PLACEHOLDER * len(embeddings)
    text = f"<|im_start|>user\n<img>{marks}</img>\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor(predictor.tokenizer.encode(text, add_special_tokens=False))
    inputs = predictor.model.language.get_input_embeddings()(ids).masked_scatter(
        (ids == mark)[:, None], embeddings
    )
    return predictor.model.language(inputs_embeds=inputs[None]).logits[0, -1]


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (32, 32), (64, 32)])
def test_the_language_model_answers_the_tokens_in_the_file_as_it_answers_the_image(predictor, tmp_path, size):
    image, output = tmp_path / "a.png", tmp_path / "a.safetensors"
    image.write_bytes(encoded_image("PNG", size=size, seed=5))
    counts = embed_image(predictor, image, output)
    with safe_open(output, "pt") as file:
        embeddings, metadata = file.get_tensor("image_embeds"), file.metadata()
    routed = predictor.prepare([image])
    assert json.loads(metadata["ratios"]) == routed.images[0].ratios
    assert counts == (len(embeddings), 4 * len(routed.ratios))
    assert embeddings.shape == (sum(16 // ratio for ratio in routed.images[0].ratios), 32)
    prompt = predictor.encode_prompt(routed.sample, "What is A?")
    spliced = predictor.model.splice_batch(collate([prompt]), routed.features, routed.ratios)
    states = run_packed(predictor.model.language, spliced.embeddings, spliced.segment_lengths)
    expected = states[-1] @ predictor.model.head.T
    predictor.model.language.set_attn_implementation("sdpa")
    found = first_logits(predictor, embeddings, "What is A?")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1, "the logits differ"
