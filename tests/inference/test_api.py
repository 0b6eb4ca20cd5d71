"""`vico_pl.Predictor` as users call it: `generate` and `route`."""

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import vico_pl
from tests.support.folders import full_ratios, tiled, write_model_folder
from tests.support.tiny import encoded_image
from vico_pl import ImageRouting, Predictor
from vico_pl.data.decode import read_image
from vico_pl.data.tiling import tile_image
from vico_pl.inference.generate import generation_options, pixels
from vico_pl.model.router import RoutingRule, compress_probability

MAX_NEW = 9


@pytest.fixture(scope="module")
def endless_folder(tmp_path_factory):
    """A model that never ends its turn and whose router compresses about half of the tiles."""
    folder = write_model_folder(tmp_path_factory.mktemp("api") / "model", ends=False)
    session = Predictor.load(folder)
    scores = [session.route(photo(size, seed)).scores for seed, size in enumerate(((64, 64), (64, 32)))]
    ranked = sorted(score for of_image in scores for score in of_image)
    return write_model_folder(folder, ends=False, threshold=(ranked[3] + ranked[4]) / 2)


@pytest.fixture
def endless(endless_folder):
    return Predictor.load(endless_folder)


def photo(size, seed=0):
    """The bytes of a PNG of this size (width, height)."""
    return encoded_image("PNG", size=size, seed=seed)


def asked():
    """Prompts of every sort: one image, none, several, several turns, marks inside the text."""
    of_each = [
        (photo((64, 64), 1), "What is A?"),
        (None, "Who?"),
        ([photo((64, 32), 2), photo((32, 32), 3)], "From <image> to <image>, what changed?"),
        (photo((32, 64), 4), ["<image>\nWhat is it?", "red", "Sure?"]),
        ([], ["How many shapes?", "green", "What is the value of A?", "blue", "Why?"]),
    ]
    return map(list, zip(*of_each, strict=True))


def by_transformers(predictor, texts, images, ratios, max_new_tokens=MAX_NEW):
    """The answer of one conversation alone by transformers' own generate(), from embeddings."""
    embed, parts, features = predictor.model.language.get_input_embeddings(), [], []
    for image in images:
        tiles = tile_image(pixels(image), predictor.tiling.per_image(len(images)))
        features.append(predictor.model.encode_tiles(tiles))
    chosen = iter(zip(features, ratios, strict=True))

    def add(text):
        ids = predictor.tokenizer.encode(text, add_special_tokens=False)
        parts.append(embed(torch.tensor(ids, dtype=torch.int64)))

    for number, text in enumerate(texts):
        add("<|im_start|>" + ("assistant" if number % 2 else "user") + "\n")
        first, *others = text.split("<image>")
        add(first)
        for rest in others:
            of_image, ratio = next(chosen)
            add("<img>")
            parts.append(predictor.model.connectors(of_image, torch.tensor(ratio))[0])
            add("</img>" + rest)
        add("<|im_end|>\n")
    add("<|im_start|>assistant\n")
    embeddings = torch.cat([part for part in parts if len(part)])[None]
    predictor.model.language.set_attn_implementation("sdpa")
    ids = predictor.model.language.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=predictor.tokenizer.eos_token_id,
        pad_token_id=predictor.tokenizer.pad_token_id,
    )
    return predictor.tokenizer.decode(ids[0], skip_special_tokens=True).strip(), embeddings.shape[1]


def same(one, other):
    """Whether two answers are equal but for their times."""
    return {**vars(one), "seconds": 0} == {**vars(other), "seconds": 0}


@torch.no_grad()
def test_a_batch_gives_what_transformers_gives_for_each_conversation_alone(endless):
    images, prompts = asked()
    together = endless.generate(images, prompts, max_new_tokens=MAX_NEW, batch_size=5)
    for answer, given, prompt in zip(together, images, prompts, strict=True):
        given = given if isinstance(given, list) else [given] if given else []
        texts = [prompt] if isinstance(prompt, str) else prompt
        texts = texts if "<image>" in texts[0] or not given else ["<image>\n" + texts[0], *texts[1:]]
        expected = by_transformers(endless, texts, given, [image.ratios for image in answer.images])
        assert (answer.text, answer.prompt_tokens) == expected
        assert (answer.new_tokens, answer.finish_reason) == (MAX_NEW, "length")
    assert len({answer.text for answer in together}) == 5


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_answers_and_routing_depend_on_no_other_prompt(endless, batch_size):
    images, prompts = asked()
    together = endless.generate(images, prompts, max_new_tokens=MAX_NEW, batch_size=batch_size)
    backwards = endless.generate(images[::-1], prompts[::-1], max_new_tokens=MAX_NEW)[::-1]
    assert all(map(same, together, backwards))
    assert together[0].images == [endless.route(images[0])]
    assert together[3].images == [endless.route(images[3])]
    assert {ratio for answer in together for image in answer.images for ratio in image.ratios} == {4, 16}


