"""The plug-in for lmms-eval; tests that need lmms-eval itself skip without it."""

import ast
import importlib
import json
import tomllib
from pathlib import Path

import pytest
import yaml
from PIL import Image

import vico_pl
from tests.support.folders import write_model_folder
from tests.support.scripts import BENCHMARKS, load_benchmark
from vico_pl.inference.lmms import generation_settings, manifest, read_messages
from vico_pl.inference.predictor import Predictor

ROOT = BENCHMARKS.parent
TASK = ROOT / "docs" / "lmms_eval" / "glyphs.yaml"
CLASS = "vico_pl.inference.lmms_model.VicoChat"
SETTINGS = {"max_new_tokens": 6, "until": []}


def image(number):
    return {"type": "image", "url": f"{number}.png"}


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


# --- Without lmms-eval --------------------------------------------------------------------------------------


def test_the_entry_point_and_the_class_it_names_are_there():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = points["lmms_eval.models"]["vico_pl"].partition(":")
    assert getattr(importlib.import_module(module), name) is manifest
    path = Path(vico_pl.__file__).parents[1] / (CLASS.rpartition(".")[0].replace(".", "/") + ".py")
    classes = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    assert CLASS.rpartition(".")[2] in classes


@pytest.mark.parametrize(
    ("messages", "images", "texts"),
    [
        pytest.param([user(image(1), text(" How many? "))], [1], ["<image>\nHow many?"], id="one image"),
        pytest.param([user(text("2 + 2?"))], [], ["2 + 2?"], id="text only"),
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


# --- With lmms-eval -----------------------------------------------------------------------------------------


@pytest.fixture
def lmms_eval():
    return pytest.importorskip("lmms_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that compresses some tiles."""
    return write_model_folder(tmp_path_factory.mktemp("lmms") / "model", threshold=0.5)


def requests_for(model, conversations, settings):
    """Requests of a task whose documents are their messages."""
    from lmms_eval.api.instance import Instance

    model.task_dict["task"] = {"test": conversations}
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    return [
        Instance("generate_until", ("", lambda doc: doc, given, number, "task", "test"), number, metadata)
        for number, given in enumerate(settings)
    ]


@pytest.mark.filterwarnings("ignore")  # of lmms-eval and what it imports
def test_requests_get_the_answers_that_the_predictor_gives_alone(lmms_eval, folder, tmp_path):
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    arguments = f"pretrained={folder},batch_size=3,max_new_tokens=4"
    model = registry.get_model_class("vico_pl").create_from_arg_string(arguments, {"batch_size": 1})
    pictures = [Image.effect_noise((64, 32 * n), 90) for n in (1, 2, 3)]
    parts = [{"type": "image", "url": picture} for picture in pictures]
    conversations = [
        [user(parts[number % 3], text(f"What is {letter}?"))] for number, letter in enumerate("ABCDE")
    ]
    conversations += [[user(text("What is F?"))], [user(*parts, text("What is G?"))]]
    conversations += [[*conversations[0], {"role": "assistant", "content": "red"}, user(text("And H?"))]]
    settings = [{"max_new_tokens": 6} if number % 2 else {"until": ["e"]} for number in range(8)]
    results = model.generate_until(requests_for(model, conversations, settings))
    predictor = Predictor.load(folder)
    for conversation, given, result in zip(conversations, settings, results, strict=True):
        images, texts = read_messages(conversation)
        arguments = generation_settings(given, max_new_tokens=4)
        (answer,) = predictor.generate([images], [texts], **arguments)
        assert result.text == answer.text
        assert result.token_counts.to_dict() == {
            "input_tokens": answer.prompt_tokens,
            "output_tokens": answer.new_tokens,
            "vision_tokens": answer.vision_tokens,
            "full_vision_tokens": answer.full_vision_tokens,
        }
    assert len({result.text for result in results}) > 2
    with pytest.raises(NotImplementedError, match="only answers tasks of output_type generate_until"):
        model.loglikelihood([])
    with pytest.raises(ValueError, match="task, document 0: a message has a part of type 'audio'"):
        model.generate_until(requests_for(model, [[user({"type": "audio", "url": ""})]], [{}]))


@pytest.mark.filterwarnings("ignore")
def test_the_task_on_the_page_scores_what_the_benchmark_says(
    lmms_eval, folder, shards, tmp_path, monkeypatch
):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    score = load_benchmark("lmms").main([str(folder), f"--data={shards}", "--output=runs/lmms", "--images=4"])
    lines = Path("runs/lmms/questions.jsonl").read_text().splitlines()
    results = simple_evaluate(
        "vico_pl",
        model_args=f"pretrained={folder},batch_size=4,threshold=1.1",
        tasks=[yaml.safe_load(TASK.read_text())["task"]],
        task_manager=TaskManager(include_path=str(TASK.parent)),
    )
    assert results["results"]["glyphs"]["exact_match,none"] == pytest.approx(score)
    counts = [sample["token_counts"][0] for sample in results["samples"]["glyphs"]]
    assert len(counts) == len(lines)
    assert all(count["vision_tokens"] == count["full_vision_tokens"] for count in counts)
    assert json.loads(lines[0])["image"] == "runs/lmms/images/00000000.png"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changes", "given", "reason"),
    [
        ({}, {"batch_size": "auto"}, "batch_size is auto; expected a whole number from 1"),
        ({"router_heads": None}, {"threshold": 0.5}, "threshold is 0.5, but .* has no router"),
    ],
)
def test_arguments_of_the_model_are_checked(lmms_eval, tmp_path, changes, given, reason):
    from vico_pl.inference.lmms_model import VicoChat

    with pytest.raises(ValueError, match=reason):
        VicoChat(pretrained=str(write_model_folder(tmp_path / "model", **changes)), **given)
