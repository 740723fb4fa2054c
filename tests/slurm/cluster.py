"""A Slurm cluster of two nodes on this machine, for as long as a ``with`` block lasts."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel", "sinfo")
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=120
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=n[1-2] PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be started here."""
    path = os.environ["PATH"] + ":/usr/sbin"
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)}): apt-get install slurm-wlm munge"
    return "the daemons of Slurm need root" if os.geteuid() else None


def nameless() -> str | None:
    """Why torchrun's processes cannot find each other here."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return f"torchrun looks for this machine's name, and {name} has no address"
    return None


class Cluster:
    """What a user of the cluster types."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment

    def __call__(self, *words: str, **variables: str) -> str:
        """The output of a command on the cluster, with variables added to its environment."""
        environment = {**self._environment, **variables}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def submit(self, *words: str) -> str:
        """The number of a new job of ``sbatch WORDS``."""
        return self("sbatch", "--parsable", *words).strip()

    def state(self, job: str) -> dict[str, str]:
        """The fields of ``scontrol show job``."""
        text = self("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def is_idle(self) -> bool:
        """Whether both nodes are up and have nothing to do."""
        words = ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%T"]
        states = subprocess.run(words, env=self._environment, capture_output=True, text=True)
        return states.stdout.split() == ["idle", "idle"]

    def cancel_all(self) -> None:
        """End all jobs, and return when they have ended."""
        self("scancel", "--user=root")
        wait_until(self.is_idle, "all jobs have ended")

    def wait(self, job: str, state: str, restarts: int = 0, seconds: float = 300) -> None:
        """Until a job that was requeued ``restarts`` times is in a state; it never waits in the queue."""

        def is_there() -> bool:
            now = self.state(job)
            if now["JobState"] == "PENDING" and now["Reason"] == "BeginTime":
                time.sleep(1.5)  # a node refuses a job in the second in which it has ended it
                self("scontrol", "update", f"jobid={job}", "StartTime=now")
            if now["JobState"] in {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"} - {state}:
                raise AssertionError(f"job {job} is {now['JobState']}, not {state}")
            return now["JobState"] == state and int(now["Restarts"]) == restarts

        wait_until(is_there, f"job {job} is {state}, restarted {restarts} times", seconds)


@contextmanager
def open_cluster(folder: Path) -> Iterator[Cluster]:
    """Start munged, slurmctld and two slurmd under ``folder``; end them, and all jobs, afterwards."""
    host = socket.gethostname().split(".")[0]
    (folder / "state").mkdir(parents=True)
    config, key = folder / "slurm.conf", folder / "munge.key"
    config.write_text(_CONFIG.format(host=host, folder=folder, ports=free_ports(3)))
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    environment |= {"SLURM_CONF": str(config), "PATH": os.environ["PATH"] + ":/usr/sbin"}
    cluster = Cluster(environment)
    daemons = {
        "munged": [
            *("munged", "--foreground", "--force"),  # whoever may look into the folder
            *(f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "log", "pid", "seed")),
            f"--socket={folder}/munge.socket",
        ],
        "slurmctld": ["slurmctld", "-D"],
        "n1": ["slurmd", "-D", "-N", "n1"],
        "n2": ["slurmd", "-D", "-N", "n2"],
    }
    with ExitStack() as running:
        for name, words in daemons.items():
            running.enter_context(_running(words, environment, folder / f"{name}.out"))
            if name == "munged":
                wait_until((folder / "munge.socket").exists, "munged answers")
        wait_until(cluster.is_idle, "both nodes are idle")
        try:
            yield cluster
        finally:
            cluster.cancel_all()


@contextmanager
def _running(words: list[str], environment: dict[str, str], output: Path) -> Iterator[None]:
    with output.open("w") as file:
        words = ["setpriv", "--pdeathsig=TERM", *words]  # even if nobody is left to end it
        daemon = subprocess.Popen(words, env=environment, stdout=file, stderr=file)
    try:
        yield
    finally:
        daemon.terminate()
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 300) -> None:
    """Wait for a condition; fail with its name when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def free_ports(number: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with ExitStack() as sockets:
        found = [sockets.enter_context(socket.socket()) for _ in range(number)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]
