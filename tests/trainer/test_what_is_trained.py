"""Runs that train parts or adapters: model folders, checkpoints, shared weights, recomputation."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.support.runs import break_run, differing, run, watch_steps, weights
from tests.support.tiny import PLACEHOLDER_ID, batch_of, mixed_samples
from vico_pl.callbacks.checkpoints import newest_checkpoint
from vico_pl.config import load_config
from vico_pl.model.blocks import cast_trained
from vico_pl.model.families.folder import load_model
from vico_pl.prepare import FolderModels, is_finished
from vico_pl.stages import build_stage

SPLIT = ("trainer.strategy=fsdp", "model.trainable=[connectors,language]")
LORA = ("model.trainable=[connectors,lora]", "model.lora={rank: 4, dropout: 0.2}")


@pytest.fixture(scope="module")
def lora_run(runs, tmp_path_factory):
    """The folder of a finished run that trained connectors and adapters, and its stage."""
    run_dir, stages = tmp_path_factory.mktemp("lora"), []
    with pytest.MonkeyPatch.context() as patch:
        watch_steps(patch, stages.append)
        run(runs / "consistency.yaml", f"run_dir={run_dir}", *LORA)
    return run_dir, stages[-1]


@torch.no_grad()
def states(model):
    """Return response states of a batch with the placeholder id of the model."""
    batch = batch_of(*mixed_samples())
    ids = torch.where(batch.input_ids == PLACEHOLDER_ID, model.spec.placeholder_id, batch.input_ids)
    batch = replace(batch, input_ids=ids)
    return model.response_states(batch, model.encode_tiles(batch.tiles), model.full_ratios(batch))


def test_a_run_with_adapters_writes_a_model_like_any_other(runs, lora_run):
    run_dir, stage = lora_run
    assert weights(run_dir).keys() == weights(runs / "consistency").keys()
    trained = stage.model.eval()
    torch.testing.assert_close(states(load_model(run_dir / "model")), states(trained), rtol=0, atol=1e-5)


def test_a_run_with_adapters_holds_and_saves_one_copy_of_what_is_frozen(lora_run):
    run_dir, stage = lora_run
    assert stage.reference.model.language is stage.model.language
    assert stage.reference.model.vision is stage.model.vision
    assert {name.split(".")[0] for name, _ in stage.named_parameters()} == {"model"}
    checkpoint = torch.load(newest_checkpoint(run_dir), weights_only=True)
    assert checkpoint["state_dict"].keys() == {n for n, p in stage.named_parameters() if p.requires_grad}


def test_weights_to_be_split_stay_as_stored_until_each_rank_has_its_part(runs):
    """Otherwise every rank would hold all trained weights in float32."""
    recipe = load_config(runs / "consistency.yaml", ["model.frozen_dtype=bfloat16", *SPLIT])
    stage = build_stage(recipe, FolderModels(recipe))
    assert {tensor.dtype for tensor in stage.parameters()} == {torch.bfloat16}
    cast_trained(stage.model, torch.float32)
    types = {name.split(".")[1]: p.dtype for name, p in stage.named_parameters()}
    assert types == {"vision": torch.bfloat16, "connectors": torch.float32, "language": torch.float32}


@pytest.mark.parametrize(
    ("trained", "parts"),
    [(LORA, {"connectors", "language"}), (("model.trainable=[vision]",), {"vision", "connectors"})],
    ids=["adapters", "a part"],
)
def test_a_partly_frozen_run_that_broke_ends_with_the_weights_of_an_unbroken_one(
    runs, tmp_path, monkeypatch, trained, parts
):
    path, broken, unbroken = runs / "consistency.yaml", tmp_path / "broken", tmp_path / "unbroken"
    run(path, f"run_dir={unbroken}", *trained)
    break_run(monkeypatch, path, f"run_dir={broken}", *trained)
    run(path, f"run_dir={broken}", *trained)
    assert differing(broken, unbroken) == set()
    # Connectors, as that of ratio 16 is new.
    assert {name.split(".")[0] for name in differing(broken, runs / "pretrain")} == parts


def test_a_finished_run_with_adapters_can_write_its_model_again(runs, lora_run):
    run_dir, _ = lora_run
    before = weights(run_dir)
    (run_dir / "model" / "config.json").unlink()
    run(runs / "consistency.yaml", f"run_dir={run_dir}", *LORA)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run_dir).items())


@pytest.mark.parametrize("trained", [(), LORA], ids=["parts", "adapters"])
def test_recomputing_activations_changes_no_weight(runs, tmp_path, trained):
    plain, recomputed = tmp_path / "plain", tmp_path / "recomputed"
    for folder, override in ((plain, "false"), (recomputed, "true")):
        switch = f"trainer.activation_checkpointing={override}"
        run(runs / "consistency.yaml", f"run_dir={folder}", "trainer.max_steps=2", switch, *trained)
    assert differing(plain, recomputed) == set()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # see test_blocks.py
def test_a_run_goes_on_compiled_where_it_began_uncompiled(runs, tmp_path, monkeypatch):
    programs = []

    def backend(graph, _):
        programs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    path, overrides = runs / "consistency.yaml", (f"run_dir={tmp_path}", *LORA)
    break_run(monkeypatch, path, *overrides)
    assert not programs
    (tmp_path / "config.yaml").unlink()  # which holds a run to its settings
    run(path, *overrides, "trainer.compile=true")
    assert programs
    assert is_finished(tmp_path)


@pytest.mark.parametrize(
    "settings", [("model.attention=flash", "trainer.precision=bf16-mixed"), ("consistency.kernel=liger",)]
)
def test_a_kernel_for_gpus_on_a_cpu_is_reported_before_training(runs, tmp_path, settings):
    with pytest.raises(ValueError, match=r"is '(flash|liger)', .* but this run is on cpu"):
        run(runs / "consistency.yaml", f"run_dir={tmp_path}", *settings)


@pytest.mark.parametrize(
    ("stage", "setting", "message"),
    [
        ("consistency", "model.lora={rank: 4}", "model.lora has no effect"),
        ("consistency", "optim.warmup_steps=99", "never reaches optim.lr"),
        ("router", "trainer.activation_checkpointing=true", "trainer.activation_checkpointing has no effect"),
    ],
)
def test_a_setting_without_effect_warns_before_training(runs, tmp_path, stage, setting, message):
    with pytest.warns(UserWarning, match=message):
        run(runs / f"{stage}.yaml", f"run_dir={tmp_path}", "trainer.max_steps=1", setting)


@pytest.mark.filterwarnings("ignore:model.reference is not set")
def test_stage_router_labels_by_one_copy_where_policy_and_reference_are_the_same(runs, tmp_path, monkeypatch):
    stages = []
    watch_steps(monkeypatch, stages.append)
    run(runs / "router.yaml", f"run_dir={tmp_path}", "trainer.max_steps=1", "model.reference=null")
    assert stages[0].reference.model.language is stages[0].policy.model.language
