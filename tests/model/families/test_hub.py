from pathlib import Path

import pytest
from huggingface_hub import ModelInfo
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects

from vico_pl.model.families import hub
from vico_pl.model.families.folder import TEMPLATE_FILES

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
RELEASED = [
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"),
    *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "merges.txt", "template.jinja"),
]
LEFT_OUT = [
    *("modeling_internvl_chat.py", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"),
    *("README.md", "examples/image1.jpg"),
]


@pytest.fixture(autouse=True)
def calls(monkeypatch, tmp_path):
    """What was asked of a Hub that knows every repository."""
    asked = []

    def download(repo, **options):
        asked.append((repo, options))
        return str(tmp_path / "snapshot")

    def info(_, repo, *, revision):
        asked.append((repo, {"revision": revision}))
        return ModelInfo(id=repo, sha=COMMIT)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub.HfApi, "model_info", info)
    return asked


@pytest.mark.parametrize("path", ["model", "./a/b", "../a", "/a", "~/a", "a/b/c", "", "/srv/models"])
def test_anything_else_is_a_path(path):
    assert not hub.is_hub_id(path)


def test_a_folder_that_is_there_is_no_repository(tmp_path, monkeypatch):
    (tmp_path / "runs/last").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert (hub.is_hub_id("runs/last"), hub.is_hub_id("runs/first")) == (False, True)


@pytest.mark.parametrize(
    ("path", "begun_with", "expected", "revisions"),
    [
        ("a/b", None, f"a/b@{COMMIT}", [None]),
        ("a/b@main", None, f"a/b@{COMMIT}", ["main"]),
        (f"a/b@{COMMIT}", None, f"a/b@{COMMIT}", []),
        ("folder", None, "folder", []),
        ("a/b", f"a/b@{OTHER}", f"a/b@{OTHER}", []),
        ("a/b", f"a/bc@{OTHER}", f"a/b@{COMMIT}", [None]),
        ("a/b@main", f"a/b@{OTHER}", f"a/b@{COMMIT}", ["main"]),
    ],
)
def test_a_name_is_pinned_to_its_commit_or_that_which_the_run_has_begun_with(
    calls, path, begun_with, expected, revisions
):
    assert hub.pinned(path, begun_with) == expected
    assert calls == [("a/b", {"revision": revision}) for revision in revisions]


def test_a_repository_without_a_commit_is_refused(monkeypatch):
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: ModelInfo(id="a/b"))
    with pytest.raises(ValueError, match="a/b: the Hub names no commit for it"):
        hub.pinned("a/b")


def test_python_files_and_pickled_weights_are_not_fetched(calls):
    hub.local_folder("a/b")
    (patterns,) = [options["allow_patterns"] for _, options in calls]
    assert list(filter_repo_objects(RELEASED + LEFT_OUT, allow_patterns=patterns)) == RELEASED


def test_of_a_template_code_is_fetched_and_no_weights(calls):
    hub.local_folder("a/b", TEMPLATE_FILES)
    (patterns,) = [options["allow_patterns"] for _, options in calls]
    names = ["modeling.py", "tokenizer.json", "model.safetensors", "calibration.json"]
    assert list(filter_repo_objects(names, allow_patterns=patterns)) == ["modeling.py", "tokenizer.json"]


def test_the_name_of_a_repository_stands_for_its_snapshot_and_a_path_for_itself(calls, tmp_path):
    assert hub.local_folder(f"a/b@{COMMIT}") == hub.local_folder("a/b") == tmp_path / "snapshot"
    assert (hub.local_folder(str(tmp_path)), hub.local_folder("model")) == (tmp_path, Path("model"))
    assert [(repo, options["revision"]) for repo, options in calls] == [("a/b", COMMIT), ("a/b", None)]


UNREACHABLE = [
    HTTPError("[Errno 101] Network is unreachable"),  # of the HTTP library; its subclasses are no OSError
    LocalEntryNotFoundError("Cannot find the requested files\nin the local cache"),
    OfflineModeIsEnabled("offline mode is enabled"),
    ConnectionError("refused"),
    TimeoutError(),
]


@pytest.mark.parametrize("error", UNREACHABLE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("ask", [hub.pinned, hub.local_folder])
def test_a_hub_that_cannot_be_reached_is_reported_in_one_sentence(monkeypatch, ask, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    monkeypatch.setattr(hub.HfApi, "model_info", fail)
    expected = r"^a/b@v1: no such folder, and it cannot be had from the Hugging Face Hub \(.+\)$"
    with pytest.raises(ValueError, match=expected) as caught:
        ask("a/b@v1")
    assert len(str(caught.value).splitlines()) == 1
