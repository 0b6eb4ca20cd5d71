"""Recipes of a tiny model without weights."""

import pytest
import torch

from tests.support.tiny import tiny_spec
from vico_pl.config import parse_config
from vico_pl.planning.sources import ModelShape


@pytest.fixture
def shape():
    return ModelShape(name="tiny", spec=tiny_spec(ratios=[4], router_heads=None), dtype=torch.bfloat16)


@pytest.fixture
def config():
    """Build a checked configuration: `config("router", model={...})` adds to it."""

    def make(stage="consistency", **sections):
        model = {
            "path": "start",
            "router_heads": 4 if stage == "router" else None,
            **sections.pop("model", {}),
        }
        data = {"sources": [{"path": "nowhere"}], **sections.pop("data", {})}
        settings = {"stage": stage, "run_dir": "run", "model": model, "data": data, **sections}
        return parse_config(settings, name="test")

    return make
