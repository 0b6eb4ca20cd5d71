"""A private Slurm on this machine: munge, a controller and two nodes, in a temporary folder.

It needs root and Debian's slurmctld, slurmd, slurm-client and munge. It uses free ports and
its own key, socket and slurm.conf, so it does not touch an installed Slurm.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
NODES = ("n1", "n2")
LOW, HIGH = "low", "high"  # partitions: a job of the second puts those of the first back into the queue
PATIENCE_S = 60
_FAILURES = (RuntimeError, subprocess.TimeoutExpired)  # of a command

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
ReturnToService=2
MpiDefault=none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=1 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


class NoClusterError(RuntimeError):
    """The daemons do not start on this machine."""


def why_not() -> str | None:
    """Say what this machine lacks for a cluster; None: nothing."""
    if os.geteuid() != 0:
        return "a Slurm of its own needs root"
    absent = [program for program in PROGRAMS if _find(program) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What makes Slurm's commands speak to this cluster; nothing of a job that this may run in."""
        outer = ("SLURM", "SBATCH", "SRUN", "MASTER_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: object, **environment: str) -> str:
        """Run one of Slurm's commands; returns what it prints."""
        done = subprocess.run(
            [*map(str, command)],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, command))} failed: {done.stderr}")
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """Return what the controller knows of a job."""
        words = self.run("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: int) -> str:
        """Return RUNNING, PENDING, COMPLETED, ..."""
        return self.job(number)["JobState"]


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    """Start a cluster that is stopped in the end, with all its jobs."""
    cluster = Cluster(folder)
    _lay_out(folder)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        munge, *others = _daemons(folder)
        processes.append(_launch(munge, cluster))
        _wait(lambda: (folder / "munge.socket").exists(), "munge does not start", cluster)
        processes.extend(_launch(command, cluster) for command in others)
        _wait(lambda: _are_idle(cluster), "the nodes do not come up", cluster)
        yield cluster
    finally:
        _end_jobs(cluster)
        for process in reversed(processes):
            _end(process)


def _lay_out(folder: Path) -> None:
    folder.chmod(0o755)
    ports = dict(zip(("controller", *NODES), _free_ports(3), strict=True))
    host = socket.gethostname().split(".")[0]
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, **ports))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)


def _daemons(folder: Path) -> list[list[str]]:
    names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
    names |= {"log-file": "munge.log", "seed-file": "munge.seed"}
    munge = [f"--{option}={folder / name}" for option, name in names.items()]
    return [
        [_found("munged"), "--foreground", "--force", *munge],
        [_found("slurmctld"), "-D", "-c"],
        *([_found("slurmd"), "-D", "-N", node] for node in NODES),
    ]


def _launch(command: list[str], cluster: Cluster) -> subprocess.Popen[bytes]:
    path = cluster.folder / f"{Path(command[0]).name}.out"
    with path.open("ab") as out:
        return subprocess.Popen(
            command, env=cluster.environment, stdout=out, stderr=out, start_new_session=True
        )


def _are_idle(cluster: Cluster) -> bool:
    with contextlib.suppress(*_FAILURES):
        return cluster.run("sinfo", "-h", "-N", "-p", LOW, "-o", "%T").split() == ["idle"] * len(NODES)
    return False


def _wait(happened: Callable[[], bool], trouble: str, cluster: Cluster) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        if time.monotonic() > deadline:
            said = "".join(path.read_text()[-1000:] for path in sorted(cluster.folder.glob("*.out")))
            raise NoClusterError(f"{trouble}: {said}")
        time.sleep(0.1)


def _end_jobs(cluster: Cluster) -> None:
    with contextlib.suppress(*_FAILURES):
        for number in cluster.run("squeue", "-h", "-o", "%A").split():
            cluster.run("scancel", "--signal=KILL", "--full", number)
            cluster.run("scancel", number)
        _wait(lambda: not cluster.run("squeue", "-h", "-o", "%A").split(), "jobs do not end", cluster)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _found(program: str) -> str:
    return str(_find(program))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
