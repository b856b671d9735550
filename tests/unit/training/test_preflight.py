"""What the preflight finds wrong, on reports that are made up, and one rank that waits for another in vain."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mtpd.training.preflight import LEAST_FREE, MOST_SKEW, Report, bandwidth, judge, measure

ROOT = Path(__file__).resolve().parents[3]
GOOD = [
    Report(rank, f"node{rank // 2}", {"torch": "2.11"}, "H100", (79.0, 80.0), disk_free=500.0, clock=1000.0)
    for rank in range(8)
]


def with_rank_5(**changes) -> list[Report]:
    return [replace(report, **changes) if report.rank == 5 else report for report in GOOD]


def test_nothing_is_wrong_with_nodes_that_are_alike() -> None:
    assert judge(GOOD, 8, least_disk=100) == []


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        (with_rank_5(versions={"torch": "2.10"}), "node2: torch is 2.10, elsewhere it is 2.11"),
        (with_rank_5(versions={}), "node2: torch is missing, elsewhere it is 2.11"),
        (with_rank_5(gpu=None), "node2: GPU is none, elsewhere it is H100"),
        (with_rank_5(gpu_memory=(LEAST_FREE * 80 - 1, 80.0)), "rank 5 on node2: 71.0 of 80.0 GB GPU memory are free"),
        (with_rank_5(unseen=(0, 1)), "rank 5 on node2 does not see the files of ranks 0, 1"),
        (with_rank_5(disk_free=3.0), "node2: 3 GB of disk are free, 100 are asked for"),
        (with_rank_5(clock=1000 + MOST_SKEW + 1), "node2: its clock is off by +6 s"),
        (with_rank_5(clock=1000 - MOST_SKEW - 1), "node2: its clock is off by -6 s"),
        (with_rank_5(problems=("import megatron.core failed",)), "rank 5 on node2: import megatron.core failed"),
        (GOOD[:5] + GOOD[6:], "no answer from ranks 5"),
    ],
)
def test_what_is_wrong_is_named_once_with_its_node(reports: list[Report], message: str) -> None:
    problems = judge(reports, 8, least_disk=100)
    assert len(problems) == 1
    assert problems[0].startswith(message)


def test_what_is_just_within_bounds_is_let_pass() -> None:
    fine = with_rank_5(gpu_memory=(LEAST_FREE * 80, 80.0), disk_free=100.0, clock=1000 + MOST_SKEW)
    assert judge(fine, 8, least_disk=100) == []


def test_measure_reports_versions_and_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    report = measure(0, 0, tmp_path)
    assert report.problems == () and report.disk_free > 0
    assert report.node == socket.gethostname() and report.versions["megatron-core"]
    assert "cannot write" in measure(0, 0, tmp_path / "missing").problems[0]


def test_bandwidth_counts_bytes_on_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 (n - 1) / n of 8 MB in half a second over 4 ranks: 24 MB/s."""
    clock = iter([0.0, 2.5])  # five rounds
    monkeypatch.setattr("megatron_mtpd.training.preflight.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("megatron_mtpd.training.preflight.dist.get_world_size", lambda: 4)
    monkeypatch.setattr("megatron_mtpd.training.preflight.dist.all_reduce", lambda data: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bandwidth(0, 8_000_000) == pytest.approx(0.024)


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-W", "ignore", ROOT / "tools" / "preflight.py", "--shared", tmp_path, "--wait", "1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "preflight: error: no answer from ranks 1" in done.stdout