def test_an_answer_says_what_was_spent(endless):
    image = photo((64, 64), 0)
    (answer,) = endless.generate(image, "What is A?", max_new_tokens=3)
    (routing,) = answer.images
    num_compressed = routing.ratios.count(16)
    assert 0 < num_compressed < 5
    assert routing.vision_tokens == [16 // ratio for ratio in routing.ratios]
    assert answer.vision_tokens == 5 * 4 - 3 * num_compressed
    assert answer.full_vision_tokens == 20
    assert (routing.grid, routing.has_thumbnail) == ((2, 2), True)
    assert endless.generate(image, "What is A?", ratios=4, max_new_tokens=3)[0].prompt_tokens == (
        answer.prompt_tokens + 3 * num_compressed
    )
    assert set(answer.seconds) == {"encode", "generate"}
    assert min(answer.seconds.values()) > 0


@torch.no_grad()
def test_scores_are_the_probabilities_that_the_rule_compares(endless):
    image = photo((32, 64), 4)
    routing = endless.route(image)
    tiles = tile_image(pixels(image), endless.tiling)
    probabilities = compress_probability(endless.router_logits(endless.encode(tiles)))
    assert routing.scores == probabilities.tolist()
    assert routing.ratios == [16 if score >= endless.rule.threshold else 4 for score in routing.scores]
    assert (routing.grid, routing.has_thumbnail, len(routing.scores)) == ((1, 2), True, 3)


def test_a_model_without_router_has_no_scores_and_keeps_full_tokens(tmp_path):
    predictor = Predictor.load(write_model_folder(tmp_path / "model", router_heads=None))
    expected = {"ratios": [4], "scores": None, "vision_tokens": [4], "grid": (1, 1), "has_thumbnail": False}
    assert predictor.route(photo((32, 32))) == ImageRouting(**expected)


def test_every_kind_of_image_gives_the_same_answer(endless, tmp_path):
    path, content = tmp_path / "photo.png", photo((64, 32), 5)
    path.write_bytes(content)
    picture = PIL.Image.open(path)
    array = np.asarray(picture)  # read-only
    strided = np.ascontiguousarray(array[:, ::-1])[:, ::-1]
    kinds = [path, str(path), content, picture, array, strided, torch.tensor(array).permute(2, 0, 1)]
    answers = [endless.generate(image, "What is A?", max_new_tokens=MAX_NEW)[0] for image in kinds]
    assert all(same(answers[0], answer) for answer in answers)
    assert all(torch.equal(pixels(image), read_image(path)) for image in kinds)
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert torch.equal(pixels(grey), torch.tensor(grey).expand(3, 3, 4))


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (42, "a int of no dtype with shape ()"),
        (np.zeros((3, 4, 5), np.uint8), "a ndarray of uint8 with shape (3, 4, 5)"),
        (np.zeros((4, 4, 3), np.float32), "a ndarray of float32 with shape (4, 4, 3)"),
        (np.zeros((0, 4, 3), np.uint8), "a ndarray of uint8 with shape (0, 4, 3)"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), "a Tensor of uint8 with shape (4, 4, 3)"),
        (torch.zeros(3, 4, 4, dtype=torch.bfloat16), "a Tensor of bfloat16 with shape (3, 4, 4)"),
        (torch.zeros(4, 4, dtype=torch.uint8), "a Tensor of uint8 with shape (4, 4)"),
    ],
)
def test_what_is_no_image_is_refused(image, found):
    with pytest.raises(
        ValueError, match="expected a path, bytes of a file, a Pillow image, or uint8"
    ) as caught:
        pixels(image)
    assert str(caught.value).startswith(f"image is {found};")


