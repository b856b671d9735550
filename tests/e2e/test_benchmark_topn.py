"""`tools/benchmark_topn.py` as a user runs it, at small sizes: what it measures and writes, not how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
TOOL = Path(__file__).parents[2] / "tools" / "benchmark_topn.py"


def benchmark(*flags: str) -> subprocess.CompletedProcess:
    small = ["--rows", "8", "--vocab", "4096", "--topn", "500", "--repeats", "1"]
    return subprocess.run([sys.executable, str(TOOL), *small, *flags], capture_output=True, text=True, timeout=120)


def test_over_ranks_only_counts_travel(tmp_path):
    path = tmp_path / "topn.json"
    done = benchmark("--tp", "2", "--json", str(path))
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    rows = {row["method"]: row for row in document["rows"]}
    assert list(rows) == ["topn_cut", "topk", "kthvalue"] and all(method in done.stdout for method in rows)
    # What is gathered from two ranks: 500 candidates a row and rank, or all logits. Counts: some, of 4 bytes a row.
    assert rows["topk"]["tp_bytes"] == 2 * 8 * 500 * 4
    assert rows["kthvalue"]["tp_bytes"] == 8 * 4096 * 4
    assert 0 < rows["topn_cut"]["tp_bytes"] < 40 * 8 * 4
    assert all(0 < row["seconds_min"] <= row["seconds_median"] for row in rows.values())


def test_bad_sizes_are_refused():
    done = benchmark("--vocab", "4097", "--tp", "2")
    assert done.returncode == 1 and "--vocab 4097" in done.stderr and "Traceback" not in done.stderr
