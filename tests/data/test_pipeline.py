import pickle

import pytest
import torch

from tests.helpers import record, tiny_model, tiny_spec
from vico_pl.data.chat import ChatEncoder
from vico_pl.data.decode import ImageLimits
from vico_pl.data.order import SampleOrder
from vico_pl.data.pipeline import apply, build_stages, group, run_stages
from vico_pl.data.shards import read_index, write_index, write_shard
from vico_pl.data.tiling import TilingConfig
from vico_pl.losses.consistency import consistency_kl


@pytest.fixture
def sources(shards, tmp_path):
    """The good shards, and a folder of four records of which the second and the third are bad."""
    good, climbing = record().files, "../climbing"
    records = [("0", good), ("1", {"json": b"{"}), (climbing, good), ("3", good)]
    write_shard(tmp_path / "faulty" / "f.tar", records)
    write_index(tmp_path / "faulty")
    return [read_index(shards), read_index(tmp_path / "faulty")]


def stages(sources, tokenizer, *, batch_size, first_source_ends=0):
    order = SampleOrder(
        source_sizes=[index.num_samples for index in sources], source_ends=[first_source_ends, None], seed=0
    )
    chat = ChatEncoder(tokenizer, full_tokens_per_tile=4)
    return build_stages(
        sources, order=order, tiling=TilingConfig(tile_size=32, max_tiles=2), chat=chat, batch_size=batch_size
    )


def test_positions_become_batches_in_their_order(sources, tokenizer):
    pipeline = stages(sources, tokenizer, batch_size=4, first_source_ends=18)
    batches = list(run_stages(range(18), pipeline))
    assert [batch.num_samples for batch in batches] == [4, 4, 4, 4, 2]
    ids = [name for batch in batches for name in batch.ids]
    assert len(set(ids)) == 18
    alone = [batch.ids[0] for position in range(18) for batch in run_stages([position], pipeline)]
    assert alone == ids
    assert all(batch.bad_records == [] for batch in batches)


def test_bad_records_keep_their_slots_so_that_positions_never_shift(sources, tokenizer):
    batches = list(
        run_stages(range(8), stages(sources, tokenizer, batch_size=4))
    )  # two epochs of four records
    assert [batch.num_samples for batch in batches] == [2, 2]
    for batch in batches:
        assert sorted(batch.ids) == ["f.tar/0", "f.tar/3"]
        bad = {item.id: item.reason for item in batch.bad_records}
        assert bad.keys() == {"f.tar/1", "f.tar/../climbing"}
        assert bad["f.tar/1"].startswith("JSON: ")


def test_bytes_that_are_no_record_become_a_bad_record(tmp_path, tokenizer):
    write_shard(tmp_path / "f.tar", [(str(i), record().files) for i in range(3)])
    write_index(tmp_path)
    index = read_index(tmp_path)
    first, second = index.boundaries[0][1:3]
    content = bytearray((tmp_path / "f.tar").read_bytes())
    content[first:second] = b"\xff" * (second - first)
    (tmp_path / "f.tar").write_bytes(content)
    (batch,) = run_stages(range(3), stages([index, index], tokenizer, batch_size=3))
    assert sorted(batch.ids) == ["f.tar/0", "f.tar/2"]
    (bad,) = batch.bad_records
    assert (bad.id, bad.kind) == ("source 1, sample 1", "tar")
    assert f"bytes {first} to {second} of f.tar are no record" in bad.reason


def test_over_long_samples_become_bad_records(sources, tokenizer):
    order = SampleOrder(source_sizes=[4], source_ends=[None], seed=0)
    chat = ChatEncoder(tokenizer, full_tokens_per_tile=9000)
    pipeline = build_stages(
        sources[1:], order=order, tiling=TilingConfig(tile_size=32, max_tiles=2), chat=chat, batch_size=4
    )
    (batch,) = run_stages(range(4), pipeline)
    too_long = [item.reason for item in batch.bad_records if item.kind == "length"]
    assert len(too_long) == 2
    assert all("tokens at full vision tokens; chat.max_tokens is 8192" in reason for reason in too_long)


def test_a_batch_of_bad_records_alone_is_one_empty_sample_that_trains_nothing(tmp_path, tokenizer):
    write_shard(tmp_path / "f.tar", [(str(i), {"json": b"{"}) for i in range(4)])
    (batch,) = run_stages(range(4), stages([read_index(tmp_path)] * 2, tokenizer, batch_size=4))
    assert len(batch.bad_records) == 4
    assert (batch.ids, batch.num_tiles, int(batch.response_mask.sum())) == ([""], 0, 0)
    model = tiny_model(language={**tiny_spec().language, "vocab_size": len(tokenizer)}).train()
    features = model.encode_tiles(batch.tiles)
    states = model.response_states(batch, features, model.full_ratios(batch))
    loss = consistency_kl(states, model.head, states.detach(), model.head.detach()).sum()
    loss.backward()
    assert loss.item() == 0
    gradients = {n: p.grad for n, p in model.named_parameters() if not n.startswith("router.")}
    assert [name for name, gradient in gradients.items() if gradient is None] == []  # none waits under DDP
    assert not any(gradient.any() for gradient in gradients.values())


def test_images_above_the_limits_become_bad_records(sources, tokenizer):
    order = SampleOrder(source_sizes=[18], source_ends=[None], seed=0)
    pipeline = build_stages(
        sources[:1],
        order=order,
        tiling=TilingConfig(tile_size=32, max_tiles=2),
        chat=ChatEncoder(tokenizer, full_tokens_per_tile=4),
        batch_size=18,
        limits=ImageLimits(max_pixels=64 * 64),
    )
    (batch,) = run_stages(range(18), pipeline)
    assert {bad.kind for bad in batch.bad_records} == {"image_limit"}
    assert 0 < len(batch.bad_records) < 18


def test_only_record_errors_are_taken_for_bad_records():
    def broken(_):
        raise KeyError("a fault of ours")

    with pytest.raises(KeyError):
        list(apply([1], function=broken))


def test_groups_hold_size_items_and_the_rest():
    assert list(group(range(7), size=3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(group(range(6), size=3)) == [[0, 1, 2], [3, 4, 5]]
    assert list(group([], size=3)) == []


def test_stages_travel_to_worker_processes_and_do_the_same_there(sources, tokenizer):
    pipeline = stages(sources, tokenizer, batch_size=2, first_source_ends=4)
    copy = pickle.loads(pickle.dumps(pipeline))
    for ours, theirs in zip(run_stages(range(4), pipeline), run_stages(range(4), copy), strict=True):
        assert ours.ids == theirs.ids
        assert torch.equal(ours.tiles, theirs.tiles)
