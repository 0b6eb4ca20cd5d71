import pickle
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vico_pl.data.module import DataConfig, DataModule, RankBatches, SourceConfig
from vico_pl.data.packing import MicroBatchLimits
from vico_pl.data.shards.reader import write_index, write_shard
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


def read(module, *, first_step, num_steps, num_workers=0, rank=0, world=1):
    """RankBatches of a rank as its trainer sees them."""
    module.config = DataConfig(**{**vars(module.config), "num_workers": num_workers})
    module.trainer = SimpleNamespace(global_step=first_step, global_rank=rank, world_size=world)
    loader = iter(module.train_dataloader())
    return [next(loader) for _ in range(num_steps)]


def global_batches(module, *, world, **settings):
    """What the ranks have together in each step: {position: (name, tiles, token ids)}."""
    ranks = [read(module, rank=rank, world=world, **settings) for rank in range(world)]
    return [
        {k: v for share in shares for k, v in samples(share).items()} for shares in zip(*ranks, strict=True)
    ]


def samples(share):
    found = {}
    for micro_batch in share.micro_batches:
        tiles = [
            micro_batch.tiles[micro_batch.tile_to_sample == place] for place in range(micro_batch.num_samples)
        ]
        ids = micro_batch.input_ids.split(micro_batch.sample_lengths.tolist())
        for place, position in enumerate(micro_batch.positions):
            if position >= 0:
                found[position] = (micro_batch.ids[place], tiles[place].tolist(), ids[place].tolist())
    return found


@settings(max_examples=30)
@given(world=st.integers(1, 15), step=st.integers(0, 10**6))
def test_ranks_deal_every_global_batch_among_them(module, world, step):
    assigned = [
        RankBatches(module, first_step=0, rank=rank, world=world).rank_positions(step)[0]
        for rank in range(world)
    ]
    assert sorted(p for rank_positions in assigned for p in rank_positions) == list(
        range(step * BATCH, (step + 1) * BATCH)
    )


def test_ranks_get_like_amounts_of_work(shards, tokenizer):
    module = data_module([SourceConfig(path=str(shards))], tokenizer, batch_size=48)
    for step in range(5):
        micro_batches = [
            read(module, first_step=step, num_steps=1, rank=rank, world=4)[0].micro_batches[0]
            for rank in range(4)
        ]
        work = [
            len(micro_batch.input_ids) + 3 * micro_batch.num_tiles for micro_batch in micro_batches
        ]  # a tile has 4 vision tokens
        assert max(work) - min(work) <= 0.1 * max(work)


def test_ranks_make_as_many_packs_as_the_one_with_most(shards, tokenizer):
    micro_batches = MicroBatchLimits(max_tiles=9)
    module = data_module(
        [SourceConfig(path=str(shards))], tokenizer, batch_size=18, micro_batch=micro_batches
    )
    for step in range(6):
        shares = [read(module, first_step=step, num_steps=1, rank=rank, world=3)[0] for rank in range(3)]
        assert len({len(share.micro_batches) for share in shares}) == 1
        assert len(shares[0].micro_batches) >= 2


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_and_workers_gives_the_same_global_batches_byte_for_byte(
    module, world, num_workers
):
    expected = global_batches(module, world=1, first_step=0, num_steps=5)
    assert [sorted(batch) for batch in expected] == [list(range(12 * i, 12 * i + 12)) for i in range(5)]
    for first_step in (0, 3):  # from the start, and taken up again by these ranks and workers
        found = global_batches(
            module, world=world, num_workers=num_workers, first_step=first_step, num_steps=5 - first_step
        )
        assert found == expected[first_step:]


def test_shares_travel_to_worker_processes_without_the_trainer(module):
    module.trainer = SimpleNamespace(
        global_step=0, global_rank=0, world_size=2, of=lambda: "no pickle holds this"
    )
    shares = pickle.loads(pickle.dumps(module.train_dataloader().dataset))
    assert next(iter(shares)).ids == next(iter(module.train_dataloader().dataset)).ids


def test_an_epoch_over_ranks_holds_every_sample_once(module):
    steps = global_batches(module, world=2, first_step=0, num_steps=3)
    ids = [name for batch in steps for name, _, _ in batch.values()]
    assert len(ids) == 36  # two epochs of 18
    assert sorted(ids) == sorted(2 * list(set(ids)))


def test_a_rank_without_a_sample_has_a_filler(module):
    shares = [read(module, first_step=0, num_steps=1, rank=rank, world=15)[0] for rank in range(15)]
    assert sorted(len(share.ids) for share in shares) == [0] * 3 + [1] * 12
    assert all(share.micro_batches[0].num_tiles for share in shares)


def test_sources_take_over_at_their_steps(shards, tmp_path, tokenizer):
    write_shard(tmp_path / "text.tar", [("0", {"json": CONVERSATION})])
    sources = [SourceConfig(path=str(tmp_path), steps=2), SourceConfig(path=str(shards))]
    read_shares = read(data_module(sources, tokenizer, batch_size=2), first_step=0, num_steps=4)
    assert [{name.split("-")[0] for name in share.ids} for share in read_shares] == [
        {"text.tar/0"},
        {"text.tar/0"},
        {"train"},
        {"train"},
    ]


CONVERSATION = b'{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}'


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
