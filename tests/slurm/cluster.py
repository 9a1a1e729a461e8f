"""A real SLURM of one node: munged, slurmctld and slurmd on the loopback address, with a configuration and state of
their own in a temporary folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")

# A requeued job waits until the credentials of its last start have expired, by default two minutes: cred_expire.
# The node says that it has more CPUs and GPUs than it has, since the script under test asks for them.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """What is not installed of SLURM and munge."""
    return [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"  # Debian's place for daemons, which not every user has in PATH


def wait_for(what: str, condition: Callable[[], bool], timeout: float) -> None:
    """Wait until the condition holds.

    Raises:
        TimeoutError: it did not within `timeout` seconds.
    """
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout:.0f} s for: {what}")
        time.sleep(0.2)


class Cluster:
    """What a user does on a login node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}

    def run(self, *command: str | Path, cwd: Path | None = None, **environment: str) -> str:
        """What the command prints; raises CalledProcessError when it fails."""
        done = subprocess.run(
            command, cwd=cwd, env=self.environment | environment, check=True, capture_output=True, text=True, timeout=60
        )
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, e.g. JobState."""
        words = self.run("scontrol", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """The daemons, for the length of the block; all jobs are cancelled and all daemons ended after it."""
    host = socket.gethostname().partition(".")[0]
    user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
    with socket.socket() as first, socket.socket() as second:
        ports = []
        for listener in (first, second):
            listener.bind(("127.0.0.1", 0))
            ports.append(listener.getsockname()[1])
    text = CONFIGURATION.format(host=host, user=user, folder=folder, ports=ports)
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o600)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    cluster = Cluster(folder)
    munge = {"key-file": "munge.key", "socket": "munge.socket", "log-file": "munge.log", "seed-file": "munge.seed"}
    options = [f"--{option}={folder / file}" for option, file in munge.items()]
    daemons = []
    try:
        # --force: munged warns of the rights of a temporary folder.
        for command in (
            ["munged", "--foreground", "--force", f"--pid-file={folder}/munge.pid", *options],
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D", "-N", host],
        ):
            output = open(folder / f"{command[0]}.out", "w")  # noqa: SIM115 (the daemon's, as long as it runs)
            daemons.append(subprocess.Popen(command, env=cluster.environment, stdout=output, stderr=output))
            output.close()
            if command[0] == "munged":
                wait_for("munged", (folder / "munge.socket").exists, 10)
        wait_for("an idle node", lambda: _is_idle(cluster), 60)
        yield cluster
    finally:
        with contextlib.suppress(subprocess.SubprocessError):
            cluster.run("scancel", "--user", user)
            wait_for("the jobs to end", lambda: not cluster.run("squeue", "--noheader"), 60)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _is_idle(cluster: Cluster) -> bool:
    try:
        return cluster.run("sinfo", "--noheader", "--format=%T") == "idle"
    except subprocess.CalledProcessError:  # slurmctld does not listen yet
        return False
