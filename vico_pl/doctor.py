"""What would stop a run, found before it begins: each check is a line, and no check stops the others.

A check returns what it found, in a few words; what it finds wrong it raises as one sentence with its remedy.
"""

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vico_pl.config import load_config
from vico_pl.data.shards.inspect import read_samples
from vico_pl.data.shards.reader import read_index
from vico_pl.losses.liger import check_liger
from vico_pl.model.families.base import CONFIG_NAME
from vico_pl.model.families.folder import check_tensors, open_folder, own_tensors
from vico_pl.model.families.hub import is_hub_id, split_revision
from vico_pl.model.flops import build_without_weights
from vico_pl.model.language import check_flash_attention
from vico_pl.planning.memory import GIB
from vico_pl.planning.plan import Layout, Plan, build_plan
from vico_pl.recipe import RunConfig
from vico_pl.tokens import load_tokenizer

PACKAGE = "vico-pl"
KNOWN_BAD = {
    ("lightning", "2.6.2"): "this release was compromised",
    ("lightning", "2.6.3"): "this release was compromised",
    ("pytorch-lightning", "2.6.2"): "this release was compromised",
    ("pytorch-lightning", "2.6.3"): "this release was compromised",
    ("torch", "2.13.0"): "no torchvision imports with this release",
}
MIN_SHARED_GIB = 1.0  # of /dev/shm, through which workers hand over batches

Check = Callable[[], str]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found."""

    name: str
    detail: str
    problem: bool

    def __str__(self) -> str:
        return f"{'problem' if self.problem else 'ok'}: {self.name}: {self.detail}"


def examine(recipe: Path | None, overrides: Sequence[str], *, write: Callable[[str], None]) -> bool:
    """Run all checks and write a line for each; returns whether there is a problem."""
    found = False
    for name, check in checks(recipe, overrides):
        finding = find(name, check)
        write(str(finding))
        found |= finding.problem
    return found


def find(name: str, check: Check) -> Finding:
    """Run one check, whatever happens in it."""
    try:
        return Finding(name=name, detail=check(), problem=False)
    except (ValueError, OSError) as error:
        return Finding(name=name, detail=_one_line(error), problem=True)
    except Exception as error:  # whatever it is, the other checks still run
        detail = f"the check itself failed with {type(error).__name__}: {_one_line(error)}; please report it"
        return Finding(name=name, detail=detail, problem=True)


def checks(recipe: Path | None, overrides: Sequence[str]) -> Iterator[tuple[str, Check]]:
    """Yield the checks of the environment, and those of a recipe that can be loaded."""
    yield "python", check_python
    yield "packages", check_packages
    yield "devices", check_devices
    yield "memory", check_memory
    yield "/dev/shm", check_shared_memory
    if recipe is None:
        yield "slurm", partial(check_slurm, os.environ)
        return
    yield "recipe", partial(check_recipe, recipe, overrides)
    try:
        config = load_config(recipe, overrides)
    except (ValueError, OSError):  # the check above has told it
        return
    yield from recipe_checks(config)


def recipe_checks(config: RunConfig) -> Iterator[tuple[str, Check]]:
    """Yield the checks of a recipe."""
    yield "slurm", partial(check_slurm, os.environ, config)
    yield "workers", partial(check_workers, config)
    for source in config.data.sources:
        yield "shards", partial(check_shards, source.path)
    named = [config.model.path] + [config.model.reference] * (config.model.reference != config.model.path)
    for path in named:
        if path is not None:
            yield "model", partial(check_model, path)
    if config.model.attention == "flash":
        yield "attention", check_attention
    if config.stage == "consistency" and config.consistency.kernel == "liger":
        yield "loss kernel", check_kernel
    plan = cache(partial(build_plan, config))  # made by the first that needs it
    yield "run folder", partial(check_run_dir, config, plan)
    yield "memory of the run", partial(check_fit, config, plan)


def check_python() -> str:
    """Hold Python against what the project needs."""
    found, needed = platform.python_version(), SpecifierSet(metadata(PACKAGE)["Requires-Python"])
    if not needed.contains(found, prereleases=True):
        raise ValueError(f"Python is {found}, needed is {needed}; make PYTHON=/path/to/python3 env")
    return found


def check_packages() -> str:
    """Hold the versions of installed packages against what the project needs."""
    needed = [Requirement(line) for line in requires(PACKAGE) or []]
    needed = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    problems = [problem for r in needed for problem in _package_problems(r)]
    problems += [_bad(name, number) for name, number in KNOWN_BAD if _installed(name) == number]
    if problems:
        raise ValueError("; ".join(dict.fromkeys(problems)))
    return f"{len(needed)} as needed, torch {_installed('torch')}, lightning {_installed('lightning')}"


def check_devices() -> str:
    """Say which GPUs there are, and whether PyTorch can use those that the machine has."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        half = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16: use trainer.precision=32-true"
        return f"{len(names)} GPUs ({', '.join(dict.fromkeys(names))}), {half}"
    if not Path("/proc/driver/nvidia/version").exists():
        return "no GPU; runs use the CPU"
    if torch.version.cuda is None:
        raise ValueError(
            "the machine has NVIDIA GPUs, but this torch is built for the CPU; install torch with CUDA"
        )
    raise ValueError(
        f"the machine has NVIDIA GPUs, but torch (CUDA {torch.version.cuda}) sees none; update the driver, "
        "install a torch for an older CUDA, or look at CUDA_VISIBLE_DEVICES"
    )


