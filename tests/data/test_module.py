from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vico_pl.data.module import DataConfig, DataModule, SourceConfig, TrainingBatches
from vico_pl.data.shards import write_index, write_shard
from vico_pl.data.tiling import TilingConfig

BATCH = 12


@pytest.fixture(scope="module")
def module(shards, tokenizer):
    return data_module([SourceConfig(path=str(shards))], tokenizer)


def data_module(sources, tokenizer, **changes):
    tiling = TilingConfig(tile_size=32, max_tiles=2)
    config = DataConfig(
        **{"sources": sources, "batch_size": BATCH, "tiling": tiling, "num_workers": 0, **changes}
    )
    return DataModule(config, tokenizer=tokenizer, full_tokens_per_tile=4, seed=1)


def shares(module, *, world, num_workers, first_step, num_steps):
    """Positions of each step as Lightning's ranks and their workers read them: {step: [of each rank]}."""
    found = {}
    for rank in range(world):
        batches = TrainingBatches(module, first_step=first_step, rank=rank, world=world)
        size = BATCH // world
        for worker in range(num_workers):
            positions = batches._positions(worker, num_workers)
            for step in range(first_step + worker, first_step + num_steps, num_workers):
                found.setdefault(step, []).append([next(positions) for _ in range(size)])
    return found


@settings(deadline=None)
@given(
    world=st.sampled_from([1, 2, 3, 4, 6, 12]), num_workers=st.integers(1, 5), first_step=st.integers(0, 100)
)
def test_ranks_and_workers_tile_every_global_batch_exactly(module, world, num_workers, first_step):
    found = shares(module, world=world, num_workers=num_workers, first_step=first_step, num_steps=7)
    assert sorted(found) == list(range(first_step, first_step + 7))
    for step, of_ranks in found.items():
        assert len(of_ranks) == world
        assert sorted(p for share in of_ranks for p in share) == list(range(step * BATCH, (step + 1) * BATCH))


def read(module, *, first_step, num_steps, num_workers=0, rank=0, world=1):
    """Batches as the trainer sees them."""
    module.config = DataConfig(**{**vars(module.config), "num_workers": num_workers})
    module.trainer = SimpleNamespace(global_step=first_step, global_rank=rank, world_size=world)
    loader = iter(module.train_dataloader())
    return [next(loader) for _ in range(num_steps)]


def test_resuming_at_any_step_goes_on_with_the_unbroken_sequence(module):
    unbroken = read(module, first_step=0, num_steps=4)
    for step in range(1, 4):
        resumed = read(module, first_step=step, num_steps=4 - step)
        assert [batch.ids for batch in resumed] == [batch.ids for batch in unbroken[step:]]
    assert torch.equal(resumed[0].tiles, unbroken[3].tiles)


def test_an_epoch_over_ranks_holds_every_sample_once(module):
    by_rank = [read(module, first_step=0, num_steps=3, rank=rank, world=2) for rank in range(2)]
    ids = [name for batches in by_rank for batch in batches for name in batch.ids]
    assert len(ids) == 36  # two epochs of 18
    assert sorted(ids) == sorted(2 * list(set(ids)))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_worker_processes_give_the_batches_in_the_same_order(module):
    alone = read(module, first_step=1, num_steps=5)
    with_workers = read(module, first_step=1, num_steps=5, num_workers=2)
    assert [batch.ids for batch in with_workers] == [batch.ids for batch in alone]
    assert all(torch.equal(a.tiles, b.tiles) for a, b in zip(alone, with_workers, strict=True))


def test_sources_take_over_at_their_steps(shards, tmp_path, tokenizer):
    write_shard(tmp_path / "text.tar", [("0", {"json": CONVERSATION})])
    sources = [SourceConfig(path=str(tmp_path), steps=2), SourceConfig(path=str(shards))]
    batches = read(data_module(sources, tokenizer, batch_size=2), first_step=0, num_steps=4)
    assert [{name.split("-")[0] for name in batch.ids} for batch in batches] == [
        {"text.tar/0"},
        {"text.tar/0"},
        {"train"},
        {"train"},
    ]


CONVERSATION = b'{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}'


def test_a_batch_that_ranks_cannot_share_is_refused(module):
    with pytest.raises(ValueError, match="batch_size 12 does not divide by the number of ranks, 5"):
        TrainingBatches(module, first_step=0, rank=0, world=5)


def test_missing_and_empty_shards_are_found_before_anything_is_built(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no such folder of shards"):
        data_module([SourceConfig(path=str(tmp_path / "absent"))], tokenizer)
    write_shard(tmp_path / "empty.tar", [])
    write_index(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: its shards hold no samples"):
        data_module([SourceConfig(path=str(tmp_path))], tokenizer)
    with pytest.raises(ValueError, match=r"data\.sources is empty"):
        data_module([], tokenizer)


def test_sources_that_are_never_left_and_empty_batches_are_refused():
    endless, last = SourceConfig(path="a"), SourceConfig(path="b")
    with pytest.raises(ValueError, match="a needs 'steps', as another source follows it"):
        DataConfig(sources=[endless, last])
    with pytest.raises(ValueError, match=r"data\.batch_size is 0; expected at least 1"):
        DataConfig(batch_size=0)
