"""The benchmark of the data path runs and writes what its page promises, however fast it is."""

import json
import sys
from functools import partial

import pytest
import torch

from tests.scripts import BENCHMARKS, load_benchmark
from vico_pl.data.tiling import TilingConfig, choose_grid

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

data = load_benchmark("data")
batches, images, pipeline = (load_benchmark(f"data_{part}") for part in ("batches", "images", "pipeline"))
reading, shuffle, turns = (load_benchmark(f"data_{part}") for part in ("reading", "shuffle", "turns"))
RECORDED = BENCHMARKS / "results" / "data.json"
TINY = {
    "rounds": 1,
    "images": 1,
    "raw_shards": 2,
    "raw_samples": 3,
    "many_shards": 3,
    "many_samples": 200,
    "photos": 70,
    "steps": 2,
    "watched": 64,
    "epochs": 3,
    "loaders": 1,
}


def test_a_tiny_run_writes_figures_measurements_and_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "measure_memory", pipeline.watch_memory)  # in this process
    monkeypatch.setattr(data, "keep_freed_memory", lambda: None)  # other tests measure memory
    monkeypatch.setattr(shuffle.harness, "measure_apart", partial(run_here, shuffle))
    page = tmp_path / "README.md"
    page.write_text("# Benchmarks\n<!-- data: begin -->\n<!-- data: end -->\n")
    settings = [f"--{key}={value}" for key, value in TINY.items()]
    data.main([*settings, f"--output={tmp_path / 'results'}", f"--page={page}"])
    content = json.loads((tmp_path / "results" / "data.json").read_text())
    assert list(content["figures"]) == list(data.GOALS)
    unusual = [f"--{key}={value}" for key, value in TINY.items() if value != vars(data.Size())[key]]
    assert content["command"] == " ".join(["python benchmarks/data.py", *unusual])
    assert content["size"] == TINY
    assert data.figures(content) == content["figures"]
    assert data.tables(content) in page.read_text()


def run_here(module, script, name, folder):
    """Do what a process of its own would."""
    assert script == module.SCRIPT
    return {"distinct_shards": module.distinct_shards(module.LOADERS[name](folder))}


def test_a_loader_runs_in_a_process_of_its_own():
    measured = shuffle.measure_shuffle(["ours_window"])
    assert measured["ours_window"] == shuffle.distinct_shards(shuffle.LOADERS["ours_window"](None))


@pytest.mark.slow
def test_memory_is_watched_in_a_process_of_its_own(tmp_path):
    pipeline.write_photos(tmp_path, samples=64, bad=2)
    held = pipeline.measure_memory(tmp_path, samples=64, epochs=2)
    assert len(held) == 2
    assert min(held) > 50


@pytest.mark.skipif(not RECORDED.exists(), reason="nothing recorded yet")
def test_recorded_figures_follow_from_the_recorded_measurements():
    content = json.loads(RECORDED.read_text())
    assert content["size"] == vars(data.Size()), "recorded at full size"
    assert data.figures(content) == content["figures"]


@pytest.mark.parametrize("tiles", [5, 13])
def test_tiles_are_those_of_internvls_recipe_and_of_transformers(tiles):
    content = images.draw_jpeg(0)
    runs = images.runs_of(content, tiles)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.MEAN, images.STD))
    ours = runs["ours"](content).float()
    for other in ("internvl", "transformers"):
        theirs = (runs[other](content) * std + mean) * 255
        difference = (theirs - ours).abs()
        assert difference.max() < (2.5 if other == "internvl" else 40), (
            "transformers resizes tiles, not images"
        )
        assert difference.mean() < 1


def test_stages_do_what_ours_does():
    content = images.draw_jpeg(0)
    runs = images.runs_of(content, 5)
    columns, rows = choose_grid(images.WIDTH, images.HEIGHT, TilingConfig(max_tiles=4))
    tiles, resized = runs["ours"](content), runs["resize"](content)
    assert (columns, rows) == (2, 2)
    assert torch.equal(resized[:, :448, 448:], tiles[1])
    assert torch.equal(runs["thumbnail"](content), tiles[-1])
    assert torch.equal(runs["copy"](content), tiles)


def test_a_run_that_reads_less_than_the_set_is_told(tmp_path, monkeypatch):
    reading.write_set(tmp_path, shards=1, samples=2)
    monkeypatch.setattr(reading, "_read_webdataset", lambda paths, shuffle=0: 1)
    with pytest.raises(RuntimeError, match="not all gave the bytes of 2 records"):
        reading.runs_of(tmp_path)


