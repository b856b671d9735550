"""The GPU tests where there is no GPU: they are skipped, each with its reason, and a dry run works and says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
HAS_GPU = bool(torch.version.cuda) and torch.cuda.is_available()

pytestmark = pytest.mark.skipif(HAS_GPU, reason="on a GPU they run themselves")


def run_tests(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MTPD_", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *map(str, arguments)]
    environment = kept | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)


def dry_run(page: Path, *arguments: object) -> dict:
    """The report's numbers after a dry run of some tests."""
    done = run_tests("--gpu-report", page, *arguments, MTPD_GPU_DRY_RUN="1", MTPD_COMMIT="abc")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(page.with_suffix(".json").read_text())


def test_each_is_skipped_with_its_reason(tmp_path):
    done = run_tests("tests/gpu", f"--junit-xml={tmp_path / 'found.xml'}")
    assert done.returncode == 0, done.stdout
    cases = list(ElementTree.parse(tmp_path / "found.xml").iter("testcase"))
    reasons = [skipped.get("message") for case in cases for skipped in case.findall("skipped")]
    assert len(cases) == len(reasons) > 100
    assert set(reasons) <= {"needs a GPU that torch can use", "one GPU holds one rank"}


def test_there_is_no_report_without_a_gpu(tmp_path):
    done = run_tests("tests/gpu", "--gpu-report", tmp_path / "report.md")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "torch can use no GPU here, so there is nothing to report" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_dry_run_says_that_it_is_one_and_a_second_one_adds_to_it(tmp_path):
    page = tmp_path / "report.md"
    first = dry_run(page, "tests/gpu/test_training.py", "-k", "eager_loss or blockwise")
    eager, blockwise = first["tests"].values()
    assert (eager["outcome"], blockwise["outcome"]) == ("passed", "skipped")
    assert "Transformer Engine" in blockwise["why"]
    assert [name.partition(":")[0] for name, _ in eager["measured"]] == ["eager loss"]

    second = dry_run(page, "tests/gpu/test_preflight.py")
    assert second["dry_run"] and len(second["commands"]) == 2
    kept = [second["tests"][name] for name in first["tests"]]
    assert kept == list(first["tests"].values()) and len(second["tests"]) == 3

    lines = page.read_text().splitlines()
    assert lines[0] == "# Dry run of the GPU tests"
    rows = [line for line in lines if line.startswith("| test_")]
    assert len(rows) == 5 and all("(dry run)" in row for row in rows)
    assert "FP8" not in "".join(row for row in rows if "passed" in row)

    fixed = json.loads(page.with_suffix(".json").read_text()) | {"dry_run": False}
    page.with_suffix(".json").write_text(json.dumps(fixed))
    refused = run_tests("tests/gpu/test_preflight.py", "--gpu-report", page, MTPD_GPU_DRY_RUN="1")
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    assert "holds results of a GPU, and this is a dry run: name another file" in refused.stderr
