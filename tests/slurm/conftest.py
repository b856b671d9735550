"""The cluster that the tests of this folder share, and the jobs in it.

Where no cluster can be started the tests are skipped, with the reason; with REQUIRE_SLURM=1 they fail instead.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.minislurm import Cluster, missing

ROOT = Path(__file__).resolve().parents[2]
TOY = """\
# The smallest model that has what matters, on made-up data.
--num-layers 1 --mtp-num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 2
--seq-length 16 --max-position-embeddings 16 --normalization RMSNorm --swiglu --disable-bias-linear
--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
--mock-data --tokenizer-type NullTokenizer --vocab-size 63 --split '90,5,5' --num-workers 0
--micro-batch-size 2 --global-batch-size 8 --train-iters 20 --lr 1e-3 --lr-decay-style cosine
--log-interval 1 --eval-interval 1000 --eval-iters 0 --save-interval 8 --no-create-attention-mask-in-dataloader
"""
NODES = 10
PATIENCE = 600
"""Seconds that a test waits for a job: many times what it takes, because other work may have the processors."""
JOBS = "tests/slurm/test_jobs.py"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass
class Job:
    """A job that was submitted."""

    cluster: Cluster
    folder: Path
    number: str

    @property
    def state(self) -> str:
        """As squeue names it."""
        return self.cluster.run("squeue", "-h", "-t", "all", "-j", self.number, "-o", "%T").stdout.strip()

    def ended(self) -> str:
        """The state that it ends in."""
        try:
            self.cluster.wait_until(lambda: self.state in OVER, PATIENCE)
        except TimeoutError:
            print(self.output)
            raise
        return self.state

    def show(self, key: str) -> str:
        """What Slurm keeps of it: `ExitCode`, `NodeList`, `Restarts`..."""
        shown = self.cluster.run("scontrol", "show", "job", self.number).stdout
        return next(word.partition("=")[2] for word in shown.split() if word.startswith(f"{key}="))

    @property
    def nodes(self) -> list[str]:
        """Where it runs."""
        return self.cluster.run("scontrol", "show", "hostnames", self.show("NodeList")).stdout.split()

    @property
    def output(self) -> str:
        """What the job script wrote, in all starts."""
        path = self.folder / "out"
        return path.read_text() if path.exists() else ""

    @property
    def run(self) -> Path:
        """Where it trained."""
        return self.folder / "run"

    @property
    def paused(self) -> Path:
        """The file by which faults.py says that it waits."""
        return self.folder / "paused"

    def logs(self) -> list[Path]:
        """Of the ranks, one a start."""
        return sorted(path for path in (self.run / "logs").glob("*.log") if "preflight" not in path.name)

    def first_iteration(self, start: int) -> int:
        """The one that a start of the job, counted from 0, trained first."""
        log = (self.run / "logs" / f"pretrain_mtpd-{self.number}-{start}.log").read_text()
        found = re.search(r" iteration +(\d+)/", log)
        assert found, log[-3000:]
        return int(found[1])

    def losses(self) -> dict[int, dict[str, float]]:
        """All that is reported of an iteration but its duration; the last report where there are several."""
        lines = (self.run / "tensorboard" / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        for record in records:
            for name in ("time", "iteration-time", "throughput"):
                record.pop(name, None)
        return {record["iteration"]: record for record in records}


@dataclass
class Submit:
    """sbatch of the job scripts in the checkout, with the toy model and without preflight, unless the settings say
    so."""

    cluster: Cluster
    folder: Path

    def __call__(self, name: str, *words: str, script: str = "pretrain_mtpd", flags: tuple = (), **env: str) -> Job:
        folder = self.folder / name
        folder.mkdir()
        settings = {
            "MTPD_MODEL": str(self.folder / "toy"),
            "MTPD_RUN_DIR": str(folder / "run"),
            "MTPD_PYTHON": sys.executable,
            "MTPD_PREFLIGHT": "0",
            "PAUSED": str(folder / "paused"),
            "PYTHONWARNINGS": "ignore",
        }
        if "FAULT" in env:
            settings["MTPD_TOOL"] = "tests/slurm/faults.py"
        options = ["--parsable", "--gpus-per-node=1", f"--output={folder}/out", *words]
        command = ["sbatch", *options, f"slurm/{script}.sh", *map(str, flags)]
        done = self.cluster.run(*command, cwd=ROOT, env={**settings, **env})
        return Job(self.cluster, folder, done.stdout.strip())


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason:
        if os.environ.get("REQUIRE_SLURM", "0") != "0":
            pytest.fail(f"REQUIRE_SLURM is set, and there is no Slurm cluster: {reason}")
        pytest.skip(f"no Slurm cluster here: {reason}")
    running = Cluster(NODES)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def submit(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Submit:
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "toy").mkdir()
    (folder / "toy" / "model.args").write_text(TOY)
    (folder / "toy" / "nodes-1.args").touch()
    return Submit(cluster, folder)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many of the tests on the cluster ran: a skip is easily overlooked."""
    counts = {
        outcome: sum(report.nodeid.startswith(JOBS) and report.when != "teardown" for report in reports)
        for outcome, reports in terminalreporter.stats.items()
        if outcome in ("passed", "failed", "error", "skipped")
    }
    if any(counts.values()):
        ran = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        terminalreporter.write_line(f"Slurm cluster: {ran}")