def check_memory() -> str:
    """Say how many cores and how much memory this process may use."""
    return f"{num_cores()} cores, {_available_gib():.0f} GiB of memory available"


def check_shared_memory() -> str:
    """Look at /dev/shm, which containers often have too little of."""
    gib = shared_gib()
    if gib < MIN_SHARED_GIB:
        raise ValueError(
            f"{gib:.2f} GiB, but data workers hand over batches through it; give the container more "
            "(docker run --shm-size=8g), or set data.num_workers=0"
        )
    return f"{gib:.0f} GiB"


def check_recipe(recipe: Path, overrides: Sequence[str]) -> str:
    """Load the recipe."""
    config = load_config(recipe, overrides)
    return f"stage {config.stage}, {config.trainer.max_steps} steps of {config.data.batch_size} samples"


def check_slurm(environment: Mapping[str, str], config: RunConfig | None = None) -> str:
    """Hold the job that Slurm gave against the recipe: one task per device, on as many nodes."""
    if "SLURM_JOB_ID" not in environment:
        return "not under Slurm"
    absent = [command for command in ("srun", "scontrol") if shutil.which(command) is None]
    if absent:
        raise ValueError(f"{', '.join(absent)} not found: preempted runs are not requeued; mend PATH")
    if config is not None:
        _check_tasks(environment, config)
    return f"job {environment['SLURM_JOB_ID']}, {environment.get('SLURM_NTASKS', '1')} tasks"


def check_workers(config: RunConfig) -> str:
    """Hold data workers against cores."""
    ranks, cores = _ranks_per_node(config), num_cores()
    workers = config.data.num_workers * ranks
    if workers > cores:
        raise ValueError(
            f"data.num_workers is {config.data.num_workers} for each of {ranks} processes, but there are "
            f"{cores} cores; set data.num_workers={max(cores // ranks, 1)} or ask for more cores"
        )
    return f"{workers} on {cores} cores"


def check_shards(path: str) -> str:
    """Open the index and decode the first record."""
    count = read_index(path).num_samples
    sample = next(islice(read_samples(Path(path)), 1), None)
    if sample is None:
        raise ValueError(f"{path}: no usable sample; 'vico shards check {path}' names the faults")
    return f"{path}: {count} samples, the first decodes"


