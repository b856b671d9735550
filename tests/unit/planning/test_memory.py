"""Planned memory within 10% of the peak that real training steps reach, in processes of their own.

The peak is resident memory beyond the imported libraries, as tools/benchmark_step.py measures it. glibc is told to give
large blocks back at once, as a GPU's allocator reuses them; what it keeps otherwise is no memory of the run.
"""

from __future__ import annotations

import pytest

from megatron_mtpd import platform

platform.setup()

from megatron_mtpd.planning import memory  # noqa: E402
from megatron_mtpd.planning.flags import run_from_flags  # noqa: E402
from megatron_mtpd.training.benchmark_step import benchmark  # noqa: E402

FLAGS = (
    "--mock-data --tokenizer-type NullTokenizer --num-workers 0 --lr 1e-4 --no-create-attention-mask-in-dataloader "
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    "--attention-dropout 0 --hidden-dropout 0 --group-query-attention --num-query-groups 4 --num-attention-heads 8 "
    "--hidden-size 512 --ffn-hidden-size 1408 --num-layers 2 --mtp-num-layers 2 --seq-length 512 "
    "--max-position-embeddings 512 --micro-batch-size 2 --global-batch-size 2 --vocab-size 16000"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "flags"),
    [("mtpd_fused", "--bf16 --use-distributed-optimizer"), ("mtpd_eager", "")],
    ids=["fused-bf16-sharded", "eager-fp32"],
)
def test_peak_of_real_steps(monkeypatch, variant, flags):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "262144")
    every = [*FLAGS.split(), *flags.split()]
    measured = benchmark(every, [variant], rounds=1, steps=1, threads=1, on_round=lambda turn: None)[0]["peak_bytes"]
    run = run_from_flags([*every, "--mtpd-loss", variant.removeprefix("mtpd_")], 1, on_cpu=True)
    assert memory.of_rank(run, 0).peak == pytest.approx(measured, rel=0.1)
