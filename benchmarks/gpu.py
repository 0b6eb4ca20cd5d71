"""All that can only be measured on a GPU, in one command: `make gpu-check`, under 8 minutes on one GPU.

The tests that need a GPU; a step of both stages at the shape of InternVL3.5-1B with random weights, from its
recipes; the consistency loss against other implementations; and a run that is stopped and resumed.
`--dry-run` runs the same code, much smaller, on the CPU; nothing that it measures is worth reading.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import harness
import kl
import scaling
import torch
from gpu_device import (
    CASES,
    FLASH,
    OURS,
    ROOT,
    Size,
    attempt,
    dry_size,
    full_size,
    measure_losses,
    measure_step,
)
from harness import Goal
from safetensors.torch import load_file

COMMAND = "make gpu-check"
GOALS: dict[str, Goal | None] = {
    "gpu_check_s": Goal(480),
    "gpu_failures": Goal(0),
    "gpu_plan_memory_error": Goal(0.10),
    "gpu_stage_1_tokens_per_s": None,
    "gpu_stage_1_mfu": None,
    "gpu_stage_2_tokens_per_s": None,
    "gpu_stage_2_mfu": None,
    "gpu_flash_speedup": None,
    "gpu_kl_error_bf16": Goal(0.01),
    "gpu_kl_time_over_naive": None,
    "gpu_kl_memory_over_naive": None,
    "gpu_kl_time_over_liger": None,
    "gpu_kl_memory_over_liger": None,
    "gpu_resume_difference": None,
}


# --- Tests --------------------------------------------------------------------------------------------------


def run_tests(folder: str) -> dict[str, int]:
    """Run the tests that need a GPU; returns how many passed, failed and were skipped."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        subprocess.run([sys.executable, "-m", "pytest", *options, folder], cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    found = Counter(next((outcomes[e.tag] for e in case if e.tag in outcomes), "passed") for case in cases)
    return {outcome: found[outcome] for outcome in ("passed", "failed", "skipped")}


# --- Stop and resume ----------------------------------------------------------------------------------------


