"""The check that jobs on a cluster start with."""

from __future__ import annotations

import pytest

from tests.gpu.machine import ON_GPU, tool

pytestmark = pytest.mark.gpu


def test_this_machine_is_fit(tmp_path, report):
    said = tool("preflight.py", "--shared", tmp_path)
    report("preflight", said.splitlines()[0].removeprefix("preflight: "))
    assert ON_GPU or "GPU: none" in said
