import json
import shutil

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
        '{"threshold": null}',
        '{"threshold": "low"}',
        "no",
        '{"threshold": NaN}',
        '{"threshold": 0.5, "relative_threshold": 7}',
    ],
)
def test_an_unreadable_calibration_is_refused_and_not_taken_for_none(folder, content):
    (folder / CALIBRATION_NAME).write_text(content)
    assert CALIBRATION_NAME in refusal(folder)


@torch.no_grad()
def test_without_calibration_every_tile_keeps_full_tokens(predictor):
    features = predictor.model.encode_tiles(tiled(predictor, (64, 64)).tiles)
    assert predictor.rule is None
    assert predictor.choose_ratios(features).tolist() == [4] * 5


@torch.no_grad()
def test_a_model_without_router_keeps_full_tokens_and_says_what_it_lacks(tmp_path):
    folder = write_model_folder(tmp_path / "model", router_heads=None, threshold=0.0)
    predictor = Predictor.load(folder)
    features = predictor.model.encode_tiles(tiled(predictor, (64, 32)).tiles)
    assert predictor.choose_ratios(features).tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match=f"{folder}: the model has no router; train one"):
        predictor.router_logits(features)


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
    ("prompt", "num_images", "expected"),
    [
        ("How many?", 0, "How many?"),
        ("How many?", 1, "<image>\nHow many?"),
        ("How many?", 2, "<image>\n<image>\nHow many?"),
        ("How many?\n<image>", 1, "How many?\n<image>"),
        ("From <image> to <image>?", 2, "From <image> to <image>?"),
        ("<image>\nHow many?", 2, "<image>\n<image>\nHow many?"),
        ("<image>\nHow many?", 0, "How many?"),
    ],
)
def test_a_question_has_as_many_marks_as_images_and_keeps_its_own_places(prompt, num_images, expected):
    assert prompt_texts(prompt, num_images=num_images) == [expected]


def first_token_by_hand(predictor, sample, question, ratios):
    batch = collate([predictor.chat.encode_prompt(sample, question)])
    spliced = predictor.model.splice_batch(batch, predictor.model.encode_tiles(sample.tiles), ratios)
    output = predictor.model.language(inputs_embeds=spliced.embeddings[None])
    return int(output.logits[0, -1].argmax())


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(), ((32, 32),), ((64, 64), (32, 32))])
def test_first_token_is_the_first_token_of_the_answer(predictor, sizes):
    sample = tiled(predictor, *sizes, question="What colour is it?")
    ratios = torch.tensor([16, 4, 4, 16, 4, 16])[: len(sample.tiles)]
    predictor.model.language.set_attn_implementation("sdpa")
    expected = first_token_by_hand(predictor, sample, sample.turns[0].text, ratios)
    assert predictor.first_token(sample, ratios, routes=False) == expected


def test_first_token_can_be_had_when_a_later_turn_brings_an_image(predictor):
    sample = tiled(predictor, (32, 32), (32, 32), question="What is it?")
    sample.turns[0] = type(sample.turns[0])(
        role="human", text="<image>\nWhat is it?"
    )  # the other one comes later
    ratios = torch.tensor([4, 16])
    token = predictor.first_token(sample, ratios, routes=True)
    predictor.model.language.set_attn_implementation("sdpa")
    assert token == first_token_by_hand(predictor, sample, "<image>\n<image>\nWhat is it?", ratios)


def test_only_a_routed_first_token_runs_the_router(predictor):
    ran = []
    predictor.model.router.register_forward_hook(lambda *_: ran.append(1))
    sample = tiled(predictor, (32, 32))
    predictor.first_token(sample, torch.tensor([4]), routes=False)
    assert not ran
    predictor.first_token(sample, torch.tensor([4]), routes=True)
    assert ran == [1]


def test_an_image_is_routed_by_one_pass_of_the_router(predictor):
    ran = []
    predictor.model.router.register_forward_hook(lambda *_: ran.append(1))
    predictor.prepare([torch.zeros(3, 32, 32, dtype=torch.uint8)])
    assert ran == [1]
