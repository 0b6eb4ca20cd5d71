"""Gradients of weights that are split over real processes, held against those of one process."""

import copy

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing import spawn

from tests.helpers import encoded_sample, tiny_model
from vico_pl.data.collate import collate
from vico_pl.model.reference import FrozenReference
from vico_pl.model.sharding import shard_model, whole_state
from vico_pl.optim import OptimConfig, clip_gradients
from vico_pl.stages.consistency import ConsistencyConfig, ConsistencyStage

FILLER = encoded_sample(99, images=(1,), answers=())
# What each of two ranks runs, pack by pack: other ratios on each, text alone beside images, a filler alone.
PACKS = {
    "images": [[(encoded_sample(1, images=(3,)), 0)], [(encoded_sample(2, images=(1, 2)), 1)]],
    "text_beside_images": [
        [(encoded_sample(3, images=(2,)), 2)],
        [(encoded_sample(4, images=(), answers=(5,)), 3), (FILLER, -1)],
    ],
    "nothing_beside_images": [[(encoded_sample(5, images=(2,)), 4)], [(FILLER, -1)]],
}


def pack(name, rank):
    samples, positions = zip(*PACKS[name][rank], strict=True)
    return collate(samples, positions=positions)


def build_stage(*, tied):
    language = {"language": {**tiny_model().spec.language, "tie_word_embeddings": tied}}
    model, reference = tiny_model(1, **language).train(), tiny_model(2, **language)
    model.set_dropout(0.0)
    config = ConsistencyConfig(ratio_draw="tile")
    return ConsistencyStage(model, FrozenReference(reference), config, OptimConfig(), num_steps=1, seed=0)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run_sharded(rank, folder, tied):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    stage = build_stage(tied=tied)
    for model in stage.sharded_models():
        shard_model(model, mesh)
    for name in PACKS:  # the gradients of several packs are added up
        (stage.step(pack(name, rank)).loss_sum * 2).backward()  # ranks are averaged
    gradients = {n: whole(p.grad) for n, p in stage.model.named_parameters() if p.grad is not None}
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    norm = clip_gradients(optimizer, max_norm=0.5)
    optimizer.step()
    state = whole_state(stage.model)
    if rank == 0:
        torch.save({"gradients": gradients, "norm": norm, "state": state}, folder / "found.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_norm_and_weights_are_those_of_one_process(tmp_path, tied):
    spawn(run_sharded, (tmp_path, tied), nprocs=2)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    stage = build_stage(tied=tied)
    before = copy.deepcopy(stage.model.state_dict())
    for name in PACKS:
        for rank in range(2):
            stage.step(pack(name, rank)).loss_sum.backward()
    expected = {n: p.grad for n, p in stage.model.named_parameters() if p.grad is not None}
    assert found["gradients"].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    assert found["norm"] == pytest.approx(clip_gradients(optimizer, max_norm=0.5), rel=1e-5)
    optimizer.step()
    for name, tensor in stage.model.state_dict().items():
        torch.testing.assert_close(found["state"][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in found["state"].items())
