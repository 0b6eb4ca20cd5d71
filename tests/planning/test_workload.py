from dataclasses import replace

import numpy as np
import pytest

from vico_pl.data.packing import MicroBatchLimits
from vico_pl.data.shards.index import INDEX_NAME, Contents, ShardEntry, write_entries, write_sidecar
from vico_pl.data.shards.sizes import SampleSize
from vico_pl.model.flops import ModelFlops
from vico_pl.planning.workload import SampleShape, count_work, micro_batch_of, read_samples

SAMPLE = SampleShape(tiles=2.0, text_tokens=10.0, response_tokens=4.0, num_samples=None, origin="test")
FLOPS = ModelFlops(
    vision_per_tile=1000.0,
    router_per_tile=7.0,
    connector_per_tile={4: 10.0, 16: 20.0},
    vision_tokens_per_tile={4: 4, 16: 1},
    language_per_token=100.0,
    language_per_pair=0.0,
    head_per_token=3.0,
)
FULL, COARSE = 100 * (2 * 4 + 10), 100 * (2 * 1 + 10)  # language model at ratio 4 and 16


def test_all_that_is_trained_counts_three_times(config):
    work = count_work(config(), FLOPS, SAMPLE).flops
    assert work["policy vision"] == 3 * 2000
    assert work["policy connectors"] == 3 * 2 * 15  # the mean of both ratios
    assert work["policy language"] == 3 * (FULL + COARSE) / 2
    assert work["policy head"] == 3 * 4 * 3
    assert work["reference"] == 2000 + 20 + FULL + 12


def test_recomputing_costs_one_more_forward_of_the_blocks(config):
    plain = count_work(config(), FLOPS, SAMPLE).flops
    again = count_work(config(trainer={"activation_checkpointing": True}), FLOPS, SAMPLE).flops
    assert again["policy vision"] == plain["policy vision"] * 4 / 3
    assert again["policy language"] == plain["policy language"] * 4 / 3
    assert again["reference"] == plain["reference"]


def test_gradients_pass_through_a_frozen_language_model(config):
    work = count_work(config(model={"trainable": ["connectors"]}), FLOPS, SAMPLE).flops
    assert work["policy vision"] == 2000
    assert work["policy connectors"] == 2 * 30
    assert work["policy language"] == 2 * (FULL + COARSE) / 2
    assert work["policy head"] == 2 * 12


def test_pretrain_has_no_reference(config):
    work = count_work(config("pretrain", model={"ratios": [4]}), FLOPS, SAMPLE)
    assert "reference" not in work.flops
    assert work.vision_tokens == {"policy": 8}


def test_labels_per_tile_run_half_a_sample_for_each_tile(config):
    work = count_work(config("router"), FLOPS, SAMPLE).flops
    assert work["reference"] == 2000 + 20 + FULL + 12
    assert work["policy with tiles compressed"] == 40 + 2 * (FULL / 2 + 24)
    assert work["router"] == 3 * 2 * 7


def test_labels_per_image_run_one_compressed_sample(config):
    work = count_work(config("router", router={"label_mode": "image"}), FLOPS, SAMPLE).flops
    assert work["policy with tiles compressed"] == 40 + COARSE + 24


@pytest.mark.parametrize(
    ("limits", "batch_size", "world", "expected"),
    [
        (MicroBatchLimits(max_tiles=9, max_tokens=1000), 16, 1, 4),  # 4 x 2 tiles
        (MicroBatchLimits(max_tiles=99, max_tokens=60), 16, 1, 3),  # 3 x 18 tokens
        (MicroBatchLimits(max_tiles=99, max_tokens=1000), 16, 8, 2),  # a rank's share
        (MicroBatchLimits(max_tiles=1, max_tokens=1), 16, 1, 1),  # one sample that exceeds them
    ],
)
def test_packs_keep_to_the_limits(config, limits, batch_size, world, expected):
    data = replace(config().data, micro_batch=limits, batch_size=batch_size)
    micro_batch = micro_batch_of(data, SAMPLE, tokens_per_tile=4, world=world)
    assert (
        micro_batch.num_samples,
        micro_batch.tiles,
        micro_batch.text_tokens,
        micro_batch.response_tokens,
    ) == (expected, 2, 10, 4)


def test_shards_tell_their_sizes(config, tmp_path):
    """Two samples of 1000 x 500 px, of three tiles each, and 20 and 40 tokens of text."""
    write_entries([ShardEntry(name="a.tar", num_samples=2)], tmp_path / INDEX_NAME)
    sizes = [SampleSize(text_tokens=n, num_images=1, width=1000, height=500) for n in (20, 40)]
    write_sidecar(Contents(np.array([0, 512, 1024]), np.array(sizes)), tmp_path / "a.tar")
    found = read_samples(config(data={"sources": [{"path": str(tmp_path)}]}).data)
    assert (found.num_samples, found.tiles, found.text_tokens, found.response_tokens) == (2, 3, 30, 15)
    assert found.origin.startswith("mean of 2 samples")


def test_an_index_without_sizes_still_counts(config, tmp_path):
    write_entries([ShardEntry(name="a.tar", num_samples=9)], tmp_path / INDEX_NAME)
    found = read_samples(config(data={"sources": [{"path": str(tmp_path)}]}).data)
    assert (found.num_samples, found.tiles) == (9, 5)
    assert "assumed" in found.origin


def test_without_shards_usual_figures_are_taken(config):
    found = read_samples(config().data)
    assert (found.tiles, found.text_tokens, found.num_samples) == (5, 200, None)
    assert "assumed" in found.origin


def test_a_range_of_shards_counts_what_it_names(config, tmp_path):
    names = ["train-0.tar", "train-1.tar", "train-2.tar"]
    entries = [ShardEntry(name=name, num_samples=count) for name, count in zip(names, (9, 7, 5), strict=True)]
    write_entries(entries, tmp_path / INDEX_NAME)
    for name in names:
        (tmp_path / name).touch()

    def count(named: str) -> int | None:
        return read_samples(config(data={"sources": [{"path": f"{tmp_path}/{named}"}]}).data).num_samples

    assert count("train-{0..1}.tar") == 16
    assert count("train-[12].tar") == 12
    assert count("train-{0..3}.tar") is None  # the last is not counted
    assert count("other-*.tar") is None
