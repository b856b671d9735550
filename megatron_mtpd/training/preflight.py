"""Is every node fit for the long job? Asked of all ranks together, in seconds, before it starts.

Each rank measures its own: the versions of what it imports, its GPU, its disk, whether it can write the run's folder.
Rank 0 collects the reports and names the nodes with a problem: one that does not answer, differs from the rest, lacks
a GPU or finds it occupied, cannot write or does not share the folder, has another time of day, or little disk. Then all
ranks time an all-reduce. Reports travel through a TCPStore, so that a node that is broken for collectives is named too.

Ranks are told who they are by torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

Deliberately absent: repair, tests of the GPU's arithmetic (Megatron's --gpu-sniff-test-interval has them), and a bound
for the bandwidth unless one is given: what is good depends on the network.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mtpd.platform import unusable_gpus
from megatron_mtpd.provenance import versions

MODULES = ("megatron.core", "megatron_mtpd")
MOST_SKEW = 5.0
"""Seconds between clocks that are let pass: logs stay readable, and a busy node may answer late."""
LEAST_FREE = 0.9
"""Share of the GPU's memory that nobody else may hold."""


@dataclass(frozen=True)
class Report:
    """What one rank found. Sizes in GB; the clock in seconds since 1970, read by all ranks at about the same moment."""

    rank: int
    node: str
    versions: dict[str, str] = field(default_factory=dict)
    gpu: str | None = None
    gpu_memory: tuple[float, float] = (0.0, 0.0)
    """Free and total."""
    disk_free: float = 0.0
    problems: tuple[str, ...] = ()
    clock: float = 0.0
    unseen: tuple[int, ...] = ()
    """Ranks whose mark in the shared folder the node does not see."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}"


def judge(reports: Sequence[Report], world_size: int, least_disk: float) -> list[str]:
    """What is wrong, a line each; empty when nothing is.

    Args:
        reports: of the ranks that answered.
        world_size: number of ranks that should have.
        least_disk: GB that must be free.
    """
    found = [f"{report}: {problem}" for report in reports for problem in report.problems]
    missing = sorted(set(range(world_size)) - {report.rank for report in reports})
    if missing:
        found.append(
            f"no answer from ranks {_listed(missing)}: their nodes did not start them, or have no way to rank 0"
        )
    for what in sorted({name for report in reports for name in report.versions}):
        found += _outliers(reports, what, lambda report, what=what: report.versions.get(what, "missing"))
    found += _outliers(reports, "GPU", lambda report: report.gpu or "none")
    for report in reports:
        free, total = report.gpu_memory
        if free < LEAST_FREE * total:
            found.append(f"{report}: {free:.1f} of {total:.1f} GB GPU memory are free: another process holds the rest")
        if report.unseen:
            found.append(f"{report} does not see the files of ranks {_listed(report.unseen)}: the folder is not shared")
    full = {report.node: report.disk_free for report in reports if report.disk_free < least_disk}
    found += [f"{node}: {free:.0f} GB of disk are free, {least_disk:.0f} are asked for" for node, free in full.items()]
    clocks = sorted(reports, key=lambda report: report.clock)
    middle = clocks[len(clocks) // 2].clock if clocks else 0.0
    wrong = {report.node: report.clock - middle for report in clocks if abs(report.clock - middle) > MOST_SKEW}
    found += [f"{node}: its clock is off by {skew:+.0f} s" for node, skew in wrong.items()]
    return found


def _outliers(reports: Sequence[Report], what: str, value: Callable[[Report], str]) -> list[str]:
    """The reports whose value is not the most frequent one, those of a node in one line."""
    values = Counter(value(report) for report in reports)
    usual = values.most_common(1)[0][0] if values else ""
    odd = {(report.node, value(report)) for report in reports if value(report) != usual}
    return [f"{node}: {what} is {found}, elsewhere it is {usual}" for node, found in sorted(odd)]


def _listed(ranks: Sequence[int], most: int = 16) -> str:
    return ", ".join(map(str, ranks[:most])) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")


def measure(rank: int, local_rank: int, shared: Path) -> Report:
    """The report of this rank, but for what takes all of them. Leaves a mark in `shared`."""
    problems = []
    for module in MODULES:
        try:
            import_module(module)
        except Exception as error:  # whatever it is, the person must read it beside the node's name
            problems.append(f"import {module} failed: {error!r}")
    found = {"python": platform.python_version(), "checkout": str(Path(__file__).parents[2]), **versions()}
    report = Report(rank, socket.gethostname(), found)
    if torch.version.cuda and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count() > 0:
        problems.append(f"{torch.cuda.device_count()} GPUs for {os.environ['LOCAL_WORLD_SIZE']} ranks")
    elif torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(local_rank)
        report.versions["cuda"] = str(torch.version.cuda)
        report.versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore
        name = torch.cuda.get_device_name(local_rank)
        report = replace(report, gpu=name, gpu_memory=(free / 1e9, total / 1e9))
    elif problem := unusable_gpus():
        problems.append(problem)
    try:
        _mark(shared, rank).write_text(report.node)
        report = replace(report, disk_free=shutil.disk_usage(shared).free / 1e9)
    except OSError as error:
        problems.append(f"cannot write {shared}: {error.strerror}")
    return replace(report, problems=tuple(problems))


def _mark(shared: Path, rank: int) -> Path:
    return shared / f".preflight-{rank}"


def bandwidth(local_rank: int, size: int, rounds: int = 5) -> float:
    """Bus bandwidth of an all-reduce of `size` bytes over all ranks, GB/s: 2 (n - 1) / n of the bytes over the time."""
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    data = torch.ones(size // 4, device=device)
    ranks = dist.get_world_size()
    dist.all_reduce(data)
    start = time.perf_counter()
    for _ in range(rounds):
        dist.all_reduce(data)
    data[0].item()  # waits for the GPU
    seconds = (time.perf_counter() - start) / rounds
    return 2 * (ranks - 1) / ranks * size / seconds / 1e9


def main(argv: Sequence[str] | None = None) -> None:
    """Check all nodes and exit, 1 when one is not fit. Every rank calls it."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="example: torchrun --nproc-per-node 8 tools/preflight.py --shared /shared/runs/dense-2b",
    )
    parser.add_argument("--shared", type=Path, required=True, metavar="DIR", help="folder that all nodes must share")
    parser.add_argument(
        "--least-disk", type=float, default=1.0, metavar="GB", help="that must be free there [%(default)s]"
    )
    parser.add_argument(
        "--least-bandwidth", type=float, default=0.0, metavar="GB/s", help="of an all-reduce [%(default)s]"
    )
    parser.add_argument("--wait", type=int, default=300, metavar="S", help="for a rank's answer [%(default)s]")
    options = parser.parse_args(argv)
    sys.exit(_check(options))


