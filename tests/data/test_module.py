import pickle
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.support.tiny import encoded_image, record, tiny_model, tiny_spec
from vico_pl.data.collate import MicroBatchLimits
from vico_pl.data.decode import ImageLimits
from vico_pl.data.module import (
    DataConfig,
    DataModule,
    RankBatches,
    SourceConfig,
    ValidationConfig,
    apply,
)
from vico_pl.data.shards.reader import read_index, write_index, write_shard
from vico_pl.data.shards.tars import UNKNOWN_SIZE
from vico_pl.data.tiling import TilingConfig
from vico_pl.losses.consistency import consistency_kl

BATCH = 12
BAD_JSON = {"json": b"{"}
ONE_TILE = TilingConfig(tile_size=32, max_tiles=1)
QUESTION_ONLY = b'{"conversations": [{"from": "human", "value": "<image>\\nWhat?"}]}'
TEXT = record(text="How many days has a leap year?", answer="366", files={"jpg": None}).files


def data_module(sources, tokenizer, **changes):
    if not isinstance(sources, list):
        sources = [SourceConfig(path=str(sources))]
    tiling = TilingConfig(tile_size=32, max_tiles=2)
    config = DataConfig(**{"sources": sources, "batch_size": BATCH, "tiling": tiling, **changes})
    return DataModule(config, tokenizer=tokenizer, full_tokens_per_tile=4, seed=1)


