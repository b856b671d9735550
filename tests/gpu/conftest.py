"""What all GPU tests share: the reason for which they are skipped, their order, and the report.

    python -m pytest tests/gpu -m gpu --gpu-report docs/gpu-report.md      # on a machine with a GPU
    MTPD_GPU_DRY_RUN=1 python -m pytest tests/gpu -m gpu                   # toy sizes on a CPU: does the code run?

A dry run skips what has no other kernel, and asserts no speed. `report(name, value)` keeps a number for the report.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu import machine
from tests.gpu.report import FOLDER, Report
from tests.gpu.runs import Runs, wait_for_all

# The first say in seconds whether the installation works.
ORDER = ("transformer_engine", "preflight", "triton_loss", "checkpoints", "training", "speed")
MARKERS = (
    "runs(*names): asks for these jobs of tests/gpu/runs.py",
    "needs_gpus(number): needs several GPUs",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-report", metavar="FILE.md", help="add what the GPU tests find to this page and FILE.json")


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    page = config.getoption("--gpu-report", default=None)
    if page is None or hasattr(config, "workerinput"):
        return
    if not (machine.ON_GPU or machine.DRY_RUN):
        raise pytest.UsageError(
            f"--gpu-report {page}: torch can use no GPU here, so there is nothing to report. With MTPD_GPU_DRY_RUN=1 "
            "the tests run at toy sizes, and the report is marked as that."
        )
    dry = "MTPD_GPU_DRY_RUN=1 " if machine.DRY_RUN else ""
    command = f"{dry}python -m pytest {shlex.join(map(str, config.invocation_params.args))}"
    config.pluginmanager.register(Report(Path(page), machine.DRY_RUN, command))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = [place for place, item in enumerate(items) if Path(__file__).parent in item.path.parents]
    for place, item in zip(places, sorted((items[place] for place in places), key=_place), strict=True):
        items[place] = item
        if reason := _why_skipped(item):
            item.add_marker(pytest.mark.skip(reason=reason))


def _place(item: pytest.Item) -> tuple[bool, int]:
    """Tests that measure time come last, when no job is left to disturb them."""
    name = item.path.stem.removeprefix("test_")
    return "quiet" in getattr(item, "fixturenames", ()), ORDER.index(name) if name in ORDER else len(ORDER)


def _why_skipped(item: pytest.Item) -> str | None:
    if not (machine.ON_GPU or machine.DRY_RUN):
        return "needs a GPU that torch can use"
    for mark in item.iter_markers("needs_te"):
        if not machine.HAS_TE and not (machine.DRY_RUN and mark.kwargs.get("or_dry")):
            return "needs a GPU and Transformer Engine (extra megatron-mtpd[te])"
        if machine.ON_GPU and mark.kwargs.get("capability", (0, 0)) > machine.CAPABILITY:
            return "needs a GPU of compute capability {}.{}".format(*mark.kwargs["capability"])
    for mark in item.iter_markers("needs_gpus"):
        if machine.ON_GPU and mark.args[0] > machine.GPUS:
            return f"needs {mark.args[0]} GPUs"
    return None


def _is_skipped(item: pytest.Item) -> bool:
    return bool(item.get_closest_marker("skip")) or any(mark.args[0] for mark in item.iter_markers("skipif"))


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """Keeps a name and a value for the report."""
    return lambda name, value: request.node.user_properties.append((name, str(value)))


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """The results of all jobs that the selected tests ask for."""
    items = [item for item in request.session.items if not _is_skipped(item)]
    wanted = [name for item in items for mark in item.iter_markers("runs") for name in mark.args]
    runs = Runs(tmp_path_factory.mktemp("runs"), wanted)
    yield runs
    runs.close()


@pytest.fixture
def quiet() -> None:
    """Waits until no job runs, and gives back what this process holds of the GPU's memory without using it."""
    wait_for_all()
    if machine.ON_GPU:
        torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for outcome in ("passed", "failed"):
        for result in terminalreporter.stats.get(outcome, []):
            if result.nodeid.startswith(FOLDER):
                for name, value in result.user_properties:
                    terminalreporter.write_line(f"{result.nodeid.removeprefix(FOLDER)}: {name}: {value}")
