"""`tools/benchmark_convert.py` as a user runs it, on a small folder: what it measures and writes, not how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
TOOL = Path(__file__).parents[2] / "tools" / "benchmark_convert.py"


def benchmark(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOL), *flags], capture_output=True, text=True, timeout=120)


def test_conversions_stand_beside_copies(tmp_path: Path) -> None:
    path = tmp_path / "convert.json"
    done = benchmark("--size", "0.6", "--repeats", "1", "--directory", str(tmp_path), "--json", str(path))
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["copy", "import", "copy back", "export"] and all(what in done.stdout for what in rows)
    # Layers are whole, and each about 90 MB.
    assert all(0.45e9 < row["bytes"] < 0.61e9 and row["seconds_min"] > 0 for row in rows.values())
    assert rows["copy"]["of_copy"] == rows["copy back"]["of_copy"] == 1.0
    # Two blocks of 32 MB, and what a first conversion loads; the embedding has 150.
    assert max(rows[what]["peak_bytes"] for what in ("import", "export")) < rows["copy"]["peak_bytes"] + 110e6
    assert [file.name for file in tmp_path.iterdir()] == ["convert.json"]


def test_a_size_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    done = benchmark("--size", "0.01", "--directory", str(tmp_path))
    assert done.returncode == 1 and "--size 0.01 GB is less than a layer" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
