"""Gradients of weights that are split over real processes, held against those of one process."""

import copy
import os
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes

from tests.support import runs  # noqa: F401 - sets what the fork server imports
from tests.support.tiny import encoded_sample, tiny_model, tiny_spec
from vico_pl.config import RunConfig
from vico_pl.data.collate import collate
from vico_pl.losses.consistency import consistency_kl
from vico_pl.model.blocks import shard_model, whole_state
from vico_pl.model.branches import branch_states
from vico_pl.model.reference import FrozenReference
from vico_pl.optim import clip_gradients
from vico_pl.stages.consistency import ConsistencyConfig, ConsistencyStage
from vico_pl.stages.figures import Ranks
from vico_pl.stages.router import RouterConfig, RouterStage

TIED = (False, True)
FILLER = encoded_sample(99, images=(1,), answers=())
# What each of two ranks runs, per micro-batch: different ratios, text alone beside images, a dummy alone.
PACKS = {
    "images": [[(encoded_sample(1, images=(3,)), 0)], [(encoded_sample(2, images=(1, 2)), 1)]],
    "text_beside_images": [
        [(encoded_sample(3, images=(2,)), 2)],
        [(encoded_sample(4, images=(), answers=(5,)), 3), (FILLER, -1)],
    ],
    "nothing_beside_images": [[(encoded_sample(5, images=(2,)), 4)], [(FILLER, -1)]],
}


def micro_batch(name, rank):
    samples, positions = zip(*PACKS[name][rank], strict=True)
    return collate(samples, positions=positions)


def language_of(*, tied):
    return {"language": {**tiny_spec().language, "tie_word_embeddings": tied}}


