"""Time, memory and rounding error of the consistency loss against other implementations.

`make bench` runs it. Each measurement is a separate process with one thread: it runs one implementation once
and reports processor time and peak memory. Implementations alternate, so that other load affects all alike;
a figure is the median of the ratios within rounds.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import harness
import torch
from harness import Goal
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from vico_pl.losses.consistency import consistency_kl

GOALS = {
    "kl_time_over_floor": Goal(1.2),
    "kl_memory_over_naive": Goal(0.10),
    "kl_memory_over_bound": Goal(1.0),
    "kl_error_bf16": Goal(0.01),
    "kl_time_over_liger": Goal(0.85),
    "kl_memory_over_liger": Goal(0.55),
}
ROUNDS = 3
# Rounds after which these are no longer measured.
LEAVES_AFTER = dict.fromkeys(("ours_frozen_head", "ours_no_gradient", "liger"), 2) | dict.fromkeys(
    ("naive", "naive_freed"), 1
)
TITLES = {
    "floor": "four bare matrix products",
    "ours": "`consistency_kl`, forward and backward",
    "ours_frozen_head": "the same, head frozen",
    "ours_no_gradient": "the same, without gradients (stage 2)",
    "naive": "both logits whole and held, as a model's outputs are; `F.kl_div`",
    "naive_freed": "the same, logits freed as early as can be",
    "liger": "liger-kernel's chunked loss, eager, same chunk",
}
KL_NATS = 1e-4  # per token: where the rounding error is measured

Round = dict[str, dict[str, float]]  # implementation -> quantity -> value


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of a problem."""

    tokens: int = 2048
    vocab: int = 151_936  # Qwen3's, padded
    width: int = 256
    chunk: int = 256


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Float32 states and heads of both sides; those of the policy require gradients."""

    states: Tensor  # (R, D)
    head: Tensor  # (V, D)
    reference: Tensor  # (R, D)
    reference_head: Tensor  # (V, D)


# --- Measurements -------------------------------------------------------------------------------------------


def draw_inputs(shape: Shape) -> Inputs:
    """Draw a policy and a reference that differ by some tenths of a nat."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(shape.vocab, shape.width, generator=generator).mul_(shape.width**-0.5)
    moved = head + 0.1 * shape.width**-0.5 * torch.randn(shape.vocab, shape.width, generator=generator)
    states = 2 * torch.randn(shape.tokens, shape.width, generator=generator)
    reference = states + 0.3 * torch.randn(shape.tokens, shape.width, generator=generator)
    return Inputs(
        states=states.requires_grad_(),
        head=head.requires_grad_(),
        reference=reference,
        reference_head=moved,
    )


@torch.no_grad()
def run_floor(given: Inputs, shape: Shape) -> None:
    """Do the four matrix products of a live reference and a trained head, and nothing else."""
    size = min(shape.chunk, shape.tokens), shape.vocab
    logits, others = given.states.new_empty(size), given.states.new_empty(size)
    to_states, to_head = torch.empty_like(given.states), torch.zeros_like(given.head)
    for start in range(0, shape.tokens, shape.chunk):
        rows = slice(start, start + shape.chunk)
        count = len(given.states[rows])
        torch.mm(given.states[rows], given.head.T, out=logits[:count])
        torch.mm(given.reference[rows], given.reference_head.T, out=others[:count])
        torch.mm(logits[:count], given.head, out=to_states[rows])
        to_head.addmm_(logits[:count].T, given.states[rows])


def run_ours(given: Inputs, shape: Shape) -> None:
    """Forward and backward pass as stage 1 does them."""
    kl = consistency_kl(*vars(given).values(), chunk_size=shape.chunk)
    (kl.sum() / shape.tokens).backward()


def run_ours_frozen_head(given: Inputs, shape: Shape) -> None:
    """As `run_ours` where the output layer is not trained."""
    given.head.requires_grad_(requires_grad=False)
    run_ours(given, shape)


@torch.no_grad()
def run_ours_no_gradient(given: Inputs, shape: Shape) -> None:
    """As stage 2 makes labels."""
    consistency_kl(*vars(given).values(), chunk_size=shape.chunk).sum()


def run_naive(given: Inputs, shape: Shape) -> None:
    """Make both logits whole, as the outputs of two models, and leave the rest to autograd."""
    with torch.no_grad():
        reference_logits = given.reference @ given.reference_head.T
    logits = given.states @ given.head.T
    _naive_kl(log_softmax(logits, -1), log_softmax(reference_logits, -1)).div(shape.tokens).backward()


