"""The acceptance benchmark as a user starts it: on two nodes by torchrun, and as tasks of srun of which one is killed.

The nodes are two torchrun agents on this machine; srun's tasks are processes with the variables that it sets.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mtpd.speculative import benchmark, worker
from tests.distributed.checkpoints import HEADS, save_checkpoint
from tests.distributed.gloo import run
from tests.unit.speculative.toys import prompts

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools" / "benchmark_acceptance.py")
TEXTS = [text for text in prompts(200, seed=13) if max(text) < 95][:160]
SIZE = 32
PATIENCE = 300  # seconds; many times what it takes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and prompts for some seconds of decoding."""
    path = tmp_path_factory.mktemp("nodes")
    run(save, 1, str(path / "checkpoint"))
    (path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": " ".join(map(str, text))}) for text in TEXTS))
    return path


def save(directory):
    save_checkpoint(directory)


@pytest.fixture(scope="module")
def truth(folder):
    """What one rank measures, in this process's ranks."""
    chosen = worker.Options(folder / "checkpoint", [str(folder / "p.jsonl")], folder / "one", max_new_tokens=SIZE)
    (summary,) = run(benchmark.run, 1, chosen, timeout=PATIENCE)
    return counts(summary)


def counts(summary):
    assert summary["complete"] and not summary["failed_prompts"]
    names = ("num_heads", "num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos")
    forced = summary["teacher_forced"]
    return [[run[name] for name in names] for run in summary["runs"]], forced["num_accepted_tokens_per_pos"]


def flags(folder, output):
    return [
        *(TOOL, "--load", folder / "checkpoint", "--prompts", folder / "p.jsonl", "--output", output),
        *("--max-new-tokens", SIZE),
    ]


def start(command, **variables):
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    environment = clean | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in variables.items()}
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process):
    output, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, output, errors


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def read(output):
    return json.loads((output / "acceptance.json").read_text())


def lines(path):
    return [line for line in path.read_bytes().splitlines() if line] if path.exists() else []


def test_two_nodes_of_two_ranks_count_what_one_rank_counts(folder, truth, tmp_path):
    meeting = ["--master-addr", "127.0.0.1", "--master-port", free_port()]
    nodes = [
        start(
            ["-m", "torch.distributed.run", "--nnodes", 2, "--node-rank", node, "--nproc-per-node", 2, *meeting]
            + flags(folder, tmp_path)
        )
        for node in (0, 1)
    ]
    ended = [end(node) for node in nodes]
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert "fastest number of heads" in ended[0][1] and not ended[1][1].strip()
    assert counts(read(tmp_path)) == truth
    shares = [len(lines(tmp_path / "results" / f"rank{rank:05d}.jsonl")) for rank in range(4)]
    assert sum(shares) == 4 * len(TEXTS) and max(shares) - min(shares) <= 4, "four runs, each dealt evenly"


def test_a_killed_rank_costs_its_share_and_a_rerun_completes_it(folder, truth, tmp_path):
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "SLURM_NTASKS": 2}
    tasks = [start(flags(folder, tmp_path), SLURM_PROCID=n, SLURM_LOCALID=n, **meeting) for n in (0, 1)]
    victim, begin = tmp_path / "results" / "rank00001.jsonl", time.monotonic()
    while len(lines(victim)) < len(TEXTS) and tasks[1].poll() is None and time.monotonic() < begin + PATIENCE:
        time.sleep(0.02)  # until it has done half of its work
    tasks[1].send_signal(signal.SIGKILL)
    status, output, errors = end(tasks[0])
    assert end(tasks[1])[0] == -signal.SIGKILL, "it was in the middle"
    assert status == 1 and "results are missing: run the same command again" in output, errors
    assert "A rank died" in errors
    summary, kept = read(tmp_path), lines(victim)
    assert not summary["complete"]
    assert len(kept) - 1 <= 4 * len(TEXTS) // 2 - summary["num_missing"] <= len(kept), "a line may be cut short"
    assert len(lines(tmp_path / "results" / "rank00000.jsonl")) == 4 * len(TEXTS) // 2, "the other did all of its share"

    status, output, errors = end(start(flags(folder, tmp_path)))  # alone, without srun
    assert status == 0, errors
    assert counts(read(tmp_path)) == truth
    assert lines(victim) == kept, "nothing is measured twice"


def test_bad_commands_end_with_one_line_that_says_what_to_do(folder, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe")
    good = flags(folder, tmp_path / "out")
    cases = (
        (["--prompts", tmp_path / "bad.jsonl"], "cannot be read as UTF-8"),
        (["--num-heads", HEADS + 1], f"the checkpoint has {HEADS} heads"),
    )
    for process, message in [(start([*good, *changes]), message) for changes, message in cases]:
        status, _, errors = end(process)
        last = errors.strip().splitlines()[-1]
        assert status == 1 and last.startswith("benchmark_acceptance.py: error: ") and message in last, errors
        assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
