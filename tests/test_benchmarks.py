"""Each benchmark runs at a tiny size, compares equal work, and the page shows its recorded figures."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.support.scripts import BENCHMARKS, load_benchmark

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")

harness, kl, labels, step, inference, scaling, monitoring, start, gpu, saving = map(
    load_benchmark,
    ("harness", "kl", "labels", "step", "inference", "scaling", "monitoring", "start", "gpu", "checkpoints"),
)
data, pipeline, images, shuffle, models = map(
    load_benchmark, ("data", "data_pipeline", "data_images", "data_shuffle", "models")
)
RESULTS, PAGE = BENCHMARKS / "results", BENCHMARKS / "README.md"
RECORDED = sorted(
    path.stem for path in RESULTS.glob("*.json") if path.name not in (harness.SUMMARY, harness.STUDY)
)
TINY_LOSS = {"tokens": 7, "vocab": 512, "width": 32, "chunk": 3}
TINY_MODEL = {
    "tile_size": 56,  # 4 vision tokens or 1
    "vision": {"width": 64, "layers": 1},
    "language": {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "heads": (2, 1)},
    "vocab_size": 512,
}
TINY_DATA = {
    "rounds": 1,
    "images": 1,
    "loaders": 1,
    "steps": 2,
    "epochs": 3,
    "raw_shards": 2,
    "raw_samples": 3,
    "many_shards": 3,
    "many_samples": 200,
    "photos": 70,
    "watched": 64,
}


def results_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def run_benchmark(benchmark, name, folder, **settings):
    """Run a benchmark at tiny size with a page and results of its own; returns its results and the page."""
    page, results = folder / "README.md", folder / "results"
    shutil.copy(PAGE, page)
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    benchmark.main([*arguments, f"--output={results}", f"--page={page}"])
    return results_of(results, name), page.read_text()


# --- Harness and recorded figures ---------------------------------------------------------------------------


def test_the_summary_holds_the_recorded_figures():
    summary = results_of(RESULTS, "summary")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", summary["date"])
    assert {"python", "torch", "vico-pl"} <= set(summary["versions"])
    assert summary == harness.summarise(RESULTS)


@pytest.mark.parametrize("name", RECORDED)
def test_the_page_shows_recorded_figures_with_their_goals(name):
    benchmark, details = load_benchmark(name), results_of(RESULTS, name)
    assert benchmark.tables(details) in PAGE.read_text()
    for figure, values in details["figures"].items():
        goal = benchmark.GOALS[figure]
        assert values == {"measured": values["measured"], "goal": goal and goal.value}


def test_recorded_figures_follow_from_the_recorded_measurements():
    found = {name: results_of(RESULTS, name) for name in ("kl", "data", "labels", "step", "inference")}
    shape = kl.Shape(**found["kl"]["shape"])
    assert shape == kl.Shape(), "recorded at full size"
    assert found["data"]["size"] == vars(data.Size()), "recorded at full size"
    predicted, share = (found["inference"][key] for key in ("predicted_speedup", "router_share"))
    recomputed = {
        "kl": kl.figures(found["kl"]["rounds"], found["kl"]["errors"], shape),
        "data": data.figures(found["data"]),
        "labels": labels.figures(found["labels"]["operations"], found["labels"]["timing"]),
        "step": step.figures(found["step"]),
        "inference": inference.figures(found["inference"]["cpu_s"], predicted=predicted, share=share),
    }
    assert recomputed == {name: details["figures"] for name, details in found.items()}


# --- One tiny run of each -----------------------------------------------------------------------------------


def test_the_loss(tmp_path, monkeypatch):
    apart = kl.measure_apart
    monkeypatch.setattr(kl, "available", lambda: ["floor", "ours", "naive"])
    monkeypatch.setattr(
        kl, "measure_apart", lambda *which: (apart if "ours" in which else kl.measure)(*which)
    )
    details, page = run_benchmark(kl, "kl", tmp_path, **TINY_LOSS, rounds=1)
    assert details["shape"] == TINY_LOSS
    assert [set(round_) for round_ in details["rounds"]] == [{"floor", "ours", "naive"}]
    assert details["errors"]["ours_value"] < 0.01
    assert kl.tables(details) in page
    assert page.startswith("# Benchmarks"), "the text around the tables stays"


def test_the_data_path(tmp_path, monkeypatch):
    def run_here(script, name, folder):
        return {"distinct_shards": shuffle.distinct_shards(shuffle.LOADERS[name](folder))}

    monkeypatch.setattr(pipeline, "measure_memory", pipeline.watch_memory)  # in this process
    monkeypatch.setattr(data, "keep_freed_memory", lambda: None)  # other tests measure memory
    monkeypatch.setattr(shuffle.harness, "measure_apart", run_here)
    details, page = run_benchmark(data, "data", tmp_path, **TINY_DATA)
    assert list(details["figures"]) == list(data.GOALS)
    assert details["size"] == TINY_DATA
    assert data.figures(details) == details["figures"]
    assert data.tables(details) in page


def test_tiles_equal_those_of_internvls_recipe():
    content = images.draw_jpeg(0)
    runs = images.runs_of(content, 5)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.MEAN, images.STD))
    difference = ((runs["internvl"](content) * std + mean) * 255 - runs["ours"](content).float()).abs()
    assert difference.max() < 2.5
    assert difference.mean() < 1


def test_labels_equal_those_of_one_pass_per_tile():
    found = labels.measure_time(tiles=3, rounds=1, **TINY_MODEL)
    assert found["difference"] < 1e-5
    assert len(found["cpu_s"]) == 1


def test_a_step_and_a_plain_one_have_the_same_loss_and_gradients():
    text = models.Text(system=3, question=4, response=5)
    steps = step.Steps(models.draw_batch(models.spec_of(**TINY_MODEL), [3, 1, 0], text), **TINY_MODEL)

    def gradients(run):
        loss = run()
        return loss, {name: p.grad for name, p in steps.policy.named_parameters() if p.grad is not None}

    ours, plain = gradients(steps.ours), gradients(steps.plain)
    assert ours[0] > 0.01
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_routed_inference(monkeypatch):
    monkeypatch.setattr(inference, "SHAPE", TINY_MODEL)
    monkeypatch.setattr(inference, "NEW_TOKENS", 3)
    session = inference.open_predictor()
    assert inference.predicted_speedup(session.model.spec) > 0
    assert 0 < inference.router_share(session.model.spec) < 1
    times = inference.measure(session, dict.fromkeys(inference.ROUNDS, 1))
    assert set(inference.figures(times, predicted=1.5, share=0.1)) == set(inference.GOALS)


@pytest.mark.parametrize(("strategy", "ranks"), [("auto", 1), ("ddp", 2), ("fsdp", 2)])
@pytest.mark.parametrize("workload", scaling.WORKLOADS)
def test_scaling_uses_the_same_samples_for_any_number_of_ranks(tmp_path, workload, strategy, ranks):
    words = scaling.command(tmp_path, workload, tmp_path / "run", strategy)
    given = dict(word.split("=") for word in words if "=" in word)
    samples = int(given["data.batch_size"]) * int(given["trainer.max_steps"])
    per_rank = scaling.WORKLOADS[workload].samples
    assert samples == 2 * per_rank * (scaling.WARM_UP + scaling.TIMED)
    assert int(given["trainer.devices"]) == ranks


def test_monitoring_times_what_it_watches_and_restores_it():
    seconds = {"speed and memory": 0.5, "loss per ratio": 0.3, "logging, every tenth step": 0.2}
    seconds |= {"training step": 100.0, "validation, with pictures and answers": 60.0}
    found = monitoring.figures({"steps": 50, "validations": 3, "seconds": seconds})
    # 20 ms of a step of 2 s; a validation of 20 s.
    assert {name: figure["measured"] for name, figure in found.items()} == {
        "monitoring_over_step": pytest.approx(0.01),
        "validation_over_step": pytest.approx(10),
    }
    original = monitoring.consistency.grouped
    with monitoring.timed() as taken:
        assert monitoring.consistency.grouped(["a"], torch.ones(2), [2])["a"].weight == 2
    assert taken["loss per ratio"] > 0
    assert monitoring.consistency.grouped is original


def test_a_set_of_any_size_is_opened_as_one_of_many_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "MAX_LINKS", 2)
    monkeypatch.setattr(start.harness, "measure_apart", lambda _, folder: start.measure(Path(folder)))
    details, page = run_benchmark(start, "start", tmp_path, shards=5, samples=100, rounds=1)
    (found,) = details["rounds"]
    assert 0 < found["opened"] < found["assigned"]
    assert start.figures(details["rounds"]) == details["figures"]
    assert start.tables(details) in page


def test_without_a_gpu_the_check_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 2
    assert re.fullmatch(r"PyTorch sees no CUDA GPU; [^.\n]+\.\n", capsys.readouterr().err)


def test_a_dry_run_of_the_gpu_check_measures_all_and_writes_nothing(monkeypatch, capsys):
    resume = {"steps": 40, "stopped_at": 2, "difference": 0.0}  # takes processes of its own: see below
    monkeypatch.setattr(gpu, "measure_resume", lambda _: resume)
    before = PAGE.read_text()
    assert gpu.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    for figure in ("gpu_stage_1_tokens_per_s", "gpu_stage_2_tokens_per_s", "gpu_kl_time_over_naive"):
        assert re.search(rf"`{figure}` \| \d", printed)
    assert "`gpu_failures` | 0.0 | <= 0" in printed
    assert "| skipped: model.attention is 'flash'" in printed
    assert PAGE.read_text() == before
    assert not (RESULTS / "gpu.json").exists()


def test_what_fails_on_a_gpu_is_reported_and_the_rest_measured(monkeypatch, capsys):
    def out_of_memory(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "measure_resume", out_of_memory)
    monkeypatch.setattr(gpu, "run_tests", lambda _: {"passed": 3, "failed": 1, "skipped": 0})
    monkeypatch.setattr(gpu, "measure_step", out_of_memory)
    assert gpu.main(["--dry-run"]) == 1
    printed = capsys.readouterr().out
    assert "`gpu_failures` | 6 | <= 0" in printed, "a test, four steps and the resumed run"
    assert "| stage 2 | failed: RuntimeError: out of memory |" in printed
    assert "`gpu_kl_time_over_naive`" in printed


@pytest.mark.slow
def test_the_gpu_check_resumes_a_stopped_run():
    found = gpu.measure_resume(gpu.dry_size())
    assert 0 < found["stopped_at"] < found["steps"]
    assert found["difference"] == 0


def test_saving_a_sharded_checkpoint_is_measured_both_ways():
    found = saving.figures({way: saving.measure(way, 64) for way in saving.WAYS})
    assert {name: figure["goal"] for name, figure in found.items()} == {
        "checkpoint_rank0_peak_over_shard": 0.25,
        "checkpoint_gathered_peak_over_shard": None,
    }
    assert all(figure["measured"] >= 0 for figure in found.values())