def _check(options: argparse.Namespace) -> int:
    """The exit status of this rank. Rank 0 decides, says why, and leaves last, because the others ask it."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", 0))
    patience = timedelta(seconds=options.wait)
    store = dist.TCPStore(host, port, ranks, is_master=rank == 0, timeout=2 * patience, wait_for_workers=False)
    report = measure(rank, local_rank, options.shared)
    store.set(f"measured/{rank}", "")
    if rank == 0:
        _answered(store, "measured", ranks, patience)
        store.set("go", "")
    store.wait(["go"])
    report = replace(report, clock=time.time(), unseen=_unseen(options.shared, ranks) if local_rank == 0 else ())
    store.set(f"report/{rank}", json.dumps(asdict(report)))
    if rank == 0:
        answered = _answered(store, "report", ranks, patience)
        reports = [_report(store.get(f"report/{number}")) for number in answered]
        problems = judge(reports, ranks, options.least_disk)
        _say(reports, ranks, problems)
        store.set("verdict", "bad" if problems else "good")
    good = store.get("verdict") == b"good"
    _mark(options.shared, rank).unlink(missing_ok=True)
    if good and ranks > 1:
        good = _fast(store, rank, ranks, local_rank, options.least_bandwidth, patience)
    store.add("left", 1)
    deadline = time.monotonic() + 10
    while rank == 0 and store.add("left", 0) < ranks and time.monotonic() < deadline:
        time.sleep(0.05)
    return 0 if good else 1


def _answered(store: dist.TCPStore, what: str, ranks: int, patience: timedelta) -> list[int]:
    """The ranks that set their key in time."""
    keys = [f"{what}/{rank}" for rank in range(ranks)]
    try:
        store.wait(keys, patience)
        return list(range(ranks))
    except dist.DistStoreError:
        return [rank for rank, key in enumerate(keys) if store.check([key])]


def _unseen(shared: Path, ranks: int) -> tuple[int, ...]:
    """Every node lists the folder itself: a client of a network file system may remember that a file was not there."""
    try:
        names = set(os.listdir(shared))
    except OSError:
        return ()  # that it cannot be written is reported already
    return tuple(rank for rank in range(ranks) if _mark(shared, rank).name not in names)


def _report(text: bytes) -> Report:
    values: dict[str, Any] = json.loads(text)
    tuples = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Report(**{**values, **tuples})


def _say(reports: Sequence[Report], ranks: int, problems: Sequence[str]) -> None:
    first = reports[0]
    print(f"preflight: {ranks} ranks on {len({report.node for report in reports})} nodes, GPU: {first.gpu or 'none'}")
    print("preflight: " + ", ".join(f"{name} {version}" for name, version in first.versions.items()))
    for problem in problems:
        print(f"preflight: error: {problem}", flush=True)


def _fast(store: dist.Store, rank: int, ranks: int, local_rank: int, least: float, patience: timedelta) -> bool:
    """Whether an all-reduce works, and reaches the bandwidth that is asked for."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank)
    store = dist.PrefixStore("all-reduce", store)
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=ranks, timeout=patience)
    found = bandwidth(local_rank, 512 * 2**20 if gpu else 2**20)
    dist.destroy_process_group()
    if rank == 0:
        print(f"preflight: all-reduce over {ranks} ranks: {found:.2f} GB/s bus bandwidth", flush=True)
        if found < least:
            print(f"preflight: error: that is less than --least-bandwidth {least} asks for", flush=True)
    return found >= least or rank != 0