@pytest.fixture(scope="module")
def module(shards, tokenizer):
    return data_module(shards, tokenizer)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A set of four records, of which the second and the third are bad."""
    folder, good = tmp_path_factory.mktemp("faulty"), record().files
    write_shard(folder / "f.tar", [("0", good), ("1", BAD_JSON), ("../climbing", good), ("3", good)])
    return folder


def one_rank(module):
    return RankBatches(module, first_step=0, rank=0, world=1)


def of_all_ranks(module, *, world, first_step=0):
    return [next(iter(RankBatches(module, first_step=first_step, rank=r, world=world))) for r in range(world)]


def global_batches(module, *, world, first_step=0, num_steps, num_workers=0):
    """What the ranks have together in each step: {position: (name, tiles, token ids)}."""
    ranks = [RankBatches(module, first_step=first_step, rank=rank, world=world) for rank in range(world)]
    loaders = [
        islice(DataLoader(rank, batch_size=None, num_workers=num_workers), num_steps) for rank in ranks
    ]
    steps = zip(*loaders, strict=True)
    return [{position: found for share in step for position, found in samples(share)} for step in steps]


def samples(share):
    for micro_batch in share.micro_batches:
        ids = micro_batch.input_ids.split(micro_batch.sample_lengths.tolist())
        for place, position in enumerate(micro_batch.positions):
            tiles = micro_batch.tiles[micro_batch.tile_to_sample == place]
            if position >= 0:
                yield position, (micro_batch.ids[place], tiles.tolist(), ids[place].tolist())


@settings(max_examples=30)
@given(world=st.integers(1, 15), step=st.integers(0, 10**6))
def test_ranks_divide_every_global_batch_among_them(module, world, step):
    ranks = [RankBatches(module, first_step=0, rank=rank, world=world) for rank in range(world)]
    assigned = sorted(position for rank in ranks for position in rank.rank_positions(step)[0])
    assert assigned == list(range(step * BATCH, (step + 1) * BATCH))


def test_ranks_get_like_amounts_of_work(shards, tokenizer):
    module = data_module(shards, tokenizer, batch_size=48)
    for step in range(5):
        micro_batches = [share.micro_batches[0] for share in of_all_ranks(module, world=4, first_step=step)]
        work = [len(batch.input_ids) + 3 * batch.num_tiles for batch in micro_batches]  # 4 tokens in a tile
        assert max(work) - min(work) <= 0.1 * max(work)


@pytest.fixture
def many(shards, tokenizer):
    """Batches that need two or more micro-batches on each of three ranks."""
    return data_module(shards, tokenizer, batch_size=18, micro_batch=MicroBatchLimits(max_tiles=9))


def test_ranks_run_micro_batches_of_similar_cost_at_the_same_time(many):
    for step in range(6):
        ranks = [share.micro_batches for share in of_all_ranks(many, world=3, first_step=step)]
        tokens = [
            [len(b.input_ids) + 3 * b.num_tiles for b in together] for together in zip(*ranks, strict=True)
        ]
        assert len(tokens) >= 2
        assert sum(map(max, tokens)) <= 1.15 * sum(map(sum, tokens)) / 3


def test_a_bad_record_leaves_its_micro_batch_lighter_and_shifts_no_other(faulty, tokenizer):
    limits = MicroBatchLimits(max_tiles=1)
    module = data_module(faulty, tokenizer, batch_size=4, tiling=ONE_TILE, micro_batch=limits)
    order = [module.order(position).sample for position in range(4)]
    for rank in (RankBatches(module, rank=rank, world=2) for rank in range(2)):
        positions, planned = rank.rank_positions(0)
        share = rank.rank_batch(positions, planned)
        good = [[p for p in batch if order[p] in (0, 3)] or [-1] for batch in planned]
        assert [batch.positions for batch in share.micro_batches] == good


@pytest.mark.parametrize("world", [2, 3])
def test_limits_hold_where_estimates_are_wrong_or_unknown(many, monkeypatch, world):
    expected = global_batches(many, world=1, num_steps=2)
    monkeypatch.setattr(type(many.indexes[0]), "size_of", lambda *_: UNKNOWN_SIZE)
    ranks = [RankBatches(many, rank=rank, world=world) for rank in range(world)]
    assert {len(rank.rank_positions(0)[1]) for rank in ranks} == {1}
    found = [next(iter(rank)) for rank in ranks]
    assert all(b.num_tiles <= 9 or b.num_samples == 1 for share in found for b in share.micro_batches)
    assert min(len(share.micro_batches) for share in found) > 1
    assert global_batches(many, world=world, num_steps=2) == expected


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_and_workers_gives_the_same_global_batches_byte_for_byte(
    module, world, num_workers
):
    expected = global_batches(module, world=1, num_steps=5)
    assert [sorted(batch) for batch in expected] == [list(range(12 * i, 12 * i + 12)) for i in range(5)]
    for first_step in (0, 3):  # from the start, and resumed
        found = global_batches(
            module, world=world, num_workers=num_workers, first_step=first_step, num_steps=5 - first_step
        )
        assert found == expected[first_step:]


def test_rank_batches_travel_to_worker_processes_without_the_trainer(shards, tokenizer):
    module = data_module(shards, tokenizer)
    module.trainer = lambda: "no pickle holds this"
    ours = RankBatches(module, first_step=0, rank=0, world=2)
    ours_first, theirs_first = next(iter(ours)), next(iter(pickle.loads(pickle.dumps(ours))))
    assert ours_first.ids == theirs_first.ids
    assert torch.equal(ours_first.micro_batches[0].tiles, theirs_first.micro_batches[0].tiles)


def test_a_rank_without_a_sample_has_the_dummy(module):
    shares = of_all_ranks(module, world=15)
    assert sorted(len(share.ids) for share in shares) == [0] * 3 + [1] * 12
    assert all(share.micro_batches[0].num_tiles for share in shares)


def test_every_micro_batch_has_a_tile_if_need_be_that_of_the_dummy(tmp_path, tokenizer):
    write_shard(tmp_path / "t.tar", [(str(i), TEXT) for i in range(3)])
    share = one_rank(data_module(tmp_path, tokenizer)).rank_batch(range(3))
    (micro_batch,) = share.micro_batches
    assert (micro_batch.num_tiles, micro_batch.positions) == (1, [0, 1, 2, -1])
    assert len(share.ids) == 3


def test_bad_records_keep_their_slots_so_that_positions_never_shift(faulty, tokenizer):
    rank = one_rank(data_module(faulty, tokenizer))
    for share in (rank.rank_batch(range(4)), rank.rank_batch(range(4, 8))):  # two epochs
        assert sorted(share.ids) == ["f.tar/0", "f.tar/3"]
        bad = {item.id: item for item in share.bad_records}
        assert bad.keys() == {"f.tar/1", "f.tar/../climbing"}
        assert bad["f.tar/1"].reason.startswith("JSON: ")
        assert {item.source for item in share.bad_records} == {str(faulty)}


def test_bytes_that_are_no_record_become_a_bad_record(tmp_path, tokenizer):
    write_shard(tmp_path / "f.tar", [(str(i), record().files) for i in range(3)])
    first, second = read_index(tmp_path).open(0).sidecar.span(1)
    content = bytearray((tmp_path / "f.tar").read_bytes())
    content[first:second] = b"\xff" * (second - first)
    (tmp_path / "f.tar").write_bytes(content)
    share = one_rank(data_module(tmp_path, tokenizer)).rank_batch(range(3))
    assert sorted(share.ids) == ["f.tar/0", "f.tar/2"]
    (bad,) = share.bad_records
    assert (bad.id, bad.kind) == ("source 0, sample 1", "tar")
    assert f"bytes {first} to {second} of f.tar are no record" in bad.reason


def test_images_above_the_limits_become_bad_records(shards, tokenizer):
    module = data_module(shards, tokenizer, images=ImageLimits(max_pixels=64 * 64))
    share = one_rank(module).rank_batch(range(18))
    assert {bad.kind for bad in share.bad_records} == {"image_limit"}
    assert 0 < len(share.bad_records) < 18


def test_bad_records_alone_make_one_micro_batch_of_the_dummy_that_trains_nothing(tmp_path, tokenizer):
    write_shard(tmp_path / "f.tar", [(str(i), BAD_JSON) for i in range(4)])
    share = one_rank(data_module(tmp_path, tokenizer)).rank_batch(range(4))
    assert (len(share.bad_records), share.ids) == (4, [])
    (batch,) = share.micro_batches
    assert (batch.positions, batch.num_tiles, batch.num_response_tokens) == ([-1], 1, 0)
    assert torch.equal(batch.tiles, share.dummy.tiles)
    model = tiny_model(language={**tiny_spec().language, "vocab_size": len(tokenizer)}).train()
    features = model.encode_tiles(batch.tiles)
    states = model.response_states(batch, features, model.full_ratios(batch))
    loss = consistency_kl(states, model.head, states.detach(), model.head.detach()).sum()
    loss.backward()
    assert loss.item() == 0
    gradients = {n: p.grad for n, p in model.named_parameters() if not n.startswith("router.")}
    assert [name for name, gradient in gradients.items() if gradient is None] == []  # none waits under DDP
    assert not any(gradient.any() for gradient in gradients.values())


def test_only_record_errors_are_taken_for_bad_records():
    def broken(_):
        raise KeyError("a fault of ours")

    with pytest.raises(KeyError):
        list(apply([(0, 1)], function=broken))


def test_sources_take_over_at_their_steps(shards, tmp_path, tokenizer):
    write_shard(tmp_path / "text.tar", [("0", TEXT)])
    sources = [SourceConfig(path=str(tmp_path), steps=2), SourceConfig(path=str(shards))]
    shares = islice(one_rank(data_module(sources, tokenizer, batch_size=2)), 4)
    shards_read = [{name.split("-")[0] for name in share.ids} for share in shares]
    assert shards_read == [{"text.tar/0"}, {"text.tar/0"}, {"train"}, {"train"}]


def test_tars_of_img2dataset_are_read_by_the_prompt_of_their_source(shards, tmp_path, tokenizer):
    files = {"jpg": encoded_image(), "json": b'{"url": "https://host/a.jpg"}', "txt": b"a star"}
    write_shard(tmp_path / "00000.tar", [(f"{i:09d}", files) for i in range(6)])
    for prompt, num_bad in (("Describe the image.", 0), (None, 32)):
        sources = [SourceConfig(path=str(path), weight=1.0) for path in (shards, tmp_path)]
        sources[1] = replace(sources[1], caption_prompt=prompt)
        batch = one_rank(data_module(sources, tokenizer)).rank_batch(range(64))
        assert [record.source for record in batch.bad_records] == [str(tmp_path)] * num_bad
        assert sum(name.startswith("00000.tar") for name in batch.ids) == 32 - num_bad


def test_missing_and_empty_shards_are_found_before_anything_is_built(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no such folder of shards"):
        data_module(tmp_path / "absent", tokenizer)
    write_shard(tmp_path / "empty.tar", [])
    write_index(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: its shards hold no samples"):
        data_module(tmp_path, tokenizer)


def held_out(shards, tokenizer, folder=None, **settings):
    """A module with batches of 4 and a validation set, by default 10 of the 18 records."""
    entry = {"name": "held-out", "path": str(folder or shards), "max_samples": 10, **settings}
    return data_module(shards, tokenizer, batch_size=4, validation=[ValidationConfig(**entry)])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(("world", "num_workers"), [(1, 0), (1, 2), (2, 0), (3, 1), (3, 2)])
def test_validation_reads_each_chosen_sample_once_on_any_number_of_ranks(
    shards, tokenizer, world, num_workers
):
    module = held_out(shards, tokenizer)
    ranks = [RankBatches(module, rank=r, world=world, held_out=module.held_out[0]) for r in range(world)]
    steps = list(zip(*(DataLoader(r, batch_size=None, num_workers=num_workers) for r in ranks), strict=True))
    found = [dict(item for share in step for item in samples(share)) for step in steps]
    assert [sorted(step) for step in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    names = [found[position // 4][position][0] for position in range(10)]
    # 18 records in shards of 7, 7 and 4; record floor(i * 18 / 10) is the i-th.
    chosen = [(0, 0), (0, 1), (0, 3), (0, 5), (1, 0), (1, 2), (1, 3), (1, 5), (2, 0), (2, 2)]
    starts = (0, 7, 14)
    assert names == [f"train-{shard:06d}.tar/{starts[shard] + place:08d}" for shard, place in chosen]


def test_a_small_validation_set_is_used_whole_with_its_bad_records_counted(faulty, shards, tokenizer):
    module = held_out(shards, tokenizer, faulty)
    (share,) = RankBatches(module, rank=0, world=1, held_out=module.held_out[0])
    assert (len(share.ids), {bad.source for bad in share.bad_records}) == (2, {str(faulty)})
    assert len(share.bad_records) == 2


@pytest.mark.parametrize("files", [BAD_JSON, record(answer="").files | {"json": QUESTION_ONLY}])
def test_a_validation_set_without_a_usable_sample_is_refused_at_the_start(tmp_path, shards, tokenizer, files):
    write_shard(tmp_path / "f.tar", [("0", files), ("1", files)])
    message = f"data.validation 'held-out': {tmp_path}: none of 2 samples can be read and has an answer"
    with pytest.raises(ValueError, match=message):
        held_out(shards, tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "a/b"}, r"data\.validation 'a/b'\.name is 'a/b'; expected letters, digits, _ and -"),
        ({"max_samples": 0}, r"max_samples is 0; expected 1 or more"),
    ],
)
def test_a_validation_set_needs_a_name_and_samples(settings, message):
    with pytest.raises(ValueError, match=message):
        ValidationConfig(**{"name": "a", "path": "x", **settings})


def test_two_validation_sets_need_two_names():
    with pytest.raises(ValueError, match=r"data\.validation names 'a' twice"):
        DataConfig(validation=[ValidationConfig(name="a", path=path) for path in ("x", "y")])
