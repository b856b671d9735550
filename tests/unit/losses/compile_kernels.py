"""Compiles every Triton kernel for H100 and B200 (compute capability 9.0 and 10.0), and for fp64 once more for H100,
which takes no GPU, and 20 seconds of a core. Run by `test_triton.py`."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_mtpd.losses import triton_chunk, triton_topn

TYPES = {
    "labels": "*i64",
    "firsts": "*i64",
    "keys": "*i64",
    "counts": "*i32",
    "num_rows": "i32",
}
NUMBERS = ("numbers", "normalisers", "sums", "cross_entropy", "coefficients")
COMMON = {"SIZE": 131_072, "HEADS": 5, "PER_TEMPERATURE": 1.25, "TILE": triton_chunk.TILE}


def compile_kernel(kernel, logits: str, **constants) -> None:
    """With pointers to `logits` for what has the dtype of the logits; the arithmetic is fp32, or fp64 for fp64."""
    numbers = "fp64" if logits == "fp64" else "fp32"
    constants |= {"DTYPE": getattr(tl, f"float{numbers[2:]}")}
    types = TYPES | dict.fromkeys(NUMBERS, f"*{numbers}")
    values = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in values else types.get(name, f"*{logits}") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in values.items()})
    for capability in (90,) if logits == "fp64" else (90, 100):
        target = GPUTarget("cuda", capability, 32)
        triton.compile(source, target=target, options={"num_warps": triton_chunk.WARPS})


for has_top in (True, False):
    compile_kernel(triton_chunk._statistics, "bf16", **COMMON, IS_FORWARD_KL=True, HAS_TOP=has_top)
compile_kernel(
    triton_chunk._statistics, "bf16", **COMMON | {"PER_TEMPERATURE": 1.0}, IS_FORWARD_KL=False, HAS_TOP=False
)
compile_kernel(triton_chunk._statistics, "fp64", **COMMON, IS_FORWARD_KL=True, HAS_TOP=True)
for factor in range(4):
    flags = {"FACTOR": factor, "HAS_TOP": factor == 1, "IS_VARIATION": factor == 2, "IS_APART": factor % 2 == 0}
    compile_kernel(triton_chunk._sums, "bf16", **COMMON, **flags)
    compile_kernel(triton_chunk._gradient, "fp32", **COMMON, **flags)
    compile_kernel(triton_chunk._sums, "fp64", **COMMON, **flags)
    compile_kernel(triton_chunk._gradient, "fp64", **COMMON, **flags)
for bits in (16, 32, 64):
    for is_top in (True, False):
        constants = {
            "SIZE": 131_072,
            "LARGEST": 2 ** (bits - 1) - 1,
            "SHIFT": bits - 8 if is_top else 0,
            "IS_TOP": is_top,
            "TILE": triton_topn.TILE,
        }
        compile_kernel(triton_topn._count_digits, f"i{bits}", **constants)