def run_naive_freed(given: Inputs, shape: Shape) -> None:
    """As `run_naive`, but free the logits after their softmax."""
    with torch.no_grad():
        log_p = log_softmax(given.reference @ given.reference_head.T, -1)
    log_q = log_softmax(given.states @ given.head.T, -1)
    _naive_kl(log_q, log_p).div(shape.tokens).backward()


def _naive_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum()


def run_liger(given: Inputs, shape: Shape) -> None:
    """Run the pure PyTorch loss of liger-kernel; with beta 0 its JSD is KL(reference || policy)."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=shape.chunk
    )
    labels = torch.zeros(shape.tokens, dtype=torch.long)
    loss(given.states, given.head, given.reference, given.reference_head, labels).backward()


RUNS: dict[str, Callable[[Inputs, Shape], None]] = {
    "floor": run_floor,
    "ours": run_ours,
    "ours_frozen_head": run_ours_frozen_head,
    "ours_no_gradient": run_ours_no_gradient,
    "naive": run_naive,
    "naive_freed": run_naive_freed,
    "liger": run_liger,
}


# --- One measurement, in its own process --------------------------------------------------------------------


def measure(name: str, shape: Shape) -> dict[str, float]:
    """Run an implementation once; return seconds of processor time and MiB of memory above the inputs."""
    torch.set_num_threads(1)
    if name == "liger":
        import liger_kernel.chunked_loss  # noqa: F401 - its memory is not the loss's
    small = Shape(tokens=4, vocab=64, width=8, chunk=2)
    RUNS[name](draw_inputs(small), small)  # triggers lazy loading
    given = draw_inputs(shape)
    return harness.measure(lambda: RUNS[name](given, shape))


def measure_apart(name: str, shape: Shape) -> dict[str, float]:
    """Call `measure` in a new process with no memory left from earlier ones."""
    settings = [f"--{key}={value}" for key, value in asdict(shape).items()]
    return harness.measure_apart(__file__, name, *settings)


# --- Rounding error -----------------------------------------------------------------------------------------


def rounding_errors(
    *, tokens: int = 64, vocab: int = 32_000, width: int = 1024, device: str = "cpu"
) -> dict[str, float]:
    """Return relative errors of the value and gradients for bfloat16 states and heads near `KL_NATS` a token.

    The truth is float64 on the same bfloat16 numbers. `logits_bf16_*` is what logits rounded to bfloat16, as
    a model's forward pass returns them, would give.
    """
    generator = torch.Generator().manual_seed(0)
    head = (torch.randn(vocab, width, generator=generator) * width**-0.5).bfloat16()
    reference = torch.randn(tokens, width, generator=generator).bfloat16()
    step = math.sqrt(2 * KL_NATS) * torch.randn(tokens, width, generator=generator)  # KL is half its variance
    states = (reference.float() + step).bfloat16()
    states, head, reference = (tensor.to(device) for tensor in (states, head, reference))
    exact = _whole_kl(*(tensor.double() for tensor in (states, head, reference)))
    ours = _with_gradients(states, head, lambda s, h: consistency_kl(s, h, reference, head))
    rounded = _whole_kl(states, head, reference)
    names = ("value", "states_gradient", "head_gradient")
    errors = {"kl_nats": exact[0].mean().item()}
    for kind, results in (("ours", ours), ("logits_bf16", rounded)):
        pairs = zip(names, results, exact, strict=True)
        errors |= {f"{kind}_{name}": _relative_error(mine, true) for name, mine, true in pairs}
    return errors


def _whole_kl(states: Tensor, head: Tensor, reference: Tensor) -> list[Tensor]:
    """Return the divergence and its gradients; logits have the operands' type, the rest float32 or more."""
    dtype = torch.promote_types(states.dtype, torch.float32)

    def divergence(states: Tensor, weight: Tensor) -> Tensor:
        log_q = log_softmax((states @ weight.T).to(dtype), -1)
        log_p = log_softmax((reference @ head.T).to(dtype), -1)
        return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    return _with_gradients(states, head, divergence)


def _with_gradients(states: Tensor, head: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in (states, head)]
    kl = loss(*leaves)
    return [kl.detach(), *torch.autograd.grad(kl.sum(), leaves)]


def _relative_error(measured: Tensor, exact: Tensor) -> float:
    return ((measured.double() - exact).norm() / exact.norm()).item()


# --- All of it ----------------------------------------------------------------------------------------------


def available() -> list[str]:
    """Name the implementations that run here; liger-kernel is no dependency of ours."""
    return [name for name in RUNS if name != "liger" or harness.installed("liger-kernel")]


