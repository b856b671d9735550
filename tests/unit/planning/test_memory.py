"""Planned memory within 10% of the peak that real training steps reach, in processes of their own.

The peak is resident memory beyond the imported libraries, as tools/benchmark_step.py measures it. glibc is told to give
large blocks back at once, as a GPU's allocator reuses them; what it keeps otherwise is no memory of the run.
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
from megatron_mtpd.training.benchmark_step import _without_heads, _Worker  # noqa: E402

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
CASES = {
    "fused-bf16-sharded": ("mtpd_fused", f"{GROUPED} --bf16 --use-distributed-optimizer", 1, 1),
    "eager-fp32": ("mtpd_eager", GROUPED, 1, 1),
    "no-heads-fp32": ("no_mtp", GROUPED, 1, 1),
    "fused-bf16-tp2-pp2": ("mtpd_fused", f"{GROUPED} --bf16", 2, 2),
    "new-heads-fp32": ("mtpd_fused", f"{GROUPED} --mtpd-train new-heads --mtpd-old-heads 1", 1, 1),
    "experts-fp32": ("mtpd_fused", f"{GROUPED} {EXPERTS}", 1, 1),
    "latent-fp32": ("mtpd_fused", LATENT, 1, 1),
    "fused-fp32-tp2": ("mtpd_fused", GROUPED, 2, 1),
}
QUICK = {"new-heads-fp32", "experts-fp32", "latent-fp32", "fused-fp32-tp2"}
"""Below 20 seconds. In bf16 a CPU without instructions for it needs minutes."""


def peaks(variant: str, flags: list[str], ranks: int) -> list[int]:
    """Peak bytes of each rank."""
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


@pytest.mark.parametrize(
    ("variant", "flags", "tp", "pp"),
    [pytest.param(*case, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name, case in CASES.items()],
)
def test_peak_of_real_steps(monkeypatch, variant, flags, tp, pp):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "262144")
    every = [*FLAGS.split(), *flags.split(), "--tensor-model-parallel-size", str(tp)]
    every += ["--pipeline-model-parallel-size", str(pp)]
    planned = _without_heads(every) if variant == "no_mtp" else [*every, "--mtpd-loss", variant.removeprefix("mtpd_")]
    run = run_from_flags(planned, tp * pp, on_cpu=True)
    for rank, measured in enumerate(peaks(variant, every, tp * pp)):
        assert memory.of_rank(run, rank // tp).peak == pytest.approx(measured, rel=0.1), f"rank {rank}"
