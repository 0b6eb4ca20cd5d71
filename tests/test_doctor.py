import os
import shutil
from collections import namedtuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import vico_pl.cli
from tests.helpers import TILE
from tests.sessions import write_model_folder
from vico_pl import doctor
from vico_pl.planning.memory import GIB

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def recipe(tmp_path, shards):
    """Write a recipe without any fault; settings change it."""
    folder = write_model_folder(tmp_path / "model")

    def write(**sections):
        model = {"path": str(folder), "router_heads": 4, **sections.pop("model", {})}
        data = {"sources": [{"path": str(shards)}], "tiling": {"tile_size": TILE}, **sections.pop("data", {})}
        settings = {"stage": "router", "run_dir": str(tmp_path / "run"), "model": model, "data": data}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**settings, **sections}))
        return path

    return write


@pytest.fixture
def findings(monkeypatch):
    """Examine a recipe on a sound machine without GPU; returns (check, finding) by "ok" and "problem"."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(8 * GIB, 0, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def examine(recipe=None):
        lines = []
        failed = doctor.examine(recipe, [], write=lines.append)
        found = {"ok": {}, "problem": {}}
        for verdict, name, finding in (line.split(": ", 2) for line in lines):
            found[verdict][name] = finding
        assert failed == bool(found["problem"])
        return found

    return examine


@pytest.fixture
def problems(findings):
    """Examine a recipe; returns the problems by the name of their check."""
    return lambda recipe=None: findings(recipe)["problem"]


def test_a_sound_machine_and_recipe_have_no_problem(findings, recipe):
    machine = ["python", "packages", "devices", "memory", "/dev/shm", "slurm"]
    assert [list(names) for names in findings().values()] == [machine, []]
    found = findings(recipe())
    of_recipe = [
        "recipe",
        "slurm",
        "workers",
        "shards",
        "model",
        "kernels",
        "run folder",
        "memory of the run",
    ]
    assert [list(names) for names in found.values()] == [[*machine[:-1], *of_recipe], []]


def test_the_command_fails_if_there_is_a_problem(findings, recipe, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["vico", "doctor", str(recipe(data={"num_workers": 99}))])
    with pytest.raises(SystemExit) as stop:
        vico_pl.cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 1
    assert [line.split(": ")[1] for line in lines if line.startswith("problem: ")] == ["workers"]


def test_a_check_that_fails_by_itself_stops_no_other(problems, recipe, monkeypatch):
    def broken():
        raise AttributeError("no such\nthing")

    monkeypatch.setattr(doctor, "check_python", broken)
    found = problems(recipe(data={"num_workers": 99}))
    assert set(found) == {"python", "workers"}
    assert "AttributeError: no such thing" in found["python"]


def test_a_doubtful_setting_is_reported_but_is_no_problem(findings, recipe):
    found = findings(recipe(optim={"warmup_steps": 10**6}))["ok"]["recipe"]
    assert "but optim.warmup_steps is 1000000: a run of" in found


def test_a_recipe_that_does_not_load_is_reported_once(problems, tmp_path):
    (tmp_path / "bad.yaml").write_text("stage: nonsense\nrun_dir: x\n")
    assert set(problems(tmp_path / "bad.yaml")) == {"recipe"}
    assert set(problems(tmp_path / "absent.yaml")) == {"recipe"}


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ("torch<2.1", "; pip install 'torch<2.1'"),
        ("webdataset-of-nobody>=1", "webdataset-of-nobody is not installed; pip install"),
    ],
)
def test_versions_that_do_not_work(problems, monkeypatch, needs, message):
    monkeypatch.setattr(doctor, "requires", lambda _: ["lightning", "torch", needs, 'peft; extra == "lora"'])
    assert message in problems()["packages"]


def test_an_old_python(problems, monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    assert "Python is 3.9.1, needed is >=3.11" in problems()["python"]


@pytest.mark.parametrize(("cuda", "message"), [(None, "built for the CPU"), ("12.8", "update the driver")])
def test_gpus_that_torch_does_not_see(problems, monkeypatch, cuda, message):
    exists = doctor.Path.exists
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor.Path, "exists", lambda path: "nvidia" in str(path) or exists(path))
    assert message in problems()["devices"]


def test_too_little_shared_memory_and_a_disk_that_is_full(problems, recipe, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, 0))
    found = problems(recipe())
    assert set(found) == {"/dev/shm", "run folder"}
    assert "--shm-size" in found["/dev/shm"]
    assert "lower trainer.keep_checkpoints" in found["run folder"]


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"num_nodes": 1, "devices": "4"}, "the job has 2 nodes, trainer.num_nodes is 1"),
        ({"num_nodes": 2, "devices": "2"}, "the job has 8 tasks, but the recipe takes 4"),
        ({"num_nodes": 2, "devices": "4"}, "job 7, 8 tasks"),
    ],
)
def test_a_slurm_job_has_to_fit_the_recipe(findings, recipe, monkeypatch, trainer, message):
    for name, value in {"JOB_ID": "7", "JOB_NUM_NODES": "2", "NTASKS": "8"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "srun, scontrol not found" in findings()["problem"]["slurm"]
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/any")
    found = findings(recipe(trainer=trainer))
    assert message in found["problem" if "the job has" in message else "ok"]["slurm"]


@pytest.mark.filterwarnings("ignore:.*once to count its samples")
@pytest.mark.parametrize("allow_pipe", [True, False])
def test_a_pipe_is_read_if_the_recipe_allows_it(problems, recipe, tmp_path, shards, allow_pipe):
    source = {"path": f"pipe:cat {next(shards.glob('*.tar'))}"}
    streaming = {"allow_pipe": allow_pipe, "cache_dir": str(tmp_path / "cache")}
    found = problems(recipe(data={"sources": [source], "streaming": streaming}))
    assert ("shards" in found) != allow_pipe


def damage_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("<IMG_CONTEXT>", "<IMAGE>"))


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["connectors.by_ratio.4.mlp.1.weight"]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (damage_tokenizer, "lacks the special token"),
        (drop_tensor, "missing connectors.by_ratio.4.mlp.1.weight"),
    ],
)
def test_model_folders_that_will_not_load(problems, recipe, tmp_path, fault, message):
    path = recipe()
    fault(tmp_path / "model")
    assert message in problems(path)["model"]


@pytest.mark.parametrize(
    ("settings", "check", "remedy"),
    [
        (
            {"model": {"attention": "flash"}, "trainer": {"precision": "bf16-mixed"}},
            "kernels",
            "model.attention=sdpa",
        ),
        (
            {"stage": "consistency", "consistency": {"kernel": "liger"}},
            "kernels",
            "consistency.kernel=native",
        ),
        ({"data": {"num_workers": 3}, "trainer": {"devices": "2"}}, "workers", "set data.num_workers=2"),
        ({"data": {"sources": [{"path": "nowhere"}]}}, "shards", "no such folder of shards"),
    ],
)
def test_settings_that_do_not_run_here(problems, recipe, settings, check, remedy):
    assert remedy in problems(recipe(**settings))[check]


def test_a_run_folder_without_the_right_to_write(problems, recipe, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be written to" in problems(recipe())["run folder"]


def test_a_run_that_takes_more_memory_than_there_is(problems, recipe, monkeypatch):
    monkeypatch.setattr(doctor, "_available_gib", lambda: 0.0)
    assert "'vico plan' shows what fits" in problems(recipe())["memory of the run"]


def test_names_on_the_hub_are_not_fetched(findings, recipe):
    found = findings(recipe(model={"path": "someone/something"}))
    assert "will be fetched" in found["ok"]["model"]
