import pickle

import pytest
import torch

from tests.helpers import record, tiny_model, tiny_spec
from vico_pl.data.chat import ChatEncoder
from vico_pl.data.decode import ImageLimits
from vico_pl.data.order import SampleOrder, SourceShape
from vico_pl.data.packing import MicroBatchLimits
from vico_pl.data.pipeline import apply, build_stages, run_stages
from vico_pl.data.shards.reader import read_index, write_index, write_shard
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


def stages(sources, tokenizer, *, first_source_ends=0, full_tokens_per_tile=4, **changes):
    shapes = [SourceShape(shard_sizes=tuple(index.shard_sizes)) for index in sources]
    ends = [*[first_source_ends] * (len(sources) - 1), None]
    return build_stages(
        sources,
        order=SampleOrder(sources=shapes, source_ends=ends, seed=0),
        tiling=TilingConfig(tile_size=32, max_tiles=2),
        chat=ChatEncoder(tokenizer, full_tokens_per_tile=full_tokens_per_tile),
        cost=num_tiles,
        **changes,
    )


def num_tiles(_, tiles_per_image, __):
    return float(sum(tiles_per_image))


def run(positions, pipeline):
    (share,) = run_stages(positions, pipeline)
    return share


def test_positions_become_a_share_of_the_same_samples_however_they_are_asked_for(sources, tokenizer):
    pipeline = stages(sources, tokenizer, first_source_ends=18)
    share = run(range(18), pipeline)
    assert len(set(share.ids)) == 18
    (micro_batch,) = share.micro_batches
    assert micro_batch.positions == list(range(18))
    assert [run([position], pipeline).ids for position in range(18)] == [[name] for name in share.ids]
    assert share.bad_records == []


def test_packs_keep_their_limits_and_hold_every_sample_once(sources, tokenizer):
    limits = MicroBatchLimits(max_tiles=6)
    share = run(range(18), stages(sources, tokenizer, first_source_ends=18, micro_batch_limits=limits))
    assert len(share.micro_batches) > 2
    assert all(micro_batch.num_tiles <= 6 for micro_batch in share.micro_batches)
    assert sorted(
        position for micro_batch in share.micro_batches for position in micro_batch.positions
    ) == list(range(18))


def test_every_pack_has_a_tile_if_need_be_that_of_the_filler(tmp_path, tokenizer):
    text = record(text="How many days has a leap year?", answer="366", files={"jpg": None}).files
    write_shard(tmp_path / "t.tar", [(str(i), text) for i in range(3)])
    share = run(range(3), stages([read_index(tmp_path)], tokenizer))
    (micro_batch,) = share.micro_batches
    assert (micro_batch.num_tiles, micro_batch.positions) == (1, [0, 1, 2, -1])
    assert len(share.ids) == 3
    assert micro_batch.num_response_tokens == int(micro_batch.response_mask.sum()) > 0
    (rows,) = [micro_batch.response_mask.split(micro_batch.sample_lengths.tolist())[-1]]
    assert not rows.any()


def test_bad_records_keep_their_slots_so_that_positions_never_shift(sources, tokenizer):
    pipeline = stages(sources, tokenizer)
    for share in (run(range(4), pipeline), run(range(4, 8), pipeline)):  # two epochs
        assert sorted(share.ids) == ["f.tar/0", "f.tar/3"]
        bad = {item.id: item for item in share.bad_records}
        assert bad.keys() == {"f.tar/1", "f.tar/../climbing"}
        assert bad["f.tar/1"].reason.startswith("JSON: ")
        assert {item.source for item in share.bad_records} == {str(sources[1].folder)}


def test_bytes_that_are_no_record_become_a_bad_record(tmp_path, tokenizer):
    write_shard(tmp_path / "f.tar", [(str(i), record().files) for i in range(3)])
    write_index(tmp_path)
    index = read_index(tmp_path)
    first, second = index.open(0).bounds[1:3]
    content = bytearray((tmp_path / "f.tar").read_bytes())
    content[first:second] = b"\xff" * (second - first)
    (tmp_path / "f.tar").write_bytes(content)
    share = run(range(3), stages([index, index], tokenizer))
    assert sorted(share.ids) == ["f.tar/0", "f.tar/2"]
    (bad,) = share.bad_records
    assert (bad.id, bad.kind) == ("source 1, sample 1", "tar")
    assert f"bytes {first} to {second} of f.tar are no record" in bad.reason


def test_over_long_samples_become_bad_records(sources, tokenizer):
    share = run(range(4), stages(sources[1:], tokenizer, full_tokens_per_tile=9000))
    too_long = [item.reason for item in share.bad_records if item.kind == "length"]
    assert len(too_long) == 2
    assert all("tokens at full vision tokens; chat.max_tokens is 8192" in reason for reason in too_long)


def test_a_share_of_bad_records_alone_is_one_filler_that_trains_nothing(tmp_path, tokenizer):
    write_shard(tmp_path / "f.tar", [(str(i), {"json": b"{"}) for i in range(4)])
    share = run(range(4), stages([read_index(tmp_path)] * 2, tokenizer))
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


def test_images_above_the_limits_become_bad_records(sources, tokenizer):
    pipeline = stages(sources[:1], tokenizer, image_limits=ImageLimits(max_pixels=64 * 64))
    share = run(range(18), pipeline)
    assert {bad.kind for bad in share.bad_records} == {"image_limit"}
    assert 0 < len(share.bad_records) < 18


def test_only_record_errors_are_taken_for_bad_records():
    def broken(_):
        raise KeyError("a fault of ours")

    with pytest.raises(KeyError):
        list(apply([(0, 1)], function=broken))


def test_stages_travel_to_worker_processes_and_do_the_same_there(sources, tokenizer):
    pipeline = stages(sources, tokenizer, first_source_ends=4)
    ours, copy = run(range(4), pipeline), pickle.loads(pickle.dumps(pipeline))
    theirs = run(range(4), copy)
    assert ours.ids == theirs.ids
    assert torch.equal(ours.micro_batches[0].tiles, theirs.micro_batches[0].tiles)