def measure_resume(size: Size) -> dict[str, Any]:
    """Stop a run by a signal, resume it, and compare its weights with those of an uninterrupted run."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scaling.prepare(folder, size.run_shape)
        whole, stopped = (_run(folder / name, size) for name in ("whole", "stopped"))
        scaling.finish([whole])
        running = subprocess.Popen(stopped, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        metrics = folder / "stopped" / "metrics.jsonl"
        while running.poll() is None and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
        code, steps = running.wait(), len(metrics.read_text().splitlines())
        if code != 0 or (folder / "stopped" / "model").exists():
            raise RuntimeError(f"the run was to stop early with code 0; it did {steps} steps, code {code}")
        scaling.finish([stopped])
        ours, theirs = (
            load_file(folder / name / "model" / "model.safetensors") for name in ("whole", "stopped")
        )
    differences = [(ours[name].double() - theirs[name].double()).abs().max().item() for name in ours]
    return {"steps": size.run_steps, "stopped_at": steps, "difference": max(differences)}


def _run(run_dir: Path, size: Size) -> list[str]:
    settings = {
        "run_dir": run_dir,
        "trainer.accelerator": "gpu" if size.device == "cuda" else "cpu",
        "trainer.devices": 1,
        "trainer.precision": "bf16-mixed",
        "trainer.max_steps": size.run_steps,
    }
    recipe = str(run_dir.parent / "recipe.yaml")
    return [*scaling.TRAIN, recipe, *(f"{key}={value}" for key, value in settings.items())]


# --- All of it ----------------------------------------------------------------------------------------------


def measure_all(size: Size) -> dict[str, Any]:
    """Measure everything, in turn; each part reports when it is done."""
    begun, details = time.perf_counter(), {"loss_shape": vars(size.loss)}
    errors = partial(
        kl.rounding_errors,
        tokens=min(64, size.loss.tokens),
        vocab=min(32_000, size.loss.vocab),
        device=size.device,
    )
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "tests": partial(run_tests, size.tests),
        "steps": lambda: {case: attempt(partial(measure_step, case, size)) for case in CASES},
        "losses": partial(measure_losses, size),
        "errors": errors,
        "resume": partial(measure_resume, size),
    }
    for name, part in parts.items():
        details[name] = attempt(part)
        sys.stdout.write(f"{name}: done after {time.perf_counter() - begun:.0f} s\n")
        sys.stdout.flush()
    return {**details, "seconds": time.perf_counter() - begun}


def failures(details: dict[str, Any]) -> list[str]:
    """Name what failed, of tests and measurements."""
    tried = {**details, **details["steps"], **details["losses"]}
    return [name for name, found in tried.items() if isinstance(found, dict) and found.get("failed")]


def figures(details: dict[str, Any]) -> harness.Figures:
    """Return each figure with its goal; those of packages and GPUs that are not there are left out."""
    steps, losses = (
        {name: found for name, found in details[part].items() if "s" in found} for part in ("steps", "losses")
    )
    measured = {"gpu_check_s": details["seconds"], "gpu_failures": len(failures(details))}
    if steps:
        measured["gpu_plan_memory_error"] = max(abs(plan_error(step)) for step in steps.values())
    for stage in ("stage 1", "stage 2"):
        for quantity in ("tokens_per_s", "mfu"):
            measured[f"gpu_{stage.replace(' ', '_')}_{quantity}"] = steps.get(stage, {}).get(quantity)
    if {"stage 1", FLASH} <= steps.keys():
        measured["gpu_flash_speedup"] = steps[FLASH]["tokens_per_s"] / steps["stage 1"]["tokens_per_s"]
    measured["gpu_kl_error_bf16"] = max(
        (v for n, v in details["errors"].items() if "ours_" in n), default=None
    )
    for other in {"naive", "liger"} & losses.keys() if OURS in losses else ():
        measured[f"gpu_kl_time_over_{other}"] = losses[OURS]["s"] / losses[other]["s"]
        memory = max(losses[other]["peak_mib"], 0.01)  # tiny shapes take none
        measured[f"gpu_kl_memory_over_{other}"] = losses[OURS]["peak_mib"] / memory
    measured["gpu_resume_difference"] = details["resume"].get("difference")
    return harness.figures_of(
        {name: measured[name] for name in GOALS if measured.get(name) is not None}, GOALS
    )


def plan_error(step: dict[str, Any]) -> float:
    """Return the relative error of the predicted memory."""
    return step["predicted_mib"] / max(step["peak_mib"], 0.01) - 1


def tables(content: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    shape, tests = content["loss_shape"], content["tests"]
    sizes = f"R = {shape['tokens']}, V = {shape['vocab']}, D = {shape['width']}"
    lines = [
        *harness.heading(content),
        *harness.figure_table(content["figures"], GOALS),
        "| step of a micro-batch | samples | s | tokens/s | TFLOP/s | MFU | peak, MiB | plan, MiB | off by |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(case, step, _step_cells, columns=8) for case, step in content["steps"].items()),
        "",
        f"| loss in bfloat16, {sizes} | ms | peak, MiB |",
        "|---|---|---|",
        *(_row(name, loss, _loss_cells, columns=2) for name, loss in content["losses"].items()),
        "",
        f"Tests that need a GPU: {', '.join(f'{count} {outcome}' for outcome, count in tests.items())}.",
        _resume_sentence(content["resume"]),
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, found: dict[str, Any], cells: Callable[[Any], Sequence[str]], *, columns: int) -> str:
    reasons = [f"{why}: {found[why]}" for why in ("skipped", "failed") if why in found]
    shown = [*reasons, *[""] * (columns - 1)] if reasons else cells(found)
    return f"| {' | '.join([name, *shown])} |"


def _step_cells(step: dict[str, Any]) -> list[str]:
    mfu = "unknown" if step["mfu"] is None else f"{100 * step['mfu']:.1f} %"
    speed = [f"{step['s']:.3f}", f"{step['tokens_per_s']:.0f}", f"{step['tflops']:.1f}", mfu]
    memory = [f"{step['peak_mib']:.0f}", f"{step['predicted_mib']:.0f}", f"{100 * plan_error(step):+.1f} %"]
    return [str(step["micro_batch"]["num_samples"]), *speed, *memory]


def _loss_cells(loss: dict[str, float]) -> list[str]:
    return [f"{1000 * loss['s']:.2f}", f"{loss['peak_mib']:.0f}"]


def _resume_sentence(resume: dict[str, Any]) -> str:
    if "failed" in resume:
        return f"Stop and resume failed: {resume['failed']}."
    return (
        f"A run of {resume['steps']} steps, stopped by a signal after {resume['stopped_at']} and resumed: "
        f"its weights differ from those of an uninterrupted run by at most {resume['difference']:.2g}."
    )


@contextmanager
def _copy_of(page: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a folder for results and a copy of the page, both temporary: a dry run leaves nothing."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "README.md"
        shutil.copy(page, copy)
        yield Path(folder), copy


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results; returns the exit code: 0, 1 if something failed, 2 without a GPU."""
    parser = harness.parser("Measure all that needs a GPU.")
    parser.add_argument(
        "--dry-run", action="store_true", help="the same, tiny, on the CPU; writes no results"
    )
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        sys.stderr.write(
            "PyTorch sees no CUDA GPU; run this on a machine that has one, or try --dry-run on the CPU.\n"
        )
        return 2
    size = dry_size() if given.dry_run else full_size()
    torch.set_num_threads(1)
    details = measure_all(size)
    write = {"figures": figures(details), "details": details, "tables": tables, "command": COMMAND}
    write["packages"] = ["lightning", "transformers", "liger-kernel", "flash-attn"]
    if given.dry_run:
        with _copy_of(given.page) as (output, page):
            harness.publish("gpu", argparse.Namespace(output=output, page=page), **write)
    else:
        harness.publish("gpu", given, **write, used=f"one {torch.cuda.get_device_name()}")
    return 1 if failures(details) else 0


if __name__ == "__main__":
    sys.exit(main())
