"""A real Slurm cluster on one machine, for the tests: Debian's packages, with a namespace for each node.

Every node has its own network, host name, mounts and processes, so that what works here only because all ranks share
one machine fails: an address of `localhost`, a port that two jobs want, a signal to a process elsewhere. What is not
real: memory, processors and GPUs, which are only numbers, and the files, which all nodes share (as a cluster's do).

The whole cluster lives in namespaces of one process, so several of them can run at once, and nothing is left behind
even when the tests are killed. It needs root and the packages; `missing()` says what is not there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter")
NAMESPACES = ("--net", "--mount", "--uts", "--pid")
UNSHARE = ("unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"

CONFIGURATION = """\
ClusterName=mini
SlurmctldHost=control(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits cred_expire + 1 seconds before it starts again; 120 where this is not set.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/log/slurmctld.pid
SlurmdPidFile={folder}/log/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
EnforcePartLimits=ALL
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
# A dead node is noticed after SlurmdTimeout. The others are made long for machines that have more to do.
SlurmdTimeout=40
MessageTimeout=30
BatchStartTimeout=120
KillWait=10
MinJobAge=3600
GresTypes=gpu
NodeName=node[1-{nodes}] NodeAddr=10.77.0.[11-{last}] CPUs=16 RealMemory=100000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why a cluster cannot be started here, or None."""
    if os.geteuid() != 0:
        return "it needs root"
    absent = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install {PACKAGES}"
    probe = [*UNSHARE, "ip", "link", "add", "type", "veth"]
    done = subprocess.run(probe, capture_output=True, text=True, env=_environment())
    return f"namespaces are not allowed here: {done.stderr.strip()}" if done.returncode else None


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": _path()}


class Cluster:
    """A running cluster of `nodes` nodes, node1 to nodeN, each with 16 processors and 8 GPUs that are not there.

    `folder / "local"` is a disk of each node's own; all else is shared.
    """

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self.folder = Path(tempfile.mkdtemp(prefix="minislurm"))  # short: a socket's path has at most 107 characters
        for name in ("munge", "state", "spool", "log", "dev", "local"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(folder=self.folder, nodes=nodes, last=10 + nodes))
        for gpu in range(8):
            (self.folder / "dev" / f"gpu{gpu}").touch()
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/dev/gpu[0-7]\n")
        addresses = ["127.0.0.1 localhost", "10.77.0.1 control"]
        addresses += [f"10.77.0.{10 + i} node{i}" for i in range(1, nodes + 1)]
        (self.folder / "hosts").write_text("\n".join(addresses) + "\n")
        (self.folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        with open(self.folder / "log" / "control.log", "w") as log:
            self._unshare = subprocess.Popen(
                [*UNSHARE, HERE / "cluster" / "control.sh", self.folder, str(nodes)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=_environment(),
            )
        for i in range(1, nodes + 1):
            self.power("on", f"node{i}")
        try:
            self._inside = self.wait_until(self._first_process, 60)
            self.wait_until(lambda: self.states().count("idle") == nodes, 180)
        except BaseException:
            print(self.logs())
            self.stop()
            raise

    def _first_process(self) -> str:
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text().split()
        return children[0] if children else ""

    def states(self) -> list[str]:
        """State of every node, as sinfo names it."""
        return self.run("sinfo", "-h", "-N", "-o", "%T", check=False).stdout.split()

    def power(self, switch: str, node: str) -> None:
        """Switch a node "on", or "off" as if its power was cut: no process of it says good-bye."""
        assert self._unshare.stdin
        self._unshare.stdin.write(f"power_{switch} {node}\n")
        self._unshare.stdin.flush()

    def run(
        self, *command: str | Path, cwd: Path | None = None, check: bool = True, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command on the controller's machine, as a user's on the login node."""
        enter = ["nsenter", f"--target={self._inside}", *NAMESPACES, f"--wd={cwd or os.getcwd()}"]
        return subprocess.run(
            [*enter, *command],
            capture_output=True,
            text=True,
            check=check,
            env={**_environment(), "SLURM_CONF": f"{self.folder}/slurm.conf", **(env or {})},
        )

    def wait_until[T](self, condition: Callable[[], T], seconds: float) -> T:
        """The first true value of a condition. Fails when there is none in time, or the cluster died."""
        deadline = time.monotonic() + seconds
        while True:
            value = condition()
            if value:
                return value
            if self._unshare.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds} s: {condition}\n{self.logs()}")
            time.sleep(0.2)

    def logs(self, lines: int = 15) -> str:
        """The end of every log of the cluster."""
        tails = []
        for path in sorted((self.folder / "log").glob("*.log")):
            tails += [f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(tails)

    def stop(self) -> None:
        """End every process of the cluster, and remove its files."""
        self._unshare.kill()
        self._unshare.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
