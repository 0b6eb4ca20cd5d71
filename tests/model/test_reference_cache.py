"""States that were kept are served bit for bit, and only to whom they belong."""

import copy
import errno
import multiprocessing
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from tests.helpers import encoded_sample, mixed_samples, tiny_model, tiny_spec
from vico_pl.data.collate import collate
from vico_pl.model.reference import FrozenReference
from vico_pl.model.reference_cache import ENTRY, ReferenceCache, fingerprint

WIDTH = 32


def open_cache(folder, name="same", *, max_gib=1.0, look_every_s=0.0):
    return ReferenceCache(folder, fingerprint=name, width=WIDTH, max_gib=max_gib, look_every_s=look_every_s)


def micro_batch(*samples):
    return collate(samples, with_digests=True)


def numbered(batch):
    """States that tell which sample they are of, and which row."""
    digests = [d for d, n in zip(batch.digests, batch.response_lengths, strict=True) for _ in range(n)]
    firsts = torch.tensor([float(digest[0]) for digest in digests])
    return (firsts + torch.arange(len(digests)) / 1024)[:, None].expand(-1, WIDTH).contiguous()


def numbered_alone(seeds):
    return torch.cat([numbered(micro_batch(encoded_sample(seed))) for seed in seeds])


def served(cache, batch):
    """What the cache has of a micro-batch; None: it would have it computed."""
    asked = mock.Mock(return_value=numbered(batch))
    states = cache.states_of(batch, asked)
    return None if asked.called else states


def reference_with(cache=None, *, seed=0):
    return FrozenReference(tiny_model(seed), cache=cache)


@pytest.fixture
def batch():
    return micro_batch(*mixed_samples())


def test_the_states_of_a_known_pack_are_served_bit_for_bit_and_not_computed(tmp_path, batch):
    reference = reference_with(open_cache(tmp_path))
    expected = reference_with().response_states(batch)
    with mock.patch.object(reference, "_compute_states", wraps=reference._compute_states) as compute:
        found = [reference.response_states(batch) for _ in range(3)]
    assert compute.call_count == 1
    assert all(torch.equal(states, expected) for states in found)


def test_a_later_process_finds_them_too(tmp_path, batch):
    expected = reference_with(open_cache(tmp_path)).response_states(batch)
    assert torch.equal(served(open_cache(tmp_path), batch), expected)


def test_samples_are_served_in_other_packs_than_they_were_computed_in(tmp_path):
    one, two, three, four = mixed_samples()
    reference = reference_with(open_cache(tmp_path))
    for samples in ((one, two), (three, four)):
        reference.response_states(micro_batch(*samples))
    mixed = micro_batch(four, one, three, two)
    found = served(reference.cache, mixed)
    torch.testing.assert_close(found, reference_with().response_states(mixed), rtol=1e-5, atol=1e-5)


def test_a_pack_of_which_a_part_is_known_is_computed_whole_and_the_rest_is_kept(tmp_path):
    one, two, *_ = mixed_samples()
    cache = open_cache(tmp_path)
    served(cache, micro_batch(one))
    kept = size_of(tmp_path)
    assert served(cache, micro_batch(one, two)) is None
    assert size_of(tmp_path) - kept == 5 * WIDTH * 4 + ENTRY.size
    assert served(cache, micro_batch(two, one)) is not None


def test_a_pack_says_whether_it_was_served_unless_it_has_no_response(tmp_path, batch):
    cache, dummy = open_cache(tmp_path), micro_batch(encoded_sample(9, answers=()))
    assert cache.served is None
    told = []
    for one in (batch, batch, dummy):
        cache.states_of(one, lambda one=one: numbered(one))
        told.append(cache.served)
    assert told == [False, True, None]