@pytest.mark.parametrize(
    ("images", "prompts", "settings", "complaint"),
    [
        (None, ["a", "b"], {"batch_size": 0}, "batch_size is 0; expected at least 1"),
        (None, ["a"], {"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        (b"", ["a", "b"], {}, "2 prompts with other images; expected a list with an entry for each prompt"),
        ([None], ["a", "b"], {}, "2 prompts with other images"),
        (None, ["a", ["b", "c"]], {}, "prompt 1 has 2 turns; expected questions and answers in turn"),
        ("absent.png", "a", {}, "absent.png: no such file"),
        (b"no image", "a", {}, "image 'image' .8 bytes.: neither JPEG, PNG, WebP nor GIF"),
        (None, "a", {"temprature": 1.0}, "'temprature' is no option .*; did you mean 'temperature'"),
        (None, "a", {"num_beams": 4}, "'num_beams' is no option of generation; expected one of temperature"),
        (None, "a", {"temperature": -1}, "temperature"),
        (None, "a", {"stop_strings": [""]}, r"stop_strings is \[''\]; expected a list of texts"),
        (None, "a", {"stop_strings": "."}, "stop_strings is '.'; expected a list of texts"),
        (None, ["a", "b"], {"streamer": print}, "2 prompts with a streamer; expected one"),
        (None, ["a", "b"], {"ratios": [4]}, "ratios of 1 prompts for 2"),
        (None, ["a"], {"ratios": [[4]]}, r"prompt 0: ratios are \[4\]; expected one for each of 0 tiles"),
        (photo((32, 32)), "a", {"ratios": 9}, r"prompt 0: ratios are 9; .* 1 tiles, all in \[4, 16\]"),
        (None, "a " * 600, {}, "prompt 0: .* tokens at full vision tokens; the language model has 512"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(predictor, images, prompts, settings, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        predictor.generate(images, prompts, **settings)
    assert "\n" not in str(caught.value)


def test_given_ratios_replace_those_of_the_router_whose_released_rule_compares_tiles_of_one_prompt(endless):
    images = [photo((64, 64), 1), photo((32, 32), 2)]
    answers = endless.generate(images, ["A?", "B?"], ratios=[[4, 16, 16, 4, 16], 16], max_new_tokens=2)
    assert [answer.images[0].ratios for answer in answers] == [[4, 16, 16, 4, 16], [16]]
    assert [answer.vision_tokens for answer in answers] == [4 + 1 + 1 + 4 + 1, 1]
    endless = replace(endless, rule=RoutingRule(threshold=0.0, relative_threshold=0.0))
    answers = endless.generate(images, ["A?", "B?"], max_new_tokens=1)
    assert [answer.images[0].ratios.count(4) for answer in answers] == [1, 1]  # the lowest of each


def test_options_sample_and_a_seed_repeats(endless):
    def texts(seed, **options):
        torch.manual_seed(seed)
        answers = endless.generate(None, ["A?"] * 4, max_new_tokens=MAX_NEW, **options)
        return [answer.text for answer in answers]

    greedy = texts(0)
    assert len(set(greedy)) == 1
    assert texts(0, temperature=5) == texts(0, temperature=5.0, do_sample=True) != greedy
    assert len(set(texts(0, temperature=5.0))) > 1
    assert texts(0, temperature=0, top_p=0.9) == greedy
    assert texts(0, temperature=5.0, top_k=1) == greedy
    assert texts(0, repetition_penalty=3.0) != greedy
    assert generation_options({"do_sample": False, "top_p": 0.5}) == {"do_sample": False}


def test_pieces_of_a_stream_are_the_whole_text(endless):
    image, pieces = photo((64, 64), 1), []
    (whole,) = endless.generate(image, "What is A?", max_new_tokens=40)
    (answer,) = endless.generate(image, "What is A?", max_new_tokens=40, streamer=pieces.append)
    assert "".join(pieces) == answer.text == whole.text
    assert len(pieces) > 5


def test_stop_ends_answers_after_the_token_and_begins_no_other_batch(endless):
    calls = []

    def stop():
        calls.append(1)
        return len(calls) >= 3

    answers = endless.generate(None, ["A?", "B?"], batch_size=1, max_new_tokens=40, stop=stop)
    assert [(answer.new_tokens, answer.finish_reason) for answer in answers] == [(3, "stop")]


def test_stop_strings_end_each_answer_where_they_are_and_are_never_streamed(endless):
    images, prompts = [photo((64, 64), 1), None, photo((32, 32), 2)], ["What is A?", "Who?", "A?"]
    whole = [answer.text for answer in endless.generate(images, prompts, max_new_tokens=30)]
    string = whole[0][5:8]
    answers = endless.generate(images, prompts, max_new_tokens=30, stop_strings=["never said", string])
    assert [answer.text for answer in answers] == [text.split(string)[0].strip() for text in whole]
    assert (answers[0].finish_reason, answers[0].new_tokens < 30) == ("stop", True)
    pieces, settings = [], {"max_new_tokens": 30, "stop_strings": [string]}
    endless.generate([images[0]], [prompts[0]], streamer=pieces.append, **settings)
    assert "".join(pieces) == answers[0].text


def test_an_answer_that_ends_says_so(predictor):
    sample, asked = tiled(predictor, (64, 64), seed=1), [f"What is {letter}?" for letter in "ABCD"]
    given = {"features": [predictor.encode(sample.tiles)] * 4, "ratios": full_ratios(*[sample] * 4)}
    rows = predictor.generate_ids([sample] * 4, asked, **given, max_new_tokens=20).tolist()
    end, photos = predictor.tokenizer.eos_token_id, [encoded_image("PNG", size=(64, 64), seed=100)] * 4
    expected = [(row.index(end) + 1, "stop") if end in row else (20, "length") for row in rows]
    answers = predictor.generate(photos, asked, max_new_tokens=20)
    assert [(answer.new_tokens, answer.finish_reason) for answer in answers] == expected
    assert min(expected)[0] < 20


def test_a_name_on_the_hub_is_one_sentence_without_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="nobody/nothing@main: no such folder, and it cannot be had"
    ) as caught:
        Predictor.load("nobody/nothing@main")
    assert "\n" not in str(caught.value)


def test_the_package_shows_what_is_public_and_imports_fast():
    assert dir(vico_pl) == ["Answer", "ImageRouting", "Predictor", "__version__"]
    assert vico_pl.__version__ == version("vico_pl")
    assert all(getattr(vico_pl, name).__doc__ for name in dir(vico_pl))
    with pytest.raises(AttributeError, match="no attribute 'Predicter'; expected one of Answer"):
        vico_pl.Predicter  # noqa: B018
    code = "import sys, vico_pl; vico_pl.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
