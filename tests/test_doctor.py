from collections import namedtuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import vico_pl.cli
from tests.helpers import TILE
from tests.sessions import write_model_folder
from vico_pl import doctor
from vico_pl.config import load_config

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
def problems(monkeypatch):
    """Examine a recipe; returns the problems by the name of their check."""
    monkeypatch.setattr(doctor, "num_cores", lambda: 4)
    monkeypatch.setattr(doctor, "shared_gib", lambda: 8.0)

    def examine(recipe=None):
        found = [doctor.find(name, check) for name, check in doctor.checks(recipe, [])]
        return {finding.name: finding.detail for finding in found if finding.problem}

    return examine


def test_a_sound_recipe_has_no_problem(problems, recipe):
    assert problems(recipe()) == {}
    assert problems() == {}


def test_a_line_is_written_for_each_check(problems, recipe):
    lines = []
    assert not doctor.examine(recipe(), [], write=lines.append)
    assert len(lines) == len(list(doctor.checks(recipe(), [])))
    assert all(line.startswith("ok: ") for line in lines)


def test_the_command_fails_if_there_is_a_problem(problems, recipe, monkeypatch, capsys):
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


def test_a_doubtful_setting_is_reported_but_is_no_problem(recipe):
    found = dict(doctor.checks(recipe(optim={"warmup_steps": 10**6}), []))
    assert "but optim.warmup_steps is 1000000: a run of" in found["recipe"]()


def test_a_recipe_that_does_not_load_is_reported_once(problems, tmp_path):
    (tmp_path / "bad.yaml").write_text("stage: nonsense\nrun_dir: x\n")
    assert set(problems(tmp_path / "bad.yaml")) == {"recipe"}
    assert set(problems(tmp_path / "absent.yaml")) == {"recipe"}


@pytest.mark.parametrize(
    ("package", "number", "message"),
    [
        ("lightning", "2.6.2", "lightning is 2.6.2; pip install"),
        ("torch", "2.1.0", "torch is 2.1.0; pip install 'torch"),
        ("webdataset", None, "webdataset is not installed"),
    ],
)
def test_versions_that_do_not_work(problems, monkeypatch, package, number, message):
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: number if name == package else installed(name))
    assert message in problems()["packages"]


def test_an_old_python(problems, monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    assert "Python is 3.9.1, needed is >=3.11" in problems()["python"]


@pytest.mark.parametrize(("cuda", "message"), [(None, "built for the CPU"), ("12.8", "update the driver")])
def test_gpus_that_torch_does_not_see(problems, monkeypatch, cuda, message):
    exists = doctor.Path.exists
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor.Path, "exists", lambda path: "nvidia" in str(path) or exists(path))
    assert message in problems()["devices"]


def test_too_little_shared_memory(problems, monkeypatch):
    monkeypatch.setattr(doctor, "shared_gib", lambda: 0.06)
    assert "--shm-size" in problems()["/dev/shm"]


def test_more_workers_than_cores(problems, recipe):
    found = problems(recipe(data={"num_workers": 3}, trainer={"devices": "2"}))
    assert "set data.num_workers=2" in found["workers"]


@pytest.fixture
def job(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/any")
    for name, value in {"JOB_ID": "7", "JOB_NUM_NODES": "2", "NTASKS": "8"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"num_nodes": 1, "devices": "4"}, "the job has 2 nodes, trainer.num_nodes is 1"),
        ({"num_nodes": 2, "devices": "2"}, "the job has 8 tasks, but the recipe takes 4"),
    ],
)
def test_a_slurm_job_that_does_not_fit_the_recipe(problems, job, recipe, trainer, message):
    assert message in problems(recipe(trainer=trainer))["slurm"]


def test_a_slurm_job_that_fits(job, recipe):
    config = load_config(recipe(trainer={"num_nodes": 2, "devices": "4"}), [])
    assert doctor.check_slurm(config) == "job 7, 8 tasks"


def test_slurm_without_its_commands(problems, job, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert "srun, scontrol not found" in problems()["slurm"]


def test_shards_that_are_absent(problems, recipe):
    assert "no such folder of shards" in problems(recipe(data={"sources": [{"path": "nowhere"}]}))["shards"]


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
    ("settings", "remedy"),
    [
        ({"model": {"attention": "flash"}, "trainer": {"precision": "bf16-mixed"}}, "model.attention=sdpa"),
        ({"stage": "consistency", "consistency": {"kernel": "liger"}}, "consistency.kernel=native"),
    ],
)
def test_kernels_that_do_not_run_here(problems, recipe, monkeypatch, settings, remedy):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert remedy in problems(recipe(**settings))["kernels"]


def test_a_run_folder_without_the_right_to_write(problems, recipe, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert "cannot be written to" in problems(recipe())["run folder"]


def test_a_disk_that_is_full(problems, recipe, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(1, 1, 0))
    assert "lower trainer.keep_checkpoints" in problems(recipe())["run folder"]


def test_a_run_that_takes_more_memory_than_there_is(problems, recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_available_gib", lambda: 0.0)
    assert "'vico plan' shows what fits" in problems(recipe())["memory of the run"]


def test_names_on_the_hub_are_not_fetched():
    assert "will be fetched" in doctor.check_model("someone/something")
