"""Planned memory beside the peak that real training steps reach, in processes of their own.

What torch allocates for tensors is within 5% of the plan, whatever libraries keep for themselves (`-s` prints the
ratios). On a CPU a plan counts some of that as well: resident memory beyond the imported libraries, as
tools/benchmark_step.py measures it, is within 10%. glibc is told then to give large blocks back at once; what it keeps
otherwise is no memory of the run.
"""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pytest

from megatron_mtpd import platform

platform.setup()

from megatron_mtpd.planning import memory  # noqa: E402
from megatron_mtpd.planning.flags import run_from_flags  # noqa: E402
from megatron_mtpd.training.benchmark_step import _Worker, prepare, without_heads  # noqa: E402
from megatron_mtpd.training.measure import Allocations  # noqa: E402
from tests.distributed import gloo  # noqa: E402

FLAGS = (
    "--mock-data --tokenizer-type NullTokenizer --num-workers 0 --lr 1e-4 --no-create-attention-mask-in-dataloader "
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    "--attention-dropout 0 --hidden-dropout 0 --num-attention-heads 8 --hidden-size 512 --ffn-hidden-size 1408 "
    "--seq-length 512 --max-position-embeddings 512 --micro-batch-size 2 --global-batch-size 2 --vocab-size 16000"
)
GROUPED = "--num-layers 2 --mtp-num-layers 2 --group-query-attention --num-query-groups 4"
LATENT = (
    "--hybrid-layer-pattern +-+-/+-/+- --multi-latent-attention --q-lora-rank 192 --kv-lora-rank 64 --qk-head-dim 64 "
    "--qk-pos-emb-head-dim 32 --v-head-dim 48 --qk-layernorm --no-rope-fusion"
)
EXPERTS = "--num-experts 8 --moe-ffn-hidden-size 352 --moe-router-topk 2 --moe-token-dispatcher-type alltoall"
RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
APART = "--mtpd-ce-output-share 1 --mtpd-kd-output-share 0.5"
CASES = {
    "no-heads-fp32": ("no_mtp", GROUPED, 1, 1),
    "eager-fp32": ("mtpd_eager", GROUPED, 1, 1),
    "fused-fp32-tp2": ("mtpd_fused", GROUPED, 2, 1),
    "fused-fp32-pp2": ("mtpd_fused", GROUPED, 1, 2),
    "fused-fp32-cp2": ("mtpd_fused", f"{GROUPED} --context-parallel-size 2", 1, 1),
    "fused-fp32-dp2-sharded": ("mtpd_fused", f"{GROUPED} --global-batch-size 4 --use-distributed-optimizer", 1, 1),
    "four-heads-fp32": ("mtpd_fused", GROUPED.replace("layers 2 --group", "layers 4 --group"), 1, 1),
    "new-heads-fp32": ("mtpd_fused", f"{GROUPED} --mtpd-train new-heads --mtpd-old-heads 1", 1, 1),
    "recomputed-fp32": ("mtpd_fused", f"{GROUPED} {RECOMPUTED}", 1, 1),
    "two-passes-fp32": ("mtpd_fused", f"{GROUPED} --mtpd-kd-trunk-share 0.5", 1, 1),
    "output-shares-fp32": ("mtpd_fused", f"{GROUPED} {APART}", 1, 1),
    "latent-fp32": ("mtpd_fused", LATENT, 1, 1),
    "experts-fp32": ("mtpd_fused", f"{GROUPED} {EXPERTS}", 1, 1),
    "experts-bf16": ("mtpd_fused", f"{GROUPED} {EXPERTS} --bf16", 1, 1),
    "fused-bf16-sharded": ("mtpd_fused", f"{GROUPED} --bf16 --use-distributed-optimizer", 1, 1),
    "fused-bf16-tp2-pp2": ("mtpd_fused", f"{GROUPED} --bf16", 2, 2),
}
"""By name: variant, flags, and tensor- and pipeline-parallel size."""
QUICK = {"new-heads-fp32", "experts-fp32", "latent-fp32", "fused-fp32-tp2", "no-heads-fp32"}
"""Below 20 seconds. In bf16 a CPU without instructions for it needs minutes."""
RESIDENT = ("experts-fp32", "fused-fp32-tp2")


def allocated(variant: str, flags: list[str]) -> int:
    """On a rank: the peak of two steps, model and optimizer included."""
    with Allocations() as allocations:
        step, _ = prepare(variant, flags)
        step()
        step()
    return allocations.peak


def resident(variant: str, flags: list[str], ranks: int) -> list[int]:
    """The same of all that a process has, on each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    workers = []
    try:
        for rank in range(ranks):
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
            with patch.dict(os.environ, where | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{ranks}"}):
                workers.append(_Worker(variant, flags, threads=1))
        with ThreadPoolExecutor(ranks) as pool:
            list(pool.map(lambda worker: worker.steps(2), workers))
    finally:
        for worker in workers:
            worker.stop()
    return [worker.peak_bytes for worker in workers]


def planned(name: str) -> tuple[list[memory.Memory], list[str]]:
    """Of each rank of a case, and its flags."""
    variant, flags, tp, pp = CASES[name]
    every = [*FLAGS.split(), *flags.split(), "--tensor-model-parallel-size", str(tp)]
    every += ["--pipeline-model-parallel-size", str(pp)]
    own = without_heads(every) if variant == "no_mtp" else [*every, "--mtpd-loss", variant.removeprefix("mtpd_")]
    ranks = tp * pp * (2 if "cp2" in name or "dp2" in name else 1)
    run = run_from_flags(own, ranks, on_cpu=True)
    return [memory.of_rank(run, rank * pp // ranks) for rank in range(ranks)], every


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_what_torch_allocates_in_real_steps(name):
    plans, flags = planned(name)
    measured = gloo.run(allocated, len(plans), CASES[name][0], flags, timeout=900.0)
    ratios = [f"{plan.allocated / peak:.3f}" for plan, peak in zip(plans, measured, strict=True)]
    print(f"\n{name}: planned / allocated {', '.join(ratios)}")
    assert [plan.allocated for plan in plans] == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("name", RESIDENT)
def test_what_real_steps_take_of_a_machine(monkeypatch, name):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "262144")
    plans, flags = planned(name)
    measured = resident(CASES[name][0], flags, len(plans))
    assert [plan.peak for plan in plans] == pytest.approx(measured, rel=0.1)