def test_bare_reads_read_every_byte(tmp_path):
    reading.write_set(tmp_path, shards=2, samples=3)
    runs = reading.runs_of(tmp_path)
    assert runs["read"]() == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert runs["pread"]() == 6 * (512 + 160_256 + 512 + 1_024 + (len(reading.TEXT) > 1024) * 512)


def test_distinct_shards_of_known_orders():
    assert shuffle.distinct_shards(range(shuffle.TOTAL)) == pytest.approx(1, abs=0.2)
    strided = [shard * shuffle.SAMPLES + i for i in range(shuffle.SAMPLES) for shard in range(shuffle.SHARDS)]
    assert shuffle.distinct_shards(strided) == shuffle.BATCH


@pytest.mark.parametrize("samples", [range(1, shuffle.TOTAL), [0, *range(shuffle.TOTAL - 1)]])
def test_an_order_that_is_no_epoch_is_refused(samples):
    with pytest.raises(RuntimeError, match="an epoch of 12"):
        shuffle.distinct_shards(samples)


def test_a_tool_that_is_not_installed_is_named_as_such(monkeypatch):
    monkeypatch.setitem(shuffle.MODULES, "litdata", "no_such_package.at_all")
    measured = shuffle.measure_shuffle(["litdata"])
    assert measured == {"litdata": None}
    assert "| litdata, `shuffle=True`, one worker | not installed here | |" in shuffle.shuffle_table(measured)


def test_everyone_has_turns_and_ratios_are_taken_within_rounds():
    calls = []
    runs = {name: partial(calls.append, name) for name in "abc"}
    measured = turns.take_turns(runs, rounds=3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert [list(round_) for round_ in measured] == [["a", "b", "c"]] * 3
    rounds = [{"ours": 1.0, "other": 2.0}, {"ours": 3.0, "other": 12.0}, {"ours": 1.0, "other": 5.0}]
    assert turns.speedup(rounds, "other") == 4


def test_resuming_finds_the_set_of_many_samples_whole(tmp_path):
    pipeline.write_many(tmp_path, shards=4, samples=100)
    module = pipeline.open_module(tmp_path)
    assert module.indexes[0].num_samples == 400
    assert set(pipeline.measure_resume(tmp_path, samples=400, repeats=1)) == {"1%", "50%", "99%"}


def test_padding_is_what_fillers_add(tmp_path):
    """Of text alone every micro-batch needs the dummy's tile; of images none does."""
    pipeline.write_many(tmp_path / "texts", shards=1, samples=64)
    counts = pipeline.measure_padding(tmp_path / "texts", steps=1)
    assert counts["micro-batches"] == pipeline.WORLD
    dummy = next(
        iter(pipeline.RankBatches(pipeline.open_module(tmp_path / "texts"), first_step=0, rank=0, world=8))
    )
    (tokens,) = pipeline._tokens(dummy.dummy)
    assert counts["wasted"] == pipeline.WORLD * tokens


def test_growth_of_memory_is_what_comes_after_the_second_epoch():
    assert pipeline.memory_growth([900.0, 100.0, 101.0, 104.0, 100.0]) == 4
    assert pipeline.memory_growth([50.0, 100.0, 90.0]) == 0


def test_ranks_of_equal_samples_are_in_balance_and_one_dear_sample_upsets_it():
    equal = [batches.Sample(cost=1.0, estimate=1.0, tiles=1, full_tokens=9, drawn_tokens=9)] * 128
    assigned = batches._neighbours(128)
    assert batches._balance(equal, assigned) == 1
    dear = [batches.Sample(cost=66.0, estimate=1.0, tiles=1, full_tokens=9, drawn_tokens=9), *equal[1:]]
    assert batches._balance(dear, assigned) == pytest.approx((66 + 127) / 64 / 67)


def test_packs_by_tokens_hold_what_they_may_and_no_sample_twice():
    cost = batches.cost_of("1b")
    samples = [sample for step in range(2) for sample in batches.draw_samples(cost, step=step)]
    assigned = list(batches._packs_by_tokens(samples))
    micro_batches = [micro_batch for step in assigned for micro_batch in step]
    assert all(len(step) == batches.RANKS for step in assigned)
    assert (
        max(sum(samples[i].drawn_tokens for i in micro_batch) for micro_batch in micro_batches)
        <= batches.PACK_TOKENS
    )
    taken = [index for micro_batch in micro_batches for index in micro_batch]
    assert len(taken) == len(set(taken))
