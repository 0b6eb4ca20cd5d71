"""`vico audit` on runs that really trained."""

import json
import shutil

import pytest

from tests.support.runs import STEPS, recipe, run
from tests.support.tiny import record, tiny_spec
from vico_pl.callbacks.records import unpack_positions
from vico_pl.data.module import RankBatches
from vico_pl.data.shards.reader import write_index, write_shard


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards):
    """The recipe and the folder of a finished run on a mixture, one of whose records is bad."""
    folder = tmp_path_factory.mktemp("audited")
    records = [(str(i), record(text=f"<image>\n{i}?").files) for i in range(4)]
    write_shard(folder / "few" / "train-000000.tar", [*records, ("bad", {"json": b"{"})])
    write_index(folder / "few")
    spec = tiny_spec()
    model = {"ratios": [4], "vision": spec.vision, "language": spec.language, "vocab_size": 384}
    path = recipe(folder, "pretrain", shards, model=model)
    sources = f"data.sources=[{{path: {shards}, weight: 1}}, {{path: {folder}/few, weight: 0.5}}]"
    run(path, sources)
    return path, sources, folder / "pretrain"


def test_a_finished_run_passes(vico, trained):
    code, out, err = vico("audit", trained[2])
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["source", "epoch", "samples", "used", "bad", "missing", "twice"]
    rows = [list(map(int, line.split()[3:])) for line in out.splitlines()[1:-1]]
    assert sum(used + bad for used, bad, _, _ in rows) == 4 * STEPS
    assert any(bad for _, bad, _, _ in rows)
    assert out.splitlines()[-1].startswith(f"{STEPS} steps in 1 attempt: every sample of each source")


def test_a_finished_run_whose_log_ends_early_fails_and_names_what_is_missing(vico, trained, tmp_path):
    shutil.copytree(trained[2], tmp_path, dirs_exist_ok=True)
    log = tmp_path / "samples-rank-0.jsonl"
    *lines, last = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines))
    code, out, err = vico("audit", tmp_path)
    assert (code, out.splitlines()[-1]) == (1, f"{STEPS} steps in 1 attempt: 4 faults")
    lost, named = json.loads(last), [line.split(": ")[0] for line in err.splitlines()]
    assert len(set(named)) == len(unpack_positions(lost["used"])) + len(lost.get("bad", []))
    assert set(named) >= set(lost.get("bad", []))


def test_a_loader_that_passes_over_a_step_is_found_out(vico, trained, tmp_path, monkeypatch):
    path, sources, _ = trained
    rank_positions = RankBatches.rank_positions
    with monkeypatch.context() as patch:
        patch.setattr(RankBatches, "rank_positions", lambda self, step: rank_positions(self, step + 1))
        run(path, sources, f"run_dir={tmp_path}")
    code, _, err = vico("audit", tmp_path)
    assert code == 1
    assert "step 0: due but not used" in err


def test_what_is_no_run_is_refused(refused, trained, tmp_path):
    assert refused("audit", tmp_path) == f"{tmp_path}: no config.yaml; expected the folder of a run"
    (tmp_path / "config.yaml").write_text((trained[2] / "config.yaml").read_text())
    assert refused("audit", tmp_path).startswith(f"{tmp_path}: no samples-rank-0.jsonl")
