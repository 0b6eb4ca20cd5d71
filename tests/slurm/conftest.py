"""A cluster for all tests of this folder, recipes to submit, and jobs on the cluster."""

import contextlib
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, NoClusterError, started, why_not
from tests.support.runs import newest_step, recipe, run
from tests.support.tiny import tiny_spec

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "recipes" / "slurm" / "train.sbatch"
PATIENCE_S = 240
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job."""

    cluster: Cluster
    number: int
    run_dir: Path
    log: Path

    @property
    def state(self):
        return self.cluster.state(self.number)

    @property
    def restarts(self):
        return int(self.cluster.job(self.number)["Restarts"])

    def said(self):
        logs = [self.log, *sorted((self.run_dir / "logs").glob("*.log"))]
        return "\n".join(f"{path}:\n{path.read_text()}" for path in logs if path.exists())

    def wait_for(self, happened):
        """Wait until something is so; the job's end without it, or too long a time, fails the test."""
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            if self.state in OVER or time.monotonic() > deadline:
                if happened():
                    return
                pytest.fail(f"job {self.number} is {self.state}; it said: {self.said()}")
            time.sleep(0.2)

    def wait(self):
        """Wait for the end; returns the last state."""
        self.wait_for(lambda: self.state in OVER)
        return self.state

    def wait_for_checkpoint(self, *, step):
        self.wait_for(lambda: newest_step(self.run_dir) >= step)

    def is_alive(self):
        """Say whether some rank still trains or saves."""
        return any(self.processes(task=task) for task in (0, 1))

    def processes(self, *, task):
        """The numbers of the training processes of a task."""
        return [
            number for number in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is(number, task)
        ]

    def _is(self, number, task):
        try:
            command = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
            environment = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            return False
        return f"run_dir={self.run_dir}".encode() in command and b"SLURM_PROCID=%d" % task in environment


@dataclass(frozen=True)
class Submitter:
    """Submits recipes/slurm/train.sbatch."""

    cluster: Cluster
    folder: Path
    vico: Path = field(repr=False)

    def __call__(self, recipe_path, run_dir, *settings, options=(), step_s=0.1):
        """Train on two nodes, a task on each, with at least `step_s` seconds per step."""
        log = self.folder / f"{run_dir.name}.log"
        shape = [
            "--nodes=2",
            "--ntasks-per-node=1",
            "--cpus-per-task=1",
            f"--output={log}",
            f"--chdir={ROOT}",
        ]
        # Both nodes are this machine: the first one's name is no address here.
        network = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        number = self.cluster.run(
            *(
                "sbatch",
                "--parsable",
                *shape,
                *options,
                TEMPLATE,
                recipe_path,
                f"run_dir={run_dir}",
                *settings,
            ),
            VICO=str(self.vico),
            STEP_S=str(step_s),
            **network,
        )
        return Job(cluster=self.cluster, number=int(number), run_dir=run_dir, log=log)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A cluster; where none can be had the tests are skipped, and `pytest -rs` says why."""
    lacking = why_not()
    if lacking:
        pytest.skip(lacking)
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(started(tmp_path_factory.mktemp("slurm")))
        except NoClusterError as error:
            pytest.skip(str(error))
        yield running


@pytest.fixture
def submit(cluster, tmp_path):
    """A way to submit jobs, whose steps take the time of a larger model's."""
    vico = tmp_path / "vico"
    vico.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.slurm.paced "$@"\n')
    vico.chmod(0o755)
    return Submitter(cluster, tmp_path, vico)


@pytest.fixture(scope="session")
def base(tmp_path_factory, shards):
    """A folder with a trained base model."""
    folder, spec = tmp_path_factory.mktemp("base"), tiny_spec()
    fresh = {"ratios": [4], "vision": spec.vision, "language": spec.language, "vocab_size": 384}
    run(recipe(folder, "pretrain", shards, model=fresh))
    return folder / "pretrain" / "model"


@pytest.fixture
def consistency(tmp_path, shards, base):
    """A recipe of stage 1."""
    return recipe(tmp_path, "consistency", shards, model={"path": str(base), "ratios": [4, 16]})
