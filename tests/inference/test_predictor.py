import json
import shutil
from dataclasses import replace

import pytest
import torch

from tests.support.folders import tiled, write_model_folder, write_set
from tests.support.tiny import encoded_image
from vico_pl.data.collate import collate
from vico_pl.inference.generate import prompt_texts
from vico_pl.inference.predictor import Predictor
from vico_pl.model.families.base import CALIBRATION_NAME, CONFIG_NAME, PROCESSING_NAME, WEIGHTS_NAME


@pytest.fixture
def folder(model_folder, tmp_path):
    """A model folder that a test may damage."""
    return shutil.copytree(model_folder, tmp_path / "model")


def refusal(folder):
    with pytest.raises(ValueError, match=r".+") as caught:
        Predictor.load(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME, "tokenizer_config.json", PROCESSING_NAME])
def test_a_folder_that_lacks_a_file_is_refused_by_its_name_and_that_of_the_file(folder, name):
    (folder / name).unlink()
    assert f"{folder}: no {name}" in refusal(folder)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    assert f"{tmp_path / 'absent'}: no {CONFIG_NAME}" in refusal(tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "no JSON"),
        ("[]", "expected a JSON object"),
        ('{"chat": {}}', "'tiling' is missing"),
        ('{"tiling": {"tile_sizes": 448}, "chat": {}}', "tile_sizes"),
        (
            '{"tiling": {"min_tiles": 3, "max_tiles": 2}, "chat": {}}',
            "min_tiles is 3; expected 1 to data.tiling.max_tiles (2)",
        ),
    ],
)
def test_unreadable_processing_settings_are_refused_by_name(folder, content, expected):
    (folder / PROCESSING_NAME).write_text(content)
    message = refusal(folder)
    assert PROCESSING_NAME in message
    assert expected in message


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "no",
        *(f'{{"threshold": {t}}}' for t in ("null", '"low"', "NaN", '0.5, "relative_threshold": 7')),
    ],
)
def test_an_unreadable_calibration_is_refused_and_not_taken_for_none(folder, content):
    (folder / CALIBRATION_NAME).write_text(content)
    assert CALIBRATION_NAME in refusal(folder)


@torch.no_grad()
def test_without_calibration_or_router_every_tile_keeps_full_tokens(predictor, tmp_path):
    assert predictor.rule is None
    folder = write_model_folder(tmp_path / "model", router_heads=None, threshold=0.0)
    bare = Predictor.load(folder)
    for session in (predictor, bare):
        features = session.model.encode_tiles(tiled(session, (64, 64)).tiles)
        assert session.choose_ratios(features).tolist() == [4] * 5
    with pytest.raises(ValueError, match=f"{folder}: the model has no router; train one"):
        bare.router_logits(features)


def test_samples_are_cut_as_the_folder_says_and_bad_records_are_left_out(folder, tmp_path):
    content = json.loads((folder / PROCESSING_NAME).read_text())
    content["tiling"] |= {"max_tiles": 2, "use_thumbnail": False}
    (folder / PROCESSING_NAME).write_text(json.dumps(content))
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    annotation = json.dumps({"conversations": turns}).encode()
    records = [
        ("0", {"png": encoded_image("PNG", size=(64, 32)), "json": annotation}),
        ("1", {"png": b"no image", "json": annotation}),
        ("2", {"png": encoded_image("PNG", size=(64, 64)), "json": annotation}),
    ]
    samples = list(Predictor.load(folder).samples(write_set(tmp_path / "set", records)))
    assert [(s.id, len(s.tiles)) for s in samples] == [("set-000000.tar/0", 2), ("set-000000.tar/2", 1)]


@pytest.mark.parametrize(
    ("prompt", "expected"),  # for none, one and two images
    [
        ("How many?", ["How many?", "<image>\nHow many?", "<image>\n<image>\nHow many?"]),
        ("How many?\n<image>", ["How many?", "How many?\n<image>", "<image>\n<image>\nHow many?"]),
    ],
)
def test_a_question_has_as_many_marks_as_images_and_keeps_its_own_places(prompt, expected):
    assert [prompt_texts(prompt, num_images=number) for number in range(3)] == [[text] for text in expected]


def first_token_by_hand(predictor, sample, question, ratios):
    batch = collate([predictor.chat.encode_prompt(sample, question)])
    spliced = predictor.model.splice_batch(batch, predictor.model.encode_tiles(sample.tiles), ratios)
    output = predictor.model.language(inputs_embeds=spliced.embeddings[None])
    return int(output.logits[0, -1].argmax())


@torch.no_grad()
@pytest.mark.parametrize("question", ["<image>\nWhat is it?", "What is it?"], ids=["one mark", "no mark"])
@pytest.mark.parametrize("sizes", [(), ((32, 32),), ((64, 64), (32, 32))])
def test_first_token_is_the_first_token_of_the_answer_and_runs_the_router_if_routed(
    predictor, sizes, question
):
    ran = []
    predictor.model.router.register_forward_hook(lambda *_: ran.append(1))
    sample = tiled(predictor, *sizes)
    sample = replace(sample, turns=[replace(sample.turns[0], text=question)])
    ratios = torch.tensor([16, 4, 4, 16, 4, 16])[: len(sample.tiles)]
    found = [predictor.first_token(sample, ratios, routes=routes) for routes in (False, True)]
    assert len(ran) == 1
    predictor.model.language.set_attn_implementation("sdpa")
    expected = first_token_by_hand(predictor, sample, "<image>\n" * len(sizes) + "What is it?", ratios)
    assert found == [expected, expected]


def test_an_image_is_routed_by_one_pass_of_the_router(predictor):
    ran = []
    predictor.model.router.register_forward_hook(lambda *_: ran.append(1))
    predictor.prepare([torch.zeros(3, 32, 32, dtype=torch.uint8)])
    assert ran == [1]
