"""Whole runs of the training command on a toy, in forked gloo ranks, and their metrics of every iteration.

Deliberately absent: single steps of any layout, with gradients, which `layouts.py` makes.
"""

import atexit
import json
import sys
import tempfile
from pathlib import Path

from megatron_mtpd.training import pretrain
from tests.distributed import gloo

ITERATIONS, SAVED = 4, 2
TOY = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4"),
    *("--group-query-attention", "--num-query-groups", "2", "--swiglu", "--normalization", "RMSNorm"),
    *("--disable-bias-linear", "--attention-dropout", "0"),
    *("--hidden-dropout", "0", "--seq-length", "16", "--max-position-embeddings", "16", "--mtpd-top-n", "20"),
    # 255 and the end of documents: padded to 256 whether one or two ranks share it
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "255", "--num-workers", "0"),
    *("--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "3e-3", "--min-lr", "1e-4"),
    *("--lr-decay-style", "cosine", "--lr-warmup-iters", "2", "--clip-grad", "0.5", "--train-iters", str(ITERATIONS)),
    *("--eval-iters", "1", "--eval-interval", "2", "--log-interval", "1", "--no-mtpd-clip-apart"),
    *("--mtpd-distill-start", "0", "--mtpd-ce-output-share", "1", "--mtpd-kd-output-share", "1"),
    *("--save-interval", str(SAVED), "--use-cpu-initialization"),
]
HEADS = ["--mtp-num-layers", "2"]
TIMINGS = ("time", "throughput")
Metrics = dict[int, dict[str, float]]


def loop(flags: list[str], jsonl: str) -> None:
    """On a rank: the training command."""
    sys.argv[:] = ["pretrain_mtpd.py"]
    pretrain.main([*TOY, *([] if "--mtp-num-layers" in flags else HEADS), *flags, "--metrics-jsonl", jsonl])
    atexit._run_exitfuncs()  # writes the last record: the rank will be killed


def run(folder: Path, ranks: int, *flags: str) -> Metrics:
    """Train: the metrics of each iteration, without timings."""
    with tempfile.NamedTemporaryFile("r", dir=folder, suffix=".jsonl") as jsonl:
        gloo.run(loop, ranks, list(flags), jsonl.name)
        records = [json.loads(line) for line in jsonl]
    return {record["iteration"]: {k: v for k, v in record.items() if _is_compared(k, v)} for record in records}


def _is_compared(name: str, value: float | None) -> bool:
    return value is not None and not any(word in name for word in TIMINGS)


def second_half(metrics: Metrics) -> Metrics:
    """What a run adds that is resumed from the checkpoint in the middle."""
    return {iteration: metrics[iteration] for iteration in range(SAVED + 1, ITERATIONS + 1)}