def measure_rounds(shape: Shape, *, rounds: int) -> list[Round]:
    """Measure the implementations in turn; later rounds skip those of less interest."""
    results = []
    for number in range(rounds):
        names = [name for name in available() if number < LEAVES_AFTER.get(name, rounds)]
        results.append({name: measure_apart(name, shape) for name in names})
        taken = (f"{name} {m['cpu_s']:.2f} s {m['peak_mib']:.0f} MiB" for name, m in results[-1].items())
        sys.stdout.write(f"round {number + 1} of {rounds}: {', '.join(taken)}\n")
        sys.stdout.flush()
    return results


def ratio(rounds: list[Round], quantity: str, over: str) -> float:
    """Return the median over rounds of ours over another."""
    # Tiny shapes take no memory that could be measured.
    return median(r["ours"][quantity] / max(r[over][quantity], 0.01) for r in rounds if over in r)


def figures(rounds: list[Round], errors: dict[str, float], shape: Shape) -> harness.Figures:
    """Return each figure with its goal."""
    bound = 4 * shape.vocab * (shape.width + 4 * shape.chunk) / 2**20  # float32: head's gradient, four chunks
    measured = {
        "kl_time_over_floor": ratio(rounds, "cpu_s", "floor"),
        "kl_memory_over_naive": ratio(rounds, "peak_mib", "naive"),
        "kl_memory_over_bound": median(r["ours"]["peak_mib"] for r in rounds) / bound,
        "kl_error_bf16": max(value for name, value in errors.items() if name.startswith("ours_")),
    }
    if "liger" in rounds[0]:
        measured["kl_time_over_liger"] = ratio(rounds, "cpu_s", "liger")
        measured["kl_memory_over_liger"] = ratio(rounds, "peak_mib", "liger")
    return harness.figures_of(measured, GOALS)


def command(shape: Shape, *, rounds: int) -> str:
    """Return the command that measures a shape."""
    settings = [f"--{key}={value}" for key, value in asdict(shape).items() if value != getattr(Shape(), key)]
    if not settings and rounds == ROUNDS:
        return harness.ALL
    return shlex.join(["python", "benchmarks/kl.py", f"--rounds={rounds}", *settings])


def tables(details: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    shape, rounds = details["shape"], details["rounds"]
    lines = [
        f"R = {shape['tokens']} tokens, V = {shape['vocab']} words, D = {shape['width']}, chunks of "
        f"{shape['chunk']}, float32;",
        *harness.heading(details),
        *harness.figure_table(details["figures"], GOALS),
        "| implementation | processor time, s (lowest to highest) | runs | memory above inputs, MiB |",
        "|---|---|---|---|",
        *(_row(name, [r[name] for r in rounds if name in r]) for name in rounds[0]),
        "",
        _error_sentence(details["errors"]),
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, runs: list[dict[str, float]]) -> str:
    times, peak = [r["cpu_s"] for r in runs], median(r["peak_mib"] for r in runs)
    spread = f"{median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
    return f"| {TITLES[name]} | {spread} | {len(runs)} | {peak:.0f} |"


def _error_sentence(errors: dict[str, float]) -> str:
    def shares(kind: str) -> str:
        names = ("value", "states_gradient", "head_gradient")
        return ", ".join(f"{name.replace('_', ' ')} {100 * errors[f'{kind}_{name}']:.2f} %" for name in names)

    return (
        f"Relative error with bfloat16 operands at {errors['kl_nats']:.1e} nats per token: {shares('ours')}; "
        f"with logits rounded to bfloat16: {shares('logits_bf16')}."
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = harness.parser("Measure the consistency loss.")
    for key, value in asdict(Shape()).items():
        parser.add_argument(f"--{key}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--measure", choices=RUNS, help="one measurement in this process, as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one measurement, or all and write the results."""
    given = parse(arguments)
    shape = Shape(**{key: getattr(given, key) for key in asdict(Shape())})
    if given.measure:
        sys.stdout.write(json.dumps(measure(given.measure, shape)))
        return
    torch.set_num_threads(1)
    errors = rounding_errors(tokens=min(64, shape.tokens), vocab=min(32_000, shape.vocab))
    rounds = measure_rounds(shape, rounds=given.rounds)
    harness.publish(
        "kl",
        given,
        figures=figures(rounds, errors, shape),
        details={"shape": asdict(shape), "rounds": rounds, "errors": errors},
        tables=tables,
        command=command(shape, rounds=given.rounds),
        packages=["liger-kernel"],
    )


if __name__ == "__main__":
    main()
