"""What MTP-D costs on a GPU: step time and memory beside Megatron's own MTP, and beside the plan of the same run;
FP8 beside bf16, the fused loss beside the eager one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from megatron_mtpd import platform

platform.setup()

from megatron_mtpd.planning import memory  # noqa: E402
from megatron_mtpd.planning.flags import run_from_flags  # noqa: E402
from megatron_mtpd.planning.gpus import GPUS  # noqa: E402
from megatron_mtpd.planning.plan import plan  # noqa: E402
from megatron_mtpd.planning.shape import Run  # noqa: E402
from megatron_mtpd.training.benchmark_step import without_heads  # noqa: E402
from tests.gpu.commands import SHORT_2B, SHORT_2B_1024, wide  # noqa: E402
from tests.gpu.machine import DRY_RUN, ON_GPU, tool  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("quiet")]

PRECISIONS = {"bf16": [], "FP8": ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"]}
# By default the heads do not teach the output layer, which saves a product for each that plain MTP makes.
SHARES = {
    "default output shares": [],
    "output shares 1 (published)": ["--mtpd-ce-output-share", "1", "--mtpd-kd-output-share", "1"],
}
BAR = 1.02
GIB = 2**30
TWO_MODELS = 120 * GIB
"""Memory of a GPU that has room for two of the runs below at once."""

_fused_seconds: dict[str, float] = {}
"""Of a step of MTP-D, by precision, to compare them."""


def measure(folder: Path, flags: Sequence[str], variants: Sequence[str]) -> dict[str, dict]:
    """Rows of tools/benchmark_step.py. The variants take turns; on a smaller GPU each has its memory to itself."""
    file, rows = folder / "rows.json", {}
    rounds = ["--rounds", 1, "--steps", 1] if DRY_RUN else ["--rounds", 6, "--steps", 4]
    together = DRY_RUN or torch.cuda.mem_get_info()[1] > TWO_MODELS
    for turn in [variants] if together else [[variant] for variant in variants]:
        tool("benchmark_step.py", "--variants", *turn, *rounds, "--json", file, *flags)
        rows |= {row["variant"]: row for row in json.loads(file.read_text())["rows"]}
    return rows


def check_plan(name: str, flags: Sequence[str], row: dict, report: Callable[[str, object], None]) -> None:
    """The planned memory is within 10% of the measured peak."""
    planned = memory.of_rank(run_from_flags(flags, 1, on_cpu=DRY_RUN), 0).peak / row["peak_bytes"]
    report(f"{name}, planned / measured peak memory", f"{planned:.3f}")
    if ON_GPU:
        assert planned == pytest.approx(1.0, abs=0.1)


def mfu(run: Run, seconds: float) -> str:
    """The share of this GPU's peak in the run's precisions; unknown ones are measured against an H100."""
    name = torch.cuda.get_device_name()
    gpu = next((GPUS[known] for known in sorted(GPUS, key=len, reverse=True) if known in name), GPUS["H100"])
    return f"{plan(run, gpu).seconds_at_peak / seconds:.1%} of {gpu.name}"


def show(name: str, run: Run, row: dict, report: Callable[[str, object], None]) -> None:
    seconds, gib = row["seconds_median"], row["peak_bytes"] / GIB
    report(name, f"{1e3 * seconds:.1f} ms, {run.tokens / seconds:,.0f} tokens/s, {gib:.2f} GiB")


@pytest.mark.parametrize("precision", ["bf16", pytest.param("FP8", marks=pytest.mark.needs_te(capability=(8, 9)))])
def test_step_beside_plain_mtp(tmp_path, report, precision):
    """The 2B shape, shortened: MTP-D takes at most 2% more time than Megatron's MTP, whatever teaches the output
    layer."""
    flags = [*wide(SHORT_2B), *PRECISIONS[precision]]
    ratios = {}
    for shares, more in SHARES.items():
        run = run_from_flags([*flags, *more], 1, on_cpu=DRY_RUN)
        rows = measure(tmp_path, [*flags, *more], ["megatron_mtp", "mtpd_fused"])
        for variant, row in rows.items():
            show(f"{precision} {variant}, {shares}", run, row, report)
        seconds = {variant: row["seconds_median"] for variant, row in rows.items()}
        ratios[shares] = seconds["mtpd_fused"] / seconds["megatron_mtp"]
        report(f"{precision} MTP-D / plain MTP, {shares}", f"time {ratios[shares]:.3f} (bar {BAR})")
        if ON_GPU:
            report(f"{precision} MFU of MTP-D, {shares}", mfu(run, seconds["mtpd_fused"]))
        if not more:
            default = rows["mtpd_fused"]
    _fused_seconds[precision] = default["seconds_median"]
    if _fused_seconds.keys() == PRECISIONS.keys():
        report("FP8 / bf16, step of MTP-D", f"time {_fused_seconds['FP8'] / _fused_seconds['bf16']:.3f}")
    check_plan(f"{precision} mtpd_fused", flags, default, report)
    if ON_GPU:
        assert max(ratios.values()) <= BAR, ratios


def test_stepwithout_heads(tmp_path, report):
    """The main model alone, and its plan."""
    flags = wide(SHORT_2B)
    row = measure(tmp_path, flags, ["no_mtp"])["no_mtp"]
    show("bf16 no_mtp", run_from_flags(flags, 1, on_cpu=DRY_RUN), row, report)
    check_plan("bf16 no_mtp", without_heads(flags), row, report)


def test_fused_beside_eager(tmp_path, report):
    """At 1,024 tokens, where the eager loss fits beside the model: the fused one is faster and smaller."""
    flags, size = wide(SHORT_2B_1024), "toy" if DRY_RUN else "1,024 tokens"
    rows = measure(tmp_path, flags, ["mtpd_eager", "mtpd_fused"])
    for variant, row in rows.items():
        report(f"{size}, {variant}", f"{1e3 * row['seconds_median']:.1f} ms, {row['peak_bytes'] / GIB:.2f} GiB")
    time, peak = (rows["mtpd_fused"][x] / rows["mtpd_eager"][x] for x in ("seconds_median", "peak_bytes"))
    report(f"{size}, fused / eager", f"time {time:.3f}, memory {peak:.3f}")
    if ON_GPU:
        assert time < 1.0
        assert peak < 1.0
    for variant, row in rows.items():
        loss = variant.removeprefix("mtpd_")
        check_plan(f"{size}, {variant}", [*flags, "--mtpd-loss", loss], row, report)
