"""The plug-in for lmms-eval; tests that need lmms-eval itself skip without it."""

import json
import sys
import tomllib
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from PIL import Image

from tests.support.folders import write_model_folder
from tests.support.scripts import BENCHMARKS, load_benchmark
from vico_pl.inference.predictor import Predictor

IS_INSTALLED = find_spec("lmms_eval") is not None
if not IS_INSTALLED:
    sys.modules |= {
        "lmms_eval.api.instance": Mock(
            **dict.fromkeys(("GenerationResult", "Instance", "TokenCounts"), object)
        ),
        "lmms_eval.api.model": Mock(lmms=object),
        "lmms_eval.utils": Mock(),
    }

from vico_pl.inference.lmms import generation_settings, manifest, read_messages  # noqa: E402 - after the stand-ins

ROOT = BENCHMARKS.parent
TASK = ROOT / "docs" / "lmms_eval" / "glyphs.yaml"


def image(number):
    return {"type": "image", "url": f"{number}.png"}


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


# --- Without lmms-eval --------------------------------------------------------------------------------------


def test_the_entry_point_is_there():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    point = EntryPoint("vico_pl", points["lmms_eval.models"]["vico_pl"], "lmms_eval.models")
    assert point.load() is manifest


@pytest.mark.parametrize(
    ("messages", "images", "texts"),
    [
        pytest.param([user(image(1), text(" How many? "))], [1], ["<image>\nHow many?"], id="one image"),
        pytest.param(
            [user(text("From"), image(1), text("to"), image(2), text("?"))],
            [1, 2],
            ["From\n<image>\nto\n<image>\n?"],
            id="images stay where they are",
        ),
        pytest.param(
            [user(image(1), text("A?")), {"role": "assistant", "content": "b"}, user(image(2), text("C?"))],
            [1, 2],
            ["<image>\nA?", "b", "<image>\nC?"],
            id="several turns",
        ),
        pytest.param(
            [{"role": "system", "content": [text("Be brief.")]}, user(image(1)), user(text("A?"))],
            [1],
            ["Be brief.\n<image>\nA?"],
            id="a system message begins the question",
        ),
        pytest.param([user(image(1), text("<image> A?"))], [1], ["<image>\nA?"], id="a mark in a text"),
    ],
)
def test_messages_become_images_and_texts(messages, images, texts):
    assert read_messages(messages) == ([f"{number}.png" for number in images], texts)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user({"type": "video", "url": "a.mp4"})], "a part of type 'video'; expected text or image"),
        ([user(text("A?")), {"role": "assistant", "content": "b"}], "of user assistant; expected user and"),
        ([user(text("A?")), {"role": "tool", "content": "b"}, user(text("C?"))], "of user tool user"),
        ([], "of nobody"),
    ],
)
def test_messages_that_are_no_questions_are_refused(messages, reason):
    with pytest.raises(ValueError, match=reason):
        read_messages(messages)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_new_tokens": 32}),
        ({"max_new_tokens": 16, "until": "Q:"}, {"max_new_tokens": 16, "stop_strings": ("Q:",)}),
        ({"until": ["\n\n", "", "\n"]}, {"stop_strings": ("\n",)}),
        ({"until": 7}, {"stop_strings": ("7",)}),  # as the command line reads `until=7`
        ({"until": None, "temperature": None, "num_beams": 1}, {}),
        ({"temperature": 0.0, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9, "do_sample": True}),
        ({"temperature": 0.5, "do_sample": False}, {"temperature": 0.5}),
        ({"do_sample": True}, {"do_sample": True}),
        ({"do_sample": True, "temperature": 0}, {"temperature": 0}),
        ({"top_p": 0.9}, {"top_p": 0.9}),
    ],
)
def test_generation_kwargs_become_arguments(given, expected):
    greedy = {"max_new_tokens": 32, "stop_strings": (), "do_sample": False}
    assert generation_settings(given, max_new_tokens=32) == greedy | expected


@pytest.mark.parametrize(("name", "value"), [("num_beams", 3), ("image_aspect_ratio", "original")])
def test_a_setting_without_effect_warns(name, value):
    with pytest.warns(UserWarning, match=f"of generation_kwargs, {name} has no effect"):
        generation_settings({name: value}, max_new_tokens=32)


