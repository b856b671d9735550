"""What all GPU tests share: the reason for which they are skipped, the sizes, and the report.

    python -m pytest tests/gpu -m gpu --gpu-report docs/gpu-report.md      # on a machine with a GPU
    MTPD_GPU_DRY_RUN=1 python -m pytest tests/gpu -m gpu                   # toy sizes on a CPU: does the code run?

A dry run skips what has no other kernel, and asserts no speed. `report(name, value)` keeps a number for the report.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

DRY_RUN = os.environ.get("MTPD_GPU_DRY_RUN") == "1"
HAS_GPU = bool(torch.version.cuda) and torch.cuda.is_available()
HAS_TE = importlib.util.find_spec("transformer_engine") is not None

_measured = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-report", metavar="FILE", help="write what the GPU tests found, as a page")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_measured] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent not in item.path.parents or item.get_closest_marker("gpu") is None:
            continue
        if item.get_closest_marker("needs_te") and not (HAS_GPU and HAS_TE):
            item.add_marker(pytest.mark.skip(reason="needs a GPU and Transformer Engine (extra megatron-mtpd[te])"))
        elif not (HAS_GPU or DRY_RUN):
            item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use"))


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """Keeps a name and a value for the report."""

    def keep(name: str, value: object) -> None:
        request.config.stash[_measured].append((request.node.name, name, value))

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    file = config.getoption("--gpu-report", default=None)
    measured = config.stash[_measured]
    for test, name, value in measured:
        terminalreporter.write_line(f"{test}: {name}: {value}")
    if file:
        _write(Path(file), terminalreporter, measured)


def _write(path: Path, reporter: pytest.TerminalReporter, measured: list) -> None:
    from megatron_mtpd.provenance import provenance

    where = provenance()
    lines = [
        "# GPU report",
        "",
        f"`python -m pytest {' '.join(sys.argv[1:])}`, {where['date']}, commit {where['commit']}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in {**where["hardware"], **where["versions"]}.items()),
        "",
        "## Tests",
        "",
        "| test | outcome | why |",
        "|---|---|---|",
    ]
    for outcome in ("passed", "failed", "error", "skipped"):
        for result in reporter.stats.get(outcome, []):
            reason = result.longrepr[2] if outcome == "skipped" else result.longreprtext.strip().splitlines()[-1:]
            why = (reason if isinstance(reason, str) else "".join(reason)).replace("|", "\\|")
            lines.append(f"| {result.nodeid.removeprefix('tests/gpu/')} | {outcome} | {why} |")
    lines += ["", "## Measured", "", "| test | what | value |", "|---|---|---|"]
    lines += [f"| {test} | {name} | {value} |" for test, name, value in measured]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
