"""One finished run of each stage, and the recipe of stage 3."""

import shutil

import pytest

from tests.support.runs import recipe, run
from tests.support.tiny import tiny_spec
from vico_pl.files import write_json
from vico_pl.model.families.base import CALIBRATION_NAME


@pytest.fixture(scope="session")
def runs(tmp_path_factory, shards):
    """A finished run of each stage, one from the other, and their recipes; of stage 3 only the recipe."""
    folder = tmp_path_factory.mktemp("runs")
    spec = tiny_spec()
    fresh = {"ratios": [4], "vision": spec.vision, "language": spec.language, "vocab_size": 384}
    run(recipe(folder, "pretrain", shards, model=fresh))
    base, policy = (str(folder / stage / "model") for stage in ("pretrain", "consistency"))
    run(recipe(folder, "consistency", shards, model={"path": base, "ratios": [4, 16]}))
    model = {"path": policy, "reference": base, "router_heads": 4}
    run(recipe(folder, "router", shards, model=model, router={"window": 20, "min_history": 8}))
    calibrated = shutil.copytree(folder / "router" / "model", folder / "calibrated")
    write_json({"threshold": 0.48, "curve": []}, calibrated / CALIBRATION_NAME)
    model = {"path": str(calibrated), "reference": base}
    (folder / "routed").mkdir()
    recipe(folder / "routed", "consistency", shards, model=model, consistency={"ratio_draw": "routed"})
    return folder
