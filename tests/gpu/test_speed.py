"""What MTP-D costs on a GPU: step time and memory beside Megatron's own MTP, and beside the plan of the same run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from megatron_mtpd import platform

platform.setup()

from megatron_mtpd.planning.flags import run_from_flags  # noqa: E402
from megatron_mtpd.planning.gpus import GPUS  # noqa: E402
from megatron_mtpd.planning.plan import plan  # noqa: E402
from tests.gpu.commands import ROOT, SHORT_2B, shape  # noqa: E402
from tests.gpu.conftest import DRY_RUN, HAS_GPU, HAS_TE  # noqa: E402

pytestmark = pytest.mark.gpu

ON_GPU = HAS_GPU and not DRY_RUN
FP8 = ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_step_beside_plain_mtp(tmp_path, report, precision):
    """The 2B shape, shortened: MTP-D takes at most 2% more time than Megatron's MTP, and its plan holds within 10%."""
    if precision == "fp8" and ON_GPU and not HAS_TE:
        pytest.skip("needs Transformer Engine (extra megatron-mtpd[te])")
    flags = shape(SHORT_2B) + (FP8 if precision == "fp8" and ON_GPU else [])
    file = tmp_path / "rows.json"
    # One at a time, because each has the GPU's memory to itself: the variants' processes live side by side.
    rows = {}
    for variant in ("no_mtp", "megatron_mtp", "mtpd_fused") + (() if ON_GPU else ("mtpd_eager",)):
        rounds = "--rounds 3 --steps 5" if ON_GPU else "--rounds 1 --steps 1"
        command = [sys.executable, str(ROOT / "tools" / "benchmark_step.py"), "--variants", variant, *rounds.split()]
        done = subprocess.run([*command, "--json", str(file), *flags], capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        rows[variant] = json.loads(file.read_text())["rows"][0]
    run = run_from_flags(flags, 1, on_cpu=not ON_GPU)
    # That GPU's own rate, for the share of it; unknown ones are measured against an H100.
    name = torch.cuda.get_device_name() if ON_GPU else ""
    gpu = next((GPUS[known] for known in GPUS if known in name), GPUS["H100"])
    expected = plan(run, gpu if ON_GPU else None)
    for variant, row in rows.items():
        seconds, gib = row["seconds_median"], row["peak_bytes"] / 2**30
        report(f"{precision} {variant}", f"{1e3 * seconds:.1f} ms, {run.tokens / seconds:,.0f} tokens/s, {gib:.2f} GiB")
    mtpd = rows["mtpd_fused"]
    ratio = mtpd["seconds_median"] / rows["megatron_mtp"]["seconds_median"]
    planned = expected.memory[0].peak / mtpd["peak_bytes"]
    report(f"{precision} MTP-D / plain MTP", f"time {ratio:.3f}")
    report(f"{precision} planned / measured peak memory", f"{planned:.3f}")
    if ON_GPU:
        rate = (gpu.tflops_fp8 if precision == "fp8" else gpu.tflops) or gpu.tflops
        report(f"{precision} MFU", f"{expected.flops_step / mtpd['seconds_median'] / (rate * 1e12):.1%} of {gpu.name}")
        assert ratio <= 1.02
        assert planned == pytest.approx(1.0, abs=0.1)