def check_model(path: str) -> str:
    """Open a model folder: its tokenizer, and the name and shape of every tensor."""
    folder = Path(path)
    if is_hub_id(path):
        name, revision = split_revision(path)
        cached = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
        if not isinstance(cached, str):
            return f"{path}: will be fetched from the Hugging Face Hub"
        folder = Path(cached).parent
    opened = open_folder(folder)
    load_tokenizer(folder)
    model = build_without_weights(opened.contents.spec)
    model.language.tie_weights()
    wanted = {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()}
    check_tensors(opened, opened.family.parts(wanted), wanted)
    return f"{path}: layout {opened.family.name}, {len(opened.tensors.names)} tensors fit, tokenizer complete"


def check_attention() -> str:
    """Say whether flash attention can run."""
    check_flash_attention(_device())
    return "flash-attn is installed"


def check_kernel() -> str:
    """Say whether liger-kernel can compute the loss."""
    check_liger(_device())
    return "liger-kernel is installed"


def check_run_dir(config: RunConfig, make_plan: Callable[[], Plan]) -> str:
    """Look for the right to write and for room for checkpoints."""
    folder = Path(config.run_dir)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{existing} cannot be written to; set run_dir to another folder")
    free, needed = shutil.disk_usage(existing).free / GIB, make_plan().disk_gib
    if free < needed:
        raise ValueError(
            f"{existing} has {free:.1f} GiB free, checkpoints take {needed:.1f}; free some, set run_dir, or "
            "lower trainer.keep_checkpoints"
        )
    return f"{free:.0f} GiB free, {needed:.1f} GiB needed"


def check_fit(config: RunConfig, make_plan: Callable[[], Plan]) -> str:
    """Hold the memory that the plan tells against that of the device."""
    plan = make_plan()
    needed = plan.gib(Layout(world=1, sharded=False), checkpointing=config.trainer.activation_checkpointing)
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator in ("auto", "gpu", "cuda")
    has = torch.cuda.get_device_properties(0).total_memory / GIB if on_gpu else _available_gib()
    if needed > has:
        raise ValueError(
            f"a micro-batch takes {needed:.1f} GiB without FSDP, there are {has:.1f}; 'vico plan' says what fits"
        )
    return f"{needed:.1f} GiB of {has:.0f}"


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def shared_gib() -> float:
    """Return the size of /dev/shm; 0 where there is none."""
    path = Path("/dev/shm")
    return shutil.disk_usage(path).total / GIB if path.is_dir() else 0.0


def _available_gib() -> float:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) / 2**20 if found else 0.0


def _ranks_per_node(config: RunConfig) -> int:
    devices = config.trainer.devices
    if devices.isdigit():
        return max(int(devices), 1)
    return max(torch.cuda.device_count(), 1)


def _check_tasks(environment: Mapping[str, str], config: RunConfig) -> None:
    nodes, wanted = environment.get("SLURM_JOB_NUM_NODES", "1"), config.trainer.num_nodes
    if nodes != str(wanted):
        raise ValueError(f"the job has {nodes} nodes, trainer.num_nodes is {wanted}; set one to the other")
    tasks, ranks = environment.get("SLURM_NTASKS", "1"), wanted * _ranks_per_node(config)
    if tasks != str(ranks):
        raise ValueError(
            f"the job has {tasks} tasks, but the recipe takes {ranks} processes ({config.trainer.devices} "
            f"devices on {wanted} nodes); set --ntasks-per-node to the devices of a node"
        )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _package_problems(requirement: Requirement) -> Iterator[str]:
    found = _installed(requirement.name)
    if found is None:
        yield f"{requirement.name} is not installed; pip install '{requirement}'"
    elif not requirement.specifier.contains(found, prereleases=True):
        yield f"{requirement.name} is {found}; pip install '{requirement}'"


def _bad(name: str, number: str) -> str:
    return f"{name} is {number}: {KNOWN_BAD[name, number]}; install the version in constraints.txt"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
