"""What a plan assumes about a GPU: usable memory, and dense peak rates after the makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One device. Rates are without sparsity."""

    name: str
    gib: float
    """Memory that torch can allocate, GiB."""
    tflops: float
    """bf16 and fp16 with fp32 sums, 10^12 / s."""
    tflops_fp8: float | None
    """None: it has no FP8."""
    tflops_fp32: float
    """fp32 matrices as TF32, where there is one."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100", 79.0, 312.0, None, 156.0),
        GPU("H100", 79.0, 989.0, 1979.0, 494.0),
        GPU("H200", 139.5, 989.0, 1979.0, 494.0),
        GPU("B200", 178.0, 2250.0, 4500.0, 1100.0),
        GPU("GB200", 184.0, 2500.0, 5000.0, 1250.0),
    )
}