def test_the_benchmark_writes_the_task_and_scores_it(model_folder, answered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = yaml.safe_load(TASK.read_text())
    benchmark, full = load_benchmark("lmms"), "--threshold=1.1"
    assert task["generation_kwargs"]["max_new_tokens"] == benchmark.MAX_NEW_TOKENS
    score = benchmark.main([str(model_folder), f"--data={answered}", "--output=runs/lmms", full])
    lines = Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(Path(row["image"]).is_file() for row in rows)
    asked = [row for row in rows if row["question"]]  # the model knows no answer to an empty one
    assert score == pytest.approx(len(asked) / len(rows))
    assert {task[name] for name in ("doc_to_visual", "doc_to_text", "doc_to_target")} == set(rows[0])


# --- With lmms-eval -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_class():
    if not IS_INSTALLED:
        pytest.skip("needs lmms-eval")
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    return registry.get_model_class("vico_pl")


def requests_for(model, conversations, settings):
    """Requests of a task whose documents are their messages."""
    from lmms_eval.api.instance import Instance

    model.task_dict["task"] = {"test": conversations}
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    return [
        Instance("generate_until", ("", lambda doc: doc, given, number, "task", "test"), number, metadata)
        for number, given in enumerate(settings)
    ]


def conversations_of_all_kinds():
    pictures = [Image.effect_noise((64, 32 * n), 90) for n in (1, 2, 3)]
    parts = [{"type": "image", "url": picture} for picture in pictures]
    questions = [[user(parts[i % 3], text(f"What is {x}?"))] for i, x in enumerate("ABCDE")]
    turns = [*questions[0], {"role": "assistant", "content": "red"}, user(text("And H?"))]
    return [*questions, [user(text("What is F?"))], [user(*parts, text("What is G?"))], turns]


@pytest.mark.filterwarnings("ignore")  # of lmms-eval and what it imports
def test_requests_get_the_answers_that_the_predictor_gives_alone(chat_class, tmp_path):
    folder = write_model_folder(tmp_path / "model", threshold=0.5)
    model = chat_class.create_from_arg_string(
        f"pretrained={folder},batch_size=3,max_new_tokens=4", {"batch_size": 1}
    )
    conversations = conversations_of_all_kinds()
    settings = [{"max_new_tokens": 6} if number % 2 else {"until": ["e"]} for number in range(8)]
    results = model.generate_until(requests_for(model, conversations, settings))
    predictor = Predictor.load(folder)
    for conversation, given, result in zip(conversations, settings, results, strict=True):
        images, texts = read_messages(conversation)
        (answer,) = predictor.generate([images], [texts], **generation_settings(given, max_new_tokens=4))
        assert result.text == answer.text
        assert result.token_counts.to_dict() == {
            "input_tokens": answer.prompt_tokens,
            "output_tokens": answer.new_tokens,
            "vision_tokens": answer.vision_tokens,
            "full_vision_tokens": answer.full_vision_tokens,
        }
    assert len({result.text for result in results}) > 2
    counts = [result.token_counts.to_dict() for result in results]
    assert any(0 < count["vision_tokens"] < count["full_vision_tokens"] for count in counts)


@pytest.mark.filterwarnings("ignore")
def test_the_task_on_the_page_scores_what_the_benchmark_says(
    chat_class, model_folder, answered, tmp_path, monkeypatch
):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    own = [str(model_folder), f"--data={answered}", "--output=runs/lmms", "--threshold=0"]
    score = load_benchmark("lmms").main(own)
    results = simple_evaluate(
        "vico_pl",
        model_args=f"pretrained={model_folder},batch_size=4,threshold=0",
        tasks=[yaml.safe_load(TASK.read_text())["task"]],
        task_manager=TaskManager(include_path=str(TASK.parent)),
    )
    assert 0 < score < 1
    assert results["results"]["glyphs"]["exact_match,none"] == pytest.approx(score)
    counts = [sample["token_counts"][0] for sample in results["samples"]["glyphs"]]
    assert len(counts) == len(Path("runs/lmms/questions.jsonl").read_text().splitlines())
    assert all(count["vision_tokens"] * 4 == count["full_vision_tokens"] for count in counts)


@pytest.mark.filterwarnings("ignore")
def test_what_the_class_cannot_do_is_said(chat_class, tmp_path):
    folder = str(write_model_folder(tmp_path / "model", router_heads=None))
    with pytest.raises(ValueError, match="batch_size is auto; expected a whole number from 1"):
        chat_class(pretrained=folder, batch_size="auto")
    with pytest.raises(ValueError, match=r"threshold is 0\.5, but .* has no router"):
        chat_class(pretrained=folder, threshold=0.5)
    model = chat_class(pretrained=folder)
    with pytest.raises(NotImplementedError, match="only answers tasks of output_type generate_until"):
        model.loglikelihood([])
    with pytest.raises(ValueError, match="documents task 0: a message has a part of type 'audio'"):
        model.generate_until(requests_for(model, [[user({"type": "audio", "url": ""})]], [{}]))
