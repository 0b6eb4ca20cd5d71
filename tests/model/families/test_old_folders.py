"""A folder written before families and routers had names, in November 2026, is read like a new one."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from tests.support.tiny import batch_of, encoded_sample, tiny_model
from vico_pl.model.families.base import CONFIG_NAME, PROCESSING_NAME
from vico_pl.model.families.folder import export, load_model, open_folder, save_model
from vico_pl.model.router import DEFAULT_ROUTER, ROUTERS, RoutingRule

FOLDER = Path(__file__).parents[2] / "fixtures" / "model-2026-11"


@torch.no_grad()
def test_an_old_folder_gives_the_output_that_was_recorded_with_it():
    expected = json.loads((FOLDER / "expected.json").read_text())
    model, batch = load_model(FOLDER), batch_of(encoded_sample(1, images=(2,), answers=(3,)))
    features = model.encode_tiles(batch.tiles)
    states = model.response_states(batch, features, model.full_ratios(batch))
    # Not bit for bit: another machine may order sums differently.
    torch.testing.assert_close(states, torch.tensor(expected["response_states"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.router(features), torch.tensor(expected["router"]), rtol=1e-5, atol=1e-5)


def test_settings_and_threshold_of_an_old_folder_are_read():
    contents = open_folder(FOLDER).contents
    assert contents.rule == RoutingRule(threshold=0.5)
    assert contents.processing == json.loads((FOLDER / PROCESSING_NAME).read_text())
    assert contents.spec.router == DEFAULT_ROUTER


def test_an_old_folder_is_written_again_with_marks_for_transformers(tmp_path):
    processing = open_folder(FOLDER).contents.processing
    save_model(load_model(FOLDER, dtype=None), tmp_path / "saved", processing=processing)
    export(FOLDER, tmp_path / "exported", layout="ours")
    marks = {"model_type": "vico_pl", "transformers_version": transformers.__version__}
    marks["tokenizer"] = {"model_type": ""}
    for folder in ("saved", "exported"):
        for name in (PROCESSING_NAME, "model.safetensors"):
            assert (tmp_path / folder / name).read_bytes() == (FOLDER / name).read_bytes(), name
        config = json.loads((tmp_path / folder / CONFIG_NAME).read_text())
        assert config == json.loads((FOLDER / CONFIG_NAME).read_text()) | marks


def test_transformers_opens_a_tokenizer_of_ours_without_a_word(tmp_path, tokenizer, caplog, monkeypatch):
    tokenizer.save_pretrained(tmp_path)
    save_model(tiny_model(), tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [caplog.handler])
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == len(tokenizer)
    assert caplog.messages == []


class MeanRouter(nn.Module):
    def __init__(self, width, *, num_ratios, num_heads):
        super().__init__()
        self.classify = nn.Linear(width, num_ratios)

    def forward(self, features):
        return self.classify(features.mean(1))


def test_a_model_with_another_router_comes_back_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(ROUTERS, "mean", MeanRouter)
    model = tiny_model(router="mean", router_heads=1)
    save_model(model, tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["router"] == "mean"
    restored = load_model(tmp_path)
    assert asdict(restored.spec) == asdict(model.spec)
    assert torch.equal(restored.router.classify.weight, model.router.classify.weight)


def test_an_unknown_router_is_refused():
    with pytest.raises(ValueError, match="router is 'gru'; expected one of vir"):
        tiny_model(router="gru")
