"""The files that take longest come first, so that two workers end together. Needs `--no-loadscope-reorder`."""

from __future__ import annotations

from pathlib import Path

import pytest

LONGEST = (
    *("unit/losses/test_triton.py", "distributed/test_speculative.py", "e2e/test_quickstart.py"),
    *("distributed/test_deepspeed.py", "unit/planning/test_memory.py", "e2e/test_resume.py"),
    *("distributed/test_looped_sequences.py", "e2e/test_looped_extension.py", "e2e/test_retrofit.py"),
    *("distributed/test_acceptance_benchmark.py", "distributed/test_acceptance_nodes.py", "unit/test_gpu_tests.py"),
)
"""A minute and more, from the longest on."""
RANK = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: RANK.get(item.path, len(LONGEST)))
