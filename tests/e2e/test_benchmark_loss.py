"""`tools/benchmark_loss.py` as a user runs it, at small sizes: what it measures and writes, not how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
TOOL = Path(__file__).parents[2] / "tools" / "benchmark_loss.py"
# Logits of 8 MB: the kernel counts resident memory to some hundred KB, which smaller tensors would get lost in.
SMALL = ["--heads", "2", "--vocab", "2048", "--topn", "50", "--tokens", "1024", "--hidden", "32", "--repeats", "1"]


def benchmark(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOL), *SMALL, *flags], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("flags", [[], ["--tp", "2", "--sequence-parallel", "--dtype", "bf16"]], ids=["one", "tp2"])
def test_a_table_and_rows(tmp_path, flags):
    path = tmp_path / "loss.json"
    done = benchmark(*flags, "--json", str(path))
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    rows = {row["variant"]: row for row in document["rows"]}
    assert list(rows) == ["megatron_mtp", "mtpd_eager", "mtpd_fused"]
    for variant, row in rows.items():
        assert variant in done.stdout
        assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
        assert row["peak_extra_bytes"] > 0
        # Megatron looks for the maximum and the label even on one rank, in collectives of one.
        assert row["tp_bytes"] > 0 or (variant != "megatron_mtp" and not flags)
    base, fused = rows["megatron_mtp"], rows["mtpd_fused"]
    assert base["ratio_time_vs_megatron"] == base["ratio_memory_vs_megatron"] == 1.0
    assert fused["ratio_time_vs_megatron"] == fused["seconds_median"] / base["seconds_median"]
    assert fused["ratio_memory_vs_megatron"] == fused["peak_extra_bytes"] / base["peak_extra_bytes"]
    assert document["provenance"]["versions"]["torch"] and document["workload"]["vocab"] == 2048


def test_sizes_that_do_not_divide_are_refused_at_once():
    done = benchmark("--vocab", "2049", "--tp", "2")
    assert done.returncode == 1 and "--vocab 2049" in done.stderr and "Traceback" not in done.stderr
