import os
import shlex
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vico_pl import doctor
from vico_pl.planning.plan import GIB
from vico_pl.prepare import prepare_run
from vico_pl.trainer import CHATTER

Usage = namedtuple("Usage", "total used free")
MACHINE = ["python", "packages", "devices", "memory", "/dev/shm"]
RECIPE = ["recipe", "slurm", "workers", "shards", "model", "kernels", "run folder", "memory of the run"]


@pytest.fixture
def findings(vico, monkeypatch):
    """Run the command on a sound machine without GPU; returns (check, finding) by "ok" and "problem"."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(8 * GIB, 0, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def examine(*arguments):
        code, out, _ = vico("doctor", *arguments)
        found = {"ok": {}, "problem": {}}
        for verdict, name, finding in (line.split(": ", 2) for line in out.splitlines()):
            found[verdict][name] = finding
        assert code == bool(found["problem"])
        return found

    return examine


@pytest.fixture
def problems(findings, recipe):
    """Examine a recipe with some overrides; returns the problems by the name of their check."""
    return lambda *overrides: findings(recipe(), *overrides)["problem"]


def test_a_sound_machine_and_recipe_have_no_problem_and_nobody_else_speaks(findings, recipe, caplog):
    assert [list(names) for names in findings().values()] == [[*MACHINE, "slurm"], []]
    assert [list(names) for names in findings(recipe()).values()] == [[*MACHINE, *RECIPE], []]
    assert not [message for message in caplog.messages if message.startswith(CHATTER)]


def test_held_out_data_are_looked_at_before_training(findings, answered, tmp_path):
    found = findings("--data", answered, "--data", tmp_path)
    assert "scores of the answers" in found["ok"]["held-out data"]
    assert "no shard found" in found["problem"]["held-out data"]


def test_a_check_that_fails_by_itself_stops_no_other(problems, monkeypatch):
    def broken():
        raise AttributeError("no such\nthing")

    monkeypatch.setattr(doctor, "_check_packages", broken)
    found = problems("data.num_workers=99")
    assert set(found) == {"packages", "workers"}
    assert "AttributeError: no such thing" in found["packages"]


def test_a_recipe_that_does_not_load_is_reported_once(findings, tmp_path):
    (tmp_path / "bad.yaml").write_text("stage: nonsense\nrun_dir: x\n")
    assert set(findings(tmp_path / "bad.yaml")["problem"]) == {"recipe"}
    assert set(findings(tmp_path / "absent.yaml")["problem"]) == {"recipe"}


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ("torch<2.1", "; pip install 'torch<2.1'"),
        ("package-of-nobody>=1", "package-of-nobody is not installed; pip install"),
    ],
)
def test_versions_that_do_not_work(findings, monkeypatch, needs, message):
    monkeypatch.setattr(
        doctor, "requires", lambda _: ["lightning", "torch", needs, 'nothing; extra == "lora"']
    )
    assert message in findings()["problem"]["packages"]


@pytest.mark.parametrize(("cuda", "message"), [(None, "built for the CPU"), ("12.8", "update the driver")])
def test_gpus_that_torch_does_not_see(findings, monkeypatch, cuda, message):
    exists = Path.exists
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(Path, "exists", lambda path: "nvidia" in str(path) or exists(path))
    assert message in findings()["problem"]["devices"]


def test_a_machine_with_too_little_of_everything(problems, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, 0))
    monkeypatch.setattr(doctor, "_available_gib", lambda: 0.0)
    found = problems()
    assert set(found) == {"/dev/shm", "run folder", "memory of the run"}
    assert "--shm-size" in found["/dev/shm"]
    assert "lower trainer.keep_checkpoints" in found["run folder"]
    assert "'vico plan' shows what fits" in found["memory of the run"]


def test_a_run_folder_without_the_right_to_write(problems, monkeypatch):
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    assert "cannot be written to" in problems()["run folder"]


@pytest.mark.parametrize(
    ("nodes", "devices", "verdict", "message"),
    [
        (1, 4, "problem", "the job has 2 nodes, trainer.num_nodes is 1"),
        (2, 2, "problem", "the job has 8 tasks, but the recipe takes 4"),
        (2, 4, "ok", "job 7, 8 tasks"),
    ],
)
def test_a_slurm_job_has_to_fit_the_recipe(findings, recipe, monkeypatch, nodes, devices, verdict, message):
    for name, value in {"JOB_ID": "7", "JOB_NUM_NODES": "2", "NTASKS": "8"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "srun, scontrol not found" in findings()["problem"]["slurm"]
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/any")
    found = findings(recipe(), f"trainer.num_nodes={nodes}", f"trainer.devices='{devices}'")
    assert message in found[verdict]["slurm"]


@pytest.mark.filterwarnings("ignore:.*once to count its samples")
@pytest.mark.parametrize("allow_pipe", [True, False])
def test_a_pipe_is_read_if_the_recipe_allows_it(problems, tmp_path, shards, allow_pipe):
    source = f"data.sources=[{{path: 'pipe:cat {next(shards.glob('*.tar'))}'}}]"
    streaming = f"data.streaming={{allow_pipe: {allow_pipe}, cache_dir: {tmp_path}/cache}}"
    assert ("shards" in problems(source, streaming)) != allow_pipe


def test_a_run_folder_of_other_settings(problems, recipe):
    prepare_run(recipe(), [])
    assert "holds a run with other settings (seed: 0 -> 3)" in problems("seed=3")["run folder"]
    assert problems() == {}


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
def test_model_folders_that_will_not_load(problems, model, fault, message):
    fault(model)
    assert message in problems()["model"]


FLASH = "model.attention=flash trainer.precision=bf16-mixed data.num_workers=3 trainer.devices=\\'2\\'"
NO_GPU = "trainer.accelerator=gpu data.tiling.tile_size=64 data.sources=[{path:\\ nowhere}]"
LIGER = "stage=consistency consistency.kernel=liger model.path=someone/something"


@pytest.mark.parametrize(
    ("overrides", "verdict", "messages"),
    [
        (FLASH, "problem", {"kernels": "model.attention=sdpa", "workers": "set data.num_workers=2"}),
        (
            NO_GPU,
            "problem",
            {"kernels": "No supported gpu", "shards": "no such folder", "run folder": "tiles of 32 pixels"},
        ),
        (LIGER, "problem", {"kernels": "consistency.kernel=native"}),
        (LIGER, "ok", {"model": "will be fetched from the Hugging Face Hub"}),
        ("optim.warmup_steps=1000000", "ok", {"recipe": "but optim.warmup_steps is 1000000: a run of"}),
    ],
)
def test_settings_are_compared_with_the_machine(findings, recipe, overrides, verdict, messages):
    found = findings(recipe(), *shlex.split(overrides))[verdict]
    for check, message in messages.items():
        assert message in found[check]
