import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from vico_pl.losses import consistency
from vico_pl.losses.consistency import check_liger, consistency_kl, liger_kl_sum

installed = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
TOKENS = (1, 5, 33, 200)  # of which the kernel makes chunks of powers of two
CASES = [(tokens, reverse) for tokens in TOKENS for reverse in (False, True)]
TEMPERATURE = 2.0
SCALE = 3 / 7  # the loss is divided by a count and multiplied by the number of ranks
SCRIPT = f"""
import sys, torch
from vico_pl.losses.consistency import liger_kl_sum

def computed(inputs, reverse):
    leaves = [x.to(sys.argv[2]).requires_grad_() for x in inputs]
    kl = liger_kl_sum(*leaves, temperature={TEMPERATURE}, reverse=reverse)
    (kl * {SCALE}).backward()
    return [kl.detach().cpu(), *(x.grad.cpu() for x in leaves[:2])], [x.grad is None for x in leaves]

torch.save([computed(*case) for case in torch.load(sys.argv[1])], sys.argv[1])
"""


def tensors(num_tokens, *, dtype=torch.float32, vocab=61):
    """States and heads of both sides, of different widths."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = ((num_tokens, 6), (vocab, 6), (num_tokens, 4), (vocab, 4))
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def ours(inputs, *, reverse):
    leaves = [x.clone().requires_grad_() for x in inputs]
    kl = consistency_kl(*leaves, temperature=TEMPERATURE, reverse=reverse).sum()
    return [kl.detach(), *torch.autograd.grad(kl * SCALE, leaves[:2])]


def theirs(folder, device, **options):
    """What the package computes, in a process of its own: Triton learns at import what it runs on."""
    path = folder / "cases.pt"
    torch.save([(tensors(tokens, **options), reverse) for tokens, reverse in CASES], path)
    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), device],
        env=os.environ | interpreted | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, torch.load(path), strict=True))


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return theirs(tmp_path_factory.mktemp("liger"), "cpu")


@installed
@pytest.mark.parametrize(("tokens", "reverse"), CASES)
def test_the_package_computes_value_and_gradients_of_ours(on_cpu, tokens, reverse):
    found, without_gradient = on_cpu[tokens, reverse]
    assert without_gradient == [False, False, True, True]
    for mine, other in zip(ours(tensors(tokens), reverse=reverse), found, strict=True):
        torch.testing.assert_close(other, mine, rtol=1e-5, atol=1e-5)


@installed
@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_so_it_does_on_a_gpu(tmp_path, dtype, tolerance):
    for (tokens, reverse), (found, _) in theirs(tmp_path, "cuda", dtype=dtype).items():
        value, *gradients = ours(tensors(tokens, dtype=dtype), reverse=reverse)
        torch.testing.assert_close(found[0], value, rtol=1e-5, atol=1e-5)  # of bfloat16 too: float32 logits
        for mine, other in zip(gradients, found[1:], strict=True):
            assert other.dtype == dtype
            assert (other - mine).norm() / mine.norm() < tolerance


@pytest.fixture
def calls(monkeypatch):
    """A liger-kernel package that computes the same in plain PyTorch; returns how it was called."""
    made = []

    class LigerFusedLinearJSD:
        def __init__(self, *, jsd_beta, temperature, accum_dtype):
            self.beta, self.temperature = jsd_beta, temperature
            assert accum_dtype == torch.float32

        def __call__(self, states, head, reference, reference_head, labels):
            assert labels is None
            made.append([x.dtype for x in (states, head, reference, reference_head)])
            made[-1].append(torch.is_autocast_enabled("cpu"))
            sides = ((states, head), (reference, reference_head))
            log_q, log_p = (log_softmax(x @ weight.T / self.temperature, -1) for x, weight in sides)
            pair = (log_p, log_q) if self.beta == 1 else (log_q, log_p)
            return kl_div(*pair, reduction="sum", log_target=True) / len(states)

    package = ModuleType("fused_linear_jsd")
    package.LigerFusedLinearJSD = LigerFusedLinearJSD
    packages = {"liger_kernel.transformers.fused_linear_jsd": package}
    monkeypatch.setattr(consistency, "import_module", packages.get)
    return made


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_sum_over_tokens_from_operands_that_lose_nothing(calls, dtype, reverse):
    inputs = tensors(9, dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        kl = liger_kl_sum(*leaves, temperature=TEMPERATURE, reverse=reverse)
    assert calls == [[torch.float32] * 4 + [False]]
    (kl * SCALE).backward()
    expected = ours(inputs, reverse=reverse)
    torch.testing.assert_close(kl.detach(), expected[0], rtol=1e-5, atol=1e-5)
    for leaf, wanted in zip(leaves, expected[1:], strict=False):
        assert leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-2, atol=1e-2)
    assert leaves[2].grad is leaves[3].grad is None
    assert liger_kl_sum(inputs[0].requires_grad_(), *inputs[1:]).requires_grad  # the head may be frozen


def test_an_empty_response_is_zero_with_zero_gradients(calls):
    states, head, *reference = tensors(0)
    kl = liger_kl_sum(states.requires_grad_(), head.requires_grad_(), *reference)
    kl.backward()
    assert (kl.item(), calls) == (0, [])
    assert torch.equal(head.grad, torch.zeros_like(head))


def check(monkeypatch, *, device="cuda", capability=(8, 0), version="0.8.5"):
    def version_of(name):
        if version is None:
            raise PackageNotFoundError(name)
        return version

    monkeypatch.setattr(consistency, "version", version_of)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    check_liger(torch.device(device))


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"device": "cpu"}, "runs on CUDA devices, but this run is on cpu; set"),
        ({"version": None}, "but none is installed; pip install 'liger-kernel>=0.8.5', or set"),
        ({"version": "0.8.4"}, "but 0.8.4 is installed; pip install 'liger-kernel>=0.8.5', or set"),
        ({"capability": (7, 5)}, "compute capability 7.5; use one of 8.0 or more, or set"),
    ],
)
def test_it_is_refused_where_it_cannot_run(monkeypatch, machine, message):
    with pytest.raises(ValueError, match=re.escape(f"{message} consistency.kernel=native")):
        check(monkeypatch, **machine)


def test_it_is_welcome_on_a_gpu_that_has_the_package(monkeypatch):
    check(monkeypatch)
