"""Triton's kernels without a GPU: their values in Triton's interpreter, and that they compile for one.

Each in a process of its own: Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CASES = Path(__file__).parent / "triton_cases.py"
COMPILE = Path(__file__).parent / "compile_kernels.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton comes with torch for CUDA; this torch has none"
)


def in_a_process(*command: str, **variables: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"


def test_values_and_gradients_in_the_interpreter():
    in_a_process("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES), TRITON_INTERPRET="1")


def test_kernels_compile_for_a_gpu(tmp_path):
    """What the interpreter accepts and the compiler does not would be seen first on a GPU."""
    in_a_process(str(COMPILE), TRITON_CACHE_DIR=str(tmp_path))