def build_stage(*, tied):
    model, reference = (tiny_model(seed, **language_of(tied=tied)) for seed in (1, 2))
    model.train().set_dropout(0.1)
    run = RunConfig(stage="consistency", run_dir="x", consistency=ConsistencyConfig(ratio_draw="tile"))
    return ConsistencyStage(run, model, FrozenReference(reference))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run_sharded(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    steps = {"float32": step_in_float32, "mixed": gradients_in_bfloat16, "labels": label_tiles}
    found = {tied: {name: step(rank, mesh, tied) for name, step in steps.items()} for tied in TIED}
    if rank == 0:
        torch.save(found, folder / "found.pt")
    distributed.barrier()
    os._exit(0)  # Python's own end would be an abort if a thread of gloo still held a tensor


def shard(stage, mesh, **options):
    for model in stage.sharded_models():
        shard_model(model, mesh, **options)


def gradients_of(stage):
    return {n: whole(p.grad) for n, p in stage.model.named_parameters() if p.grad is not None}


def step_in_float32(rank, mesh, tied):
    stage = build_stage(tied=tied)
    shard(stage, mesh)
    for name in PACKS:  # the gradients of several micro-batches are added up
        (stage.step(micro_batch(name, rank)).loss_sum * 2).backward()  # ranks are averaged
    gradients = gradients_of(stage)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    norm = clip_gradients(optimizer, max_norm=0.5)
    optimizer.step()
    return {"gradients": gradients, "norm": norm, "state": whole_state(stage.model)}


def gradients_in_bfloat16(rank, mesh, tied):
    """Gradients of one micro-batch, what entered the loss, and what came out."""
    stage, seen = build_stage(tied=tied), []
    shard(stage, mesh, dtype=torch.bfloat16)

    def watched(*inputs, **options):
        seen.extend([*(tensor.detach().clone() for tensor in inputs), consistency_kl(*inputs, **options)])
        return seen[-1]

    with patch("vico_pl.stages.consistency.consistency_kl", watched), torch.autocast("cpu", torch.bfloat16):
        loss = stage.step(micro_batch("images", rank)).loss_sum
    (loss * 2).backward()
    return {"gradients": gradients_of(stage), "loss": [tensor.detach() for tensor in seen]}


def label_tiles(rank, mesh, tied):
    """What the router learns from ranks of which one has more groups of branches than the other."""
    stage, passes = build_router_stage(tied=tied), []
    shard(stage, mesh)
    stage.is_sharded, stage.ranks = True, Ranks(2)
    stage.policy.model.language.base_model.register_forward_hook(lambda *_: passes.append(1))
    learn(stage, [micro_batch(name, rank) for name in PACKS])
    return {**learned(stage), "passes": stage.ranks.gather(len(passes))}


def build_router_stage(*, tied):
    policy, reference = (tiny_model(seed, **language_of(tied=tied)) for seed in (1, 2))
    run = RunConfig(stage="router", run_dir="x", router=RouterConfig(window=20, min_history=1))
    return RouterStage(run, policy, FrozenReference(reference))


def learn(stage, micro_batches):
    with patch("vico_pl.stages.labels.branch_states", partial(branch_states, max_tokens=1)):  # a tile each
        for result in stage.results(micro_batches):
            (result.loss_sum * stage.ranks.world).backward()  # ranks are averaged


def learned(stage):
    gradients = {name: whole(p.grad) for name, p in stage.router.named_parameters()}
    return {"gradients": gradients, "loss_ratios": stage.window.values}


@pytest.fixture(scope="module")
def of_both(tmp_path_factory):
    """What two processes found with sharded weights."""
    folder = tmp_path_factory.mktemp("sharded")
    start_processes(run_sharded, (folder,), nprocs=2, start_method="forkserver")
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.fixture(params=TIED, ids=["untied", "tied"])
def sharded(request, of_both):
    """The same, and whether embeddings and head are one."""
    return of_both[request.param], request.param


def alone(names, *, tied):
    """The stage of one process after the micro-batches of both ranks."""
    stage = build_stage(tied=tied)
    for name in names:
        for rank in range(2):
            stage.step(micro_batch(name, rank)).loss_sum.backward()
    return stage


def test_gradients_norm_and_weights_are_those_of_one_process(sharded):
    found, stage = sharded[0]["float32"], alone(PACKS, tied=sharded[1])
    before = copy.deepcopy(stage.model.state_dict())
    expected = gradients_of(stage)
    assert found["gradients"].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    assert found["norm"] == pytest.approx(clip_gradients(optimizer, max_norm=0.5), rel=1e-5)
    optimizer.step()
    for name, tensor in stage.model.state_dict().items():
        torch.testing.assert_close(found["state"][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in found["state"].items())


def test_what_is_computed_in_bfloat16_is_compared_and_summed_in_float32(sharded):
    found, expected = sharded[0]["mixed"], gradients_of(alone(["images"], tied=sharded[1]))
    *inputs, kl = found["loss"]
    assert {tensor.dtype for tensor in inputs} == {torch.bfloat16}
    exact = consistency_kl(*(tensor.double() for tensor in inputs))
    torch.testing.assert_close(kl, exact.float(), rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.cat([of[n].flatten() for n in expected]) for of in (found["gradients"], expected))
    assert ours.dtype == torch.float32
    assert (ours.bfloat16() != ours).float().mean() > 0.5, "a sum over ranks in bfloat16 would fit into it"
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_labels_and_what_the_router_learns_are_those_of_one_process(sharded):
    found, stage = sharded[0]["labels"], build_router_stage(tied=sharded[1])
    stage.ranks = Ranks(1)
    learn(stage, [micro_batch(name, rank) for name in PACKS for rank in range(2)])
    expected = learned(stage)
    assert stage.window.seen == 10
    assert expected["loss_ratios"][-10:].std() > 0.01
    torch.testing.assert_close(found["loss_ratios"], expected["loss_ratios"], rtol=1e-5, atol=1e-5)
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    # Each micro-batch runs at full tokens, with as many groups as the rank with most tiles: 3, 2 and 2.
    assert found["passes"] == [1 + 3 + 1 + 2 + 1 + 2] * 2
