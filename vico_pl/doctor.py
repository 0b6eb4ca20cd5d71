"""Checks of the machine and of a recipe before a run.

A check returns what it found, or raises ValueError with the problem and its remedy.
"""

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.metadata import distributions, requires
from pathlib import Path

import torch
from packaging.requirements import Requirement

from vico_pl.callbacks.guards import StopSignals
from vico_pl.config import RunConfig, load_config
from vico_pl.data.module import SourceConfig, ValidationConfig
from vico_pl.data.shards.cache import StreamingConfig
from vico_pl.data.shards.reader import read_index, read_samples
from vico_pl.evaluation.questions import describe
from vico_pl.model.families.folder import check_tensors, open_folder, own_tensors
from vico_pl.model.families.hub import is_hub_id
from vico_pl.model.flops import build_without_weights
from vico_pl.planning.plan import GIB, Plan, build_plan
from vico_pl.planning.sources import find_config
from vico_pl.prepare import complete_config
from vico_pl.stages import STAGES
from vico_pl.tokens import load_tokenizer
from vico_pl.trainer import build_trainer

PACKAGE = "vico-pl"
MIN_SHARED_GIB = 1.0  # of /dev/shm, through which data workers pass batches


def examine(
    recipe: Path | None,
    overrides: Sequence[str],
    *,
    held_out: Sequence[str] = (),
    write: Callable[[str], None],
) -> bool:
    """Run all checks and write a line for each; returns whether there is a problem."""
    failed = False
    for name, check in checks(recipe, overrides, held_out=held_out):
        try:
            line = f"ok: {name}: {check()}"
        except Exception as error:  # a bug in one check must not hide the others
            failed, kind = True, type(error).__name__
            problem = " ".join(str(error).split()) or kind
            if not isinstance(error, ValueError | OSError):
                problem = f"the check itself failed with {kind}: {problem}; please report it"
            line = f"problem: {name}: {problem}"
        write(line)
    return failed


