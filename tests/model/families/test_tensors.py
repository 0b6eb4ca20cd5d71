import json
import re

import pytest
import torch

from vico_pl.model.families.base import INDEX_NAME, WEIGHTS_NAME, StoredTensors, write_tensors

TENSORS = {f"layer.{i}.weight": torch.full((10,), float(i)) for i in range(5)}  # 40 bytes each


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_holds(folder, tensors):
    stored = StoredTensors(folder)
    assert stored.names == tensors.keys()
    for name, tensor in tensors.items():
        assert stored.shape(name) == tuple(tensor.shape)
        assert torch.equal(stored[name], tensor)


def refusal(folder):
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        StoredTensors(folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).removeprefix(str(folder))


def test_larger_models_are_numbered_shards_and_their_index(tmp_path):
    write_tensors(TENSORS, tmp_path, max_bytes=80)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names_in(tmp_path) == [*shards, INDEX_NAME]
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["weight_map"].keys() == TENSORS.keys()
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == 200
    assert_holds(tmp_path, TENSORS)


def test_weights_may_be_read_by_whoever_may_read_other_files(tmp_path):
    write_tensors(TENSORS, tmp_path, max_bytes=80)
    (tmp_path / "other").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_views_of_one_tensor_are_stored_apart(tmp_path):
    whole = torch.arange(24.0).view(6, 4)
    views = {"top": whole[:2], "bottom": whole[2:], "turned": whole.T}
    write_tensors(views, tmp_path)
    assert_holds(tmp_path, views)


def test_tensors_are_read_under_the_names_that_a_layout_gives_them(tmp_path):
    write_tensors(TENSORS, tmp_path, max_bytes=80)
    stored = StoredTensors(tmp_path, str.upper)
    assert stored.names == {name.upper() for name in TENSORS}
    assert torch.equal(stored["LAYER.3.WEIGHT"], TENSORS["layer.3.weight"])
    assert stored.shape("LAYER.3.WEIGHT") == (10,)


def test_a_tensor_that_is_trained_leaves_its_file_as_it_was(tmp_path):
    write_tensors(TENSORS, tmp_path)
    stored = StoredTensors(tmp_path)["layer.3.weight"]
    stored += 1  # in place, as optimizers do
    assert stored[0] == 4
    assert_holds(tmp_path, TENSORS)


@pytest.mark.parametrize(("before", "after", "gone"), [(999, 80, WEIGHTS_NAME), (80, 999, INDEX_NAME)])
def test_weights_take_the_place_of_others_however_they_are_split(tmp_path, before, after, gone):
    write_tensors({"old": torch.zeros(30), "older": torch.zeros(30)}, tmp_path, max_bytes=before)
    assert gone in names_in(tmp_path)
    write_tensors(TENSORS, tmp_path, max_bytes=after)
    assert gone not in names_in(tmp_path)
    assert_holds(tmp_path, TENSORS)


def test_an_interrupted_write_leaves_the_older_weights_whole(tmp_path, monkeypatch):
    write_tensors(TENSORS, tmp_path)

    def interrupted(_, path, **__):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("vico_pl.model.families.base.save_file", interrupted)
    with pytest.raises(OSError, match="No space left"):
        write_tensors({"new": torch.zeros(3)}, tmp_path)
    assert_holds(tmp_path, TENSORS)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": []}}', "\xff"]
)
def test_a_damaged_index_is_refused(tmp_path, content):
    write_tensors(TENSORS, tmp_path, max_bytes=80)
    (tmp_path / INDEX_NAME).write_bytes(content.encode("latin-1"))
    assert refusal(tmp_path).startswith(f"/{INDEX_NAME}: no readable index of weights (")


def test_absent_and_pickled_weights_are_refused(tmp_path):
    write_tensors(TENSORS, tmp_path, max_bytes=80)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    expected = f": {INDEX_NAME} names model-00002-of-00003.safetensors, which is absent; fetch it again"
    assert refusal(tmp_path) == expected
    (tmp_path / INDEX_NAME).unlink()
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert refusal(tmp_path) == f": pickled weights may run code; save them as {WEIGHTS_NAME}"


def test_pickled_weights_beside_others_are_passed_over(tmp_path):
    write_tensors(TENSORS, tmp_path)
    assert names_in(tmp_path) == [WEIGHTS_NAME]
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    assert_holds(tmp_path, TENSORS)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
@pytest.mark.parametrize("name", [WEIGHTS_NAME, "model-00002-of-00003.safetensors"])
def test_a_truncated_file_is_named(tmp_path, name, keep):
    write_tensors(TENSORS, tmp_path, max_bytes=1000 if name == WEIGHTS_NAME else 80)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:keep])
    assert refusal(tmp_path).startswith(f"/{name}: no readable weights (")
