"""What the preflight finds wrong, on reports that are made up, and one rank that waits for another in vain."""

from __future__ import annotations

import os
import re
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


def test_measure_reports_what_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_mtpd.training.preflight.MODULES", ("json", "no_such_module"))
    (problem,) = measure(0, 0, tmp_path).problems
    assert problem.startswith("import no_such_module failed: ModuleNotFoundError")


def test_measure_counts_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert measure(0, 0, tmp_path).problems == ("4 GPUs for 8 ranks",)


def test_measure_reports_gpus_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr("megatron_mtpd.platform.DEVICES", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (problem,) = measure(0, 0, tmp_path).problems
    assert problem.startswith("1 GPUs are there, and torch")


def test_measure_reads_the_memory_of_the_rank_s_own_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", {5: (60e9, 80e9)}.__getitem__)
    monkeypatch.setattr("torch.cuda.get_device_name", {5: "H100"}.__getitem__)
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 28, 9))
    report = measure(13, 5, tmp_path)
    assert (report.gpu, report.gpu_memory, report.versions["nccl"]) == ("H100", (60.0, 80.0), "2.28.9")


def test_bandwidth_counts_bytes_on_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 (n - 1) / n of 8 MB in half a second over 4 ranks: 24 MB/s."""
    clock = iter([0.0, 2.5])  # five rounds
    monkeypatch.setattr("megatron_mtpd.training.preflight.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("megatron_mtpd.training.preflight.dist.get_world_size", lambda: 4)
    monkeypatch.setattr("megatron_mtpd.training.preflight.dist.all_reduce", lambda data: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bandwidth(0, 8_000_000) == pytest.approx(0.024)


def run(ranks: int, of: int, shared: Path, *flags: str) -> list[tuple[int, str]]:
    """Exit status and output of the tool in the first `ranks` of `of` ranks."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-W", "ignore", ROOT / "tools" / "preflight.py", "--shared", shared, *flags]
    meeting = {"WORLD_SIZE": str(of), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **meeting, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    ((status, output),) = run(1, 2, tmp_path, "--wait", "1")
    assert status == 1
    assert "preflight: error: no answer from ranks 1" in output


def test_a_slow_network_is_named_with_its_bandwidth(tmp_path: Path) -> None:
    """Everything else of two ranks of this machine is fit, and nothing is left in the folder."""
    (status, output), (other_status, _) = run(2, 2, tmp_path, "--least-bandwidth", "1000000")
    assert (status, other_status) == (1, 0)
    assert "preflight: 2 ranks on 1 nodes, GPU: none" in output
    assert re.search(r"preflight: all-reduce over 2 ranks: [\d.]+ GB/s bus bandwidth", output)
    assert output.count("preflight: error:") == 1
    assert "preflight: error: that is less than --least-bandwidth 1000000.0 asks for" in output
    assert list(tmp_path.iterdir()) == []