def checks(
    recipe: Path | None, overrides: Sequence[str], *, held_out: Sequence[str]
) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the checks of the machine and, if the recipe can be loaded, of the recipe."""
    yield "python", platform.python_version
    yield "packages", _check_packages
    yield "devices", _check_devices
    yield "memory", lambda: f"{_num_cores()} cores, {_available_gib():.0f} GiB of memory available"
    yield "/dev/shm", _check_shared_memory
    for data in held_out:
        yield "held-out data", partial(describe, data)
    if recipe is None:
        yield "slurm", _check_slurm
        return
    load = cache(partial(load_config, recipe, overrides))
    yield "recipe", lambda: _describe(load())
    try:
        config = load()
    except (ValueError, OSError):  # reported by the check above
        return
    yield "slurm", partial(_check_slurm, config)
    yield "workers", partial(_check_workers, config)
    sources: list[SourceConfig | ValidationConfig] = [*config.data.sources, *config.data.validation]
    for source in sources:
        yield "shards", partial(_check_shards, source, config.data.streaming)
    for path in filter(None, dict.fromkeys([config.model.path, config.model.reference])):
        yield "model", partial(_check_model, path)
    yield "kernels", partial(_check_trainer, config)
    plan = cache(partial(build_plan, config))  # for the two checks that need it
    yield "run folder", partial(_check_run_dir, recipe, overrides, plan)
    yield "memory of the run", partial(_check_fit, config, plan)


def _check_packages() -> str:
    """Compare the installed packages with what the package needs; `!=` excludes faulty releases."""
    needed = [Requirement(line) for line in requires(PACKAGE) or []]
    needed = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    found = {r.name: next((d.version for d in distributions(name=r.name)), "") for r in needed}
    problems = [
        f"{r.name} is {found[r.name] or 'not installed'}; pip install '{r}'"
        for r in needed
        if not found[r.name] or not r.specifier.contains(found[r.name], prereleases=True)
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return f"{len(needed)} as needed, torch {found['torch']}, lightning {found['lightning']}"


def _check_devices() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        half = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16: use trainer.precision=32-true"
        return f"{len(names)} GPUs ({', '.join(dict.fromkeys(names))}), {half}"
    if not Path("/proc/driver/nvidia/version").exists():
        return "no GPU; runs use the CPU"
    fault = "is built for the CPU; install torch with CUDA"
    if cuda := torch.version.cuda:
        remedy = "update the driver, install a torch for an older CUDA, or check CUDA_VISIBLE_DEVICES"
        fault = f"(CUDA {cuda}) sees none; {remedy}"
    raise ValueError(f"the machine has NVIDIA GPUs, but this torch {fault}")


def _check_shared_memory() -> str:
    path = Path("/dev/shm")
    gib = shutil.disk_usage(path).total / GIB if path.is_dir() else 0.0
    if gib < MIN_SHARED_GIB:  # containers often limit it
        raise ValueError(
            f"{gib:.2f} GiB, but data workers pass batches through it; give the container more "
            "(docker run --shm-size=8g), or set data.num_workers=0"
        )
    return f"{gib:.0f} GiB"


def _check_slurm(config: RunConfig | None = None) -> str:
    """Compare the Slurm job with the recipe: as many nodes, and one task per device."""
    if "SLURM_JOB_ID" not in os.environ:
        return "not under Slurm"
    absent = [command for command in ("srun", "scontrol") if shutil.which(command) is None]
    if absent:
        raise ValueError(f"{', '.join(absent)} not found: preempted runs are not requeued; fix PATH")
    nodes, tasks = os.environ.get("SLURM_JOB_NUM_NODES", "1"), os.environ.get("SLURM_NTASKS", "1")
    if config is not None:
        wanted = config.trainer.num_nodes
        ranks = wanted * _ranks_per_node(config)
        if nodes != str(wanted):
            raise ValueError(
                f"the job has {nodes} nodes, trainer.num_nodes is {wanted}; set one to the other"
            )
        if tasks != str(ranks):
            raise ValueError(
                f"the job has {tasks} tasks, but the recipe takes {ranks} processes "
                f"({config.trainer.devices} devices on {wanted} nodes); set --ntasks-per-node to the devices "
                "of a node"
            )
    return f"job {os.environ['SLURM_JOB_ID']}, {tasks} tasks"


def _check_workers(config: RunConfig) -> str:
    ranks, cores, workers = _ranks_per_node(config), _num_cores(), config.data.num_workers
    if workers * ranks > cores:
        raise ValueError(
            f"data.num_workers is {workers} for each of {ranks} processes, but there are {cores} cores; "
            f"set data.num_workers={max(cores // ranks, 1)} or ask for more cores"
        )
    return f"{workers * ranks} on {cores} cores"


def _check_shards(source: SourceConfig | ValidationConfig, streaming: StreamingConfig) -> str:
    path, prompt = source.path, source.caption_prompt
    count = read_index(path, streaming=streaming).num_samples
    if next(read_samples(path, streaming=streaming, caption_prompt=prompt), None) is None:
        raise ValueError(f"{path}: no usable sample; 'vico shards check {path}' lists the faults")
    return f"{path}: {count} samples, the first decodes"


def _check_model(path: str) -> str:
    """Open a model folder: its tokenizer, and the name and shape of every tensor."""
    file = find_config(path)
    if file is None and is_hub_id(path):
        return f"{path}: will be fetched from the Hugging Face Hub"
    folder = Path(path) if file is None else file.parent
    opened = open_folder(folder)
    load_tokenizer(folder)
    model = build_without_weights(opened.contents.spec)
    model.language.tie_weights()
    check_tensors(opened, own_tensors(model))
    return f"{path}: layout {opened.family.name}, {len(opened.tensors.names)} tensors fit, tokenizer complete"


def _check_trainer(config: RunConfig) -> str:
    """Check accelerator, devices, strategy and kernels as `vico train` does."""
    device = build_trainer(config, StopSignals()).strategy.root_device
    STAGES[config.stage].check_device(config, device)
    return f"run on {device.type}"


def _check_run_dir(recipe: Path, overrides: Sequence[str], make_plan: Callable[[], Plan]) -> str:
    """Check that a run can begin or resume there: its settings, write permission, room for checkpoints."""
    config = load_config(recipe, overrides)
    if not any(is_hub_id(path or "") for path in (config.model.path, config.model.reference)):
        config = complete_config(recipe, overrides)  # would fetch models from the Hub
    folder = Path(config.run_dir)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{existing} cannot be written to; set run_dir to another folder")
    free, needed = shutil.disk_usage(existing).free / GIB, make_plan().figures["run_dir_gib"]
    if free < needed:
        raise ValueError(
            f"{existing} has {free:.1f} GiB free, checkpoints take {needed:.1f}; free some, set run_dir, or "
            "lower trainer.keep_checkpoints"
        )
    return f"{free:.0f} GiB free, {needed:.1f} GiB needed"


def _check_fit(config: RunConfig, make_plan: Callable[[], Plan]) -> str:
    needed = sum(make_plan().memory["1 GPU"].values())
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator in ("auto", "gpu", "cuda")
    available = torch.cuda.get_device_properties(0).total_memory / GIB if on_gpu else _available_gib()
    if needed > available:
        raise ValueError(
            f"a micro-batch takes {needed:.1f} GiB without FSDP, there are {available:.1f}; "
            "'vico plan' shows what fits"
        )
    return f"{needed:.1f} GiB of {available:.0f}"


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _available_gib() -> float:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) / 2**20 if found else 0.0


def _describe(config: RunConfig) -> str:
    stage, steps, samples = STAGES[config.stage], config.trainer.max_steps, config.data.batch_size
    warnings = [f"but {problem}" for problem in stage.doubtful_settings(config)]
    return ", ".join([f"stage {stage.name}, {steps} steps of {samples} samples", *warnings])


def _ranks_per_node(config: RunConfig) -> int:
    devices = config.trainer.devices
    return max(torch.cuda.device_count(), 1) if devices == "auto" else int(devices)