def test_samples_without_a_response_take_no_part(tmp_path):
    sample, dummy = encoded_sample(1), encoded_sample(9, answers=())
    cache = open_cache(tmp_path)
    served(cache, micro_batch(sample, dummy))
    assert served(cache, micro_batch(dummy, sample)).shape == (3, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_states_keep_their_type(tmp_path, batch, dtype):
    states = numbered(batch).to(dtype)
    open_cache(tmp_path).states_of(batch, lambda: states)
    found = served(open_cache(tmp_path), batch)
    assert found.dtype == dtype
    assert torch.equal(found, states)


# --- Whose states they are ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["tiles", "input_ids", "response_mask"])
def test_a_sample_with_other_tiles_or_tokens_is_another_whatever_its_name(tmp_path, changed):
    sample = encoded_sample(1)
    value = getattr(sample, changed)
    value = value.flatten().roll(1).view_as(value)  # of a mask: as many tokens, others
    cache = open_cache(tmp_path)
    served(cache, micro_batch(sample))
    assert served(cache, micro_batch(replace(sample, **{changed: value}))) is None


def test_the_same_sample_under_another_name_is_the_same(tmp_path):
    cache = open_cache(tmp_path)
    served(cache, micro_batch(encoded_sample(1)))
    assert served(cache, micro_batch(replace(encoded_sample(1), id="elsewhere.tar/0"))) is not None


def test_states_of_another_fingerprint_are_never_served(tmp_path, batch):
    served(open_cache(tmp_path, "one"), batch)
    assert served(open_cache(tmp_path, "other"), batch) is None
    assert served(open_cache(tmp_path, "one"), batch) is not None


def test_a_fingerprint_is_that_of_the_weights_and_settings_and_the_same_each_time():
    names = [fingerprint(tiny_model(), precision="32-true") for _ in range(2)]
    one_weight = tiny_model()
    with torch.no_grad():
        one_weight.language.get_input_embeddings().weight[60, 31] += 1e-3
    others = [
        fingerprint(tiny_model(1), precision="32-true"),
        fingerprint(one_weight, precision="32-true"),
        fingerprint(tiny_model().bfloat16(), precision="32-true"),
        fingerprint(tiny_model(), precision="bf16-mixed"),
        fingerprint(
            tiny_model(vision={**tiny_spec().vision, "image_mean": [0.0, 0.0, 0.0]}), precision="32-true"
        ),
    ]
    assert names[0] == names[1]
    assert len({names[0], *others}) == 6


def test_states_of_another_number_of_tokens_are_computed_and_replaced(tmp_path, batch):
    longer = replace(batch, response_lengths=[n + 1 if n else 0 for n in batch.response_lengths])
    open_cache(tmp_path).states_of(longer, lambda: torch.zeros(longer.num_response_tokens, WIDTH))
    cache = open_cache(tmp_path)
    assert served(cache, batch) is None
    assert torch.equal(served(cache, batch), numbered(batch))


# --- Faults -------------------------------------------------------------------------------------------------


def size_of(folder):
    return sum(path.stat().st_size for path in folder.glob("*/*"))


def one_file(folder, ending):
    (path,) = folder.glob(f"*/*{ending}")
    return path


@pytest.mark.parametrize("torn", [1, ENTRY.size // 2, ENTRY.size - 1, ENTRY.size])
def test_a_torn_index_loses_no_more_than_the_entry_it_is_torn_in(tmp_path, torn):
    one, two, *_ = mixed_samples()
    cache = open_cache(tmp_path)
    for sample in (one, two):
        served(cache, micro_batch(sample))
    index = one_file(tmp_path, ".index")
    index.write_bytes(index.read_bytes()[:-torn])
    later = open_cache(tmp_path)
    assert served(later, micro_batch(one)) is not None
    assert served(later, micro_batch(two)) is None
    assert served(open_cache(tmp_path), micro_batch(two)) is not None  # it was kept again


def test_an_entry_that_is_seen_half_written_is_read_when_it_is_whole(tmp_path, batch):
    served(open_cache(tmp_path), batch)
    index = one_file(tmp_path, ".index")
    whole = index.read_bytes()
    index.write_bytes(whole[:-9])
    cache = open_cache(tmp_path)
    index.write_bytes(whole)
    assert served(cache, batch) is not None


def tear_off(content):
    return content[:-1]


def lose(content):
    """As a machine does whose power fails: the file has its length, its end was never written."""
    return content[:-64] + bytes(64)


@pytest.mark.parametrize("damage", [tear_off, lose])
def test_states_that_are_not_what_was_written_are_computed_again(tmp_path, damage):
    one, two, *_ = mixed_samples()
    cache = open_cache(tmp_path)
    for sample in (one, two):
        served(cache, micro_batch(sample))
    states = one_file(tmp_path, ".states")
    states.write_bytes(damage(states.read_bytes()))
    later = open_cache(tmp_path)
    assert served(later, micro_batch(one)) is not None
    assert served(later, micro_batch(two)) is None
    assert torch.equal(served(later, micro_batch(two)), numbered(micro_batch(two)))


def test_an_index_of_random_bytes_does_no_harm(tmp_path):
    open_cache(tmp_path)
    batch = micro_batch(encoded_sample(1))
    noise = np.random.default_rng(0).bytes(10 * ENTRY.size)
    far_away = ENTRY.micro_batch(batch.digests[0], 2**64 - 1, batch.response_lengths[0], 0, b"float32")
    (tmp_path / "same" / "noise.index").write_bytes(noise + far_away)
    (tmp_path / "same" / "noise.states").write_bytes(noise)
    cache = open_cache(tmp_path)
    assert served(cache, batch) is None
    assert served(cache, batch) is not None


def test_states_that_somebody_removed_are_computed_again(tmp_path, batch):
    cache = open_cache(tmp_path)
    served(cache, batch)
    one_file(tmp_path, ".states").unlink()
    assert served(cache, batch) is None


def full_disk(opened):
    def open_to_read(path, mode):
        if mode == "ab":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode)

    return open_to_read


def test_a_full_disk_is_told_once_and_what_is_kept_goes_on_to_be_served(tmp_path):
    one, two, three, _ = mixed_samples()
    cache = open_cache(tmp_path)
    served(cache, micro_batch(one))
    with (
        mock.patch.object(Path, "open", full_disk(Path.open)),
        pytest.warns(UserWarning, match=r"no more states of the reference are kept: .*No space left") as told,
    ):
        assert served(cache, micro_batch(two)) is None
    assert len(told) == 1
    assert served(cache, micro_batch(three)) is None  # without a warning, which would fail the test
    assert served(cache, micro_batch(three)) is None
    assert served(cache, micro_batch(one)) is not None


def test_nothing_is_kept_beyond_the_limit_which_is_told_once(tmp_path):
    one, two, three, _ = mixed_samples()
    served(open_cache(tmp_path, "other"), micro_batch(one))  # counts, too
    cache = open_cache(tmp_path, max_gib=(2.5 * 4 * WIDTH * 4 + 80) / 2**30)
    served(cache, micro_batch(one))
    with pytest.warns(UserWarning, match=r"its limit of .* GiB, consistency\.reference_cache_gib") as told:
        served(cache, micro_batch(two))
    served(cache, micro_batch(three))
    assert len(told) == 1
    assert size_of(tmp_path) == 2 * (4 * WIDTH * 4 + ENTRY.size)
    assert served(cache, micro_batch(one)) is not None


# --- Several processes --------------------------------------------------------------------------------------


def test_what_others_write_is_found_when_it_is_looked_for(tmp_path, batch):
    early, busy = open_cache(tmp_path), open_cache(tmp_path, look_every_s=1e9)
    served(open_cache(tmp_path), batch)
    assert served(early, batch) is not None
    assert served(busy, batch) is None


def write_half(folder, first, together):
    """Keep every other of 40 samples beside another process that keeps the rest; then have them all."""
    torch.set_num_threads(1)
    cache = open_cache(folder)
    together.wait()
    for seed in range(first, 40, 2):
        served(cache, micro_batch(encoded_sample(seed)))
    together.wait()
    assert torch.equal(served(cache, micro_batch(*map(encoded_sample, range(40)))), numbered_alone(range(40)))


def test_processes_write_side_by_side_and_read_what_the_others_wrote(tmp_path):
    context = multiprocessing.get_context("forkserver")
    together = context.Barrier(2, timeout=120)
    writers = [context.Process(target=write_half, args=(tmp_path, first, together)) for first in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(list(tmp_path.glob("*/*"))) == 4  # few files, however many samples


# --- Beside a policy ----------------------------------------------------------------------------------------


def test_a_reference_that_uses_parts_of_the_policy_is_served_the_same(tmp_path, batch):
    policy = tiny_model()
    policy.vision.requires_grad_(requires_grad=False)
    reference = FrozenReference(copy.deepcopy(policy), beside=policy, cache=open_cache(tmp_path))
    assert reference.model.vision is policy.vision
    features = policy.encode_tiles(batch.tiles)
    first, again = (reference.response_states(batch, policy_features=features) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first, reference_with().response_states(batch))
