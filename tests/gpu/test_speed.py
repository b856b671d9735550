"""What MTP-D costs on a GPU: step time and memory beside Megatron's own MTP, and beside the plan of the same run;
FP8 beside bf16, the fused loss beside the eager one."""

from __future__ import annotations

import json
import subprocess
import sys
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
from megatron_mtpd.training.benchmark_step import _without_heads  # noqa: E402
from tests.gpu.commands import ROOT, SHORT_2B, SHORT_2B_1024, shape  # noqa: E402
from tests.gpu.conftest import DRY_RUN, HAS_GPU, HAS_TE  # noqa: E402

pytestmark = pytest.mark.gpu

ON_GPU = HAS_GPU and not DRY_RUN
FP8 = ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"]
GIB = 2**30

_fused_seconds: dict[str, float] = {}
"""Of a step of MTP-D, by precision, to compare them."""


def measure(folder: Path, flags: list[str], variants: Sequence[str]) -> dict[str, dict]:
    """Rows of tools/benchmark_step.py, one variant at a time, which then has the GPU's memory to itself."""
    file, rows = folder / "rows.json", {}
    rounds = "--rounds 3 --steps 5" if ON_GPU else "--rounds 1 --steps 1"
    for variant in variants:
        command = [sys.executable, str(ROOT / "tools" / "benchmark_step.py"), "--variants", variant, *rounds.split()]
        done = subprocess.run([*command, "--json", str(file), *flags], capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        rows[variant] = json.loads(file.read_text())["rows"][0]
    return rows


def check_plan(name: str, flags: list[str], row: dict, report: Callable[[str, object], None]) -> None:
    """The planned memory is within 10% of the measured peak."""
    planned = memory.of_rank(run_from_flags(flags, 1, on_cpu=not ON_GPU), 0).peak / row["peak_bytes"]
    report(f"{name}, planned / measured peak memory", f"{planned:.3f}")
    if ON_GPU:
        assert planned == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_step_beside_plain_mtp(tmp_path, report, precision):
    """The 2B shape, shortened: MTP-D takes at most 2% more time than Megatron's MTP, and its plan holds within 10%."""
    if precision == "fp8" and ON_GPU and not HAS_TE:
        pytest.skip("needs Transformer Engine (extra megatron-mtpd[te])")
    flags = shape(SHORT_2B) + (FP8 if precision == "fp8" and ON_GPU else [])
    rows = measure(tmp_path, flags, ["no_mtp", "megatron_mtp", "mtpd_fused"])
    run = run_from_flags(flags, 1, on_cpu=not ON_GPU)
    for variant, row in rows.items():
        seconds, gib = row["seconds_median"], row["peak_bytes"] / GIB
        report(f"{precision} {variant}", f"{1e3 * seconds:.1f} ms, {run.tokens / seconds:,.0f} tokens/s, {gib:.2f} GiB")
    seconds = rows["mtpd_fused"]["seconds_median"]
    ratio = seconds / rows["megatron_mtp"]["seconds_median"]
    report(f"{precision} MTP-D / plain MTP", f"time {ratio:.3f} (bar 1.02)")
    _fused_seconds[precision] = seconds
    if _fused_seconds.keys() == {"bf16", "fp8"}:
        report("FP8 / bf16, step of MTP-D", f"time {_fused_seconds['fp8'] / _fused_seconds['bf16']:.3f}")
    if ON_GPU:
        # That GPU's own rate, for the share of it; unknown ones are measured against an H100.
        name = torch.cuda.get_device_name()
        gpu = next((GPUS[known] for known in sorted(GPUS, key=len, reverse=True) if known in name), GPUS["H100"])
        rate = 1e12 * ((gpu.tflops_fp8 if precision == "fp8" else gpu.tflops) or gpu.tflops)
        report(f"{precision} MFU", f"{plan(run, gpu).flops_step / seconds / rate:.1%} of {gpu.name}")
        assert ratio <= 1.02
    check_plan(f"{precision} no_mtp", _without_heads(flags), rows["no_mtp"], report)
    check_plan(f"{precision} mtpd_fused", flags, rows["mtpd_fused"], report)


def test_fused_beside_eager(tmp_path, report):
    """At 1,024 tokens, where the eager loss fits beside the model: the fused one is faster and smaller."""
    flags = shape(SHORT_2B_1024)
    rows = measure(tmp_path, flags, ["mtpd_eager", "mtpd_fused"])
    for variant, row in rows.items():
        report(f"1,024 tokens, {variant}", f"{1e3 * row['seconds_median']:.1f} ms, {row['peak_bytes'] / GIB:.2f} GiB")
    time, peak = (rows["mtpd_fused"][x] / rows["mtpd_eager"][x] for x in ("seconds_median", "peak_bytes"))
    report("1,024 tokens, fused / eager", f"time {time:.3f}, memory {peak:.3f}")
    if ON_GPU:
        assert time < 1.0
        assert peak < 1.0
    for variant, row in rows.items():
        loss = variant.removeprefix("mtpd_")
        check_plan(f"1,024 tokens, {variant}", [*flags, "--mtpd-loss", loss], row, report)
