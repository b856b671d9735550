"""Runs of the package's own commands, in processes of their own, and the shapes that they train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.gpu.conftest import DRY_RUN, HAS_GPU

ROOT = Path(__file__).parents[2]
LAYERS = (
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    "--attention-dropout 0 --hidden-dropout 0 --group-query-attention"
)
DATA = "--mock-data --tokenizer-type NullTokenizer --num-workers 0 --no-create-attention-mask-in-dataloader"
TINY = (
    "--num-layers 2 --mtp-num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 "
    "--num-query-groups 2 --seq-length 64 --max-position-embeddings 64 --vocab-size 255 --micro-batch-size 2"
)
# The 2B model of slurm/configs, with as many layers as leave room for the optimizer on one GPU.
SHORT_2B = (
    "--num-layers 8 --mtp-num-layers 4 --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 16 "
    "--num-query-groups 8 --seq-length 4096 --max-position-embeddings 4096 --vocab-size 122879 --micro-batch-size 2"
)
# The same with 1,024 tokens, so that the eager loss fits beside everything else.
SHORT_2B_1024 = SHORT_2B.replace("4096", "1024").replace("--micro-batch-size 2", "--micro-batch-size 1")
SMALL = (
    "--num-layers 4 --mtp-num-layers 2 --hidden-size 512 --ffn-hidden-size 1536 --num-attention-heads 8 "
    "--num-query-groups 4 --seq-length 256 --max-position-embeddings 256 --vocab-size 4095 --micro-batch-size 8"
)


def shape(full: str) -> list[str]:
    """The flags of a model, or of the toy in a dry run."""
    return f"{TINY if DRY_RUN and not HAS_GPU else full} {LAYERS} {DATA} --bf16".split()


def train(folder: Path, flags: list[str], iterations: int, ranks: int = 1, timeout: float = 500) -> list[dict]:
    """tools/pretrain_mtpd.py: its records, one an iteration. Raises AssertionError with the end of its output."""
    metrics = folder / "metrics.jsonl"
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(ROOT / "tools" / "pretrain_mtpd.py"), *flags, "--metrics-jsonl", str(metrics)]
    command += f"--train-iters {iterations} --lr 1e-3 --lr-decay-style constant --log-interval 1 --seed 1".split()
    command += [
        "--eval-iters",
        "0",
        "--eval-interval",
        "100000",
        "--ckpt-format",
        "torch_dist",
        "--split",
        "1,0,0",
        "--mtpd-distill-start",
        "0",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def losses(records: list[dict]) -> list[float]:
    """The main head's loss of every iteration."""
    return [record["lm loss"] for record in records if "lm loss" in record]
