"""Time, memory and tensor-parallel traffic of finding the top-N cut: `topn_cut` beside what one would write with torch.

Each method answers the same question, the N-th largest logit of every row, in processes of its own, one a rank:

- `topn_cut`: counts of the logits above a few numbers; over ranks, the counts are reduced.
- `topk`: `torch.topk` of N; over ranks, each one's candidates are gathered, and the topk of them taken.
- `kthvalue`: `torch.kthvalue`; over ranks, the logits are gathered.
- `triton`, on a GPU: counts of digits; over ranks, these are reduced.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

METHODS = ("topn_cut", "topk", "kthvalue", "triton")


@dataclass(frozen=True)
class Rows:
    """Logits: normal numbers of deviation 3, [rows, vocab / tp] a rank."""

    rows: int = 128
    vocab: int = 131_072
    topn: int = 10_000
    dtype: str = "float32"
    tp: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype is {self.dtype!r}: choose float32, bfloat16 or float16.")
        for name in ("rows", "vocab", "topn", "tp"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give at least 1.")
        if self.vocab % self.tp:
            raise ValueError(f"--vocab {self.vocab} does not divide into --tp {self.tp} slices.")


def benchmark(rows: Rows, methods: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """A row a method: `method, seconds_median, seconds_min, peak_extra_bytes, tp_bytes` (the last two of rank 0).

    Raises RuntimeError with the end of its output when a method fails.
    """
    return [{"method": method, **_run(method, rows, repeats)} for method in methods]


def table(results: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'method':12}{'ms':>10}{'min':>10}{'extra MB':>10}{'TP MB':>10}"]
    for row in results:
        times = f"{1e3 * row['seconds_median']:10.1f}{1e3 * row['seconds_min']:10.1f}"
        lines.append(f"{row['method']:12}{times}{row['peak_extra_bytes'] / 1e6:10.1f}{row['tp_bytes'] / 1e6:10.3f}")
    return "\n".join(lines)


def save(results: Sequence[dict[str, Any]], path: Path, rows: Rows) -> None:
    """The rows with what is needed to measure them again, as JSON."""
    from megatron_mtpd.provenance import provenance

    document = {"rows": list(results), "logits": asdict(rows), "provenance": provenance()}
    path.write_text(json.dumps(document, indent=1) + "\n")


def _run(method: str, rows: Rows, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = json.dumps([method, asdict(rows), repeats, str(Path(folder, "store"))])
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={"OMP_NUM_THREADS": "1", **os.environ, "LOCAL_RANK": str(rank)},
            )
            for rank in range(rows.tp)
        ]
        try:
            printed = [process.communicate()[0] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
    if any(process.returncode for process in ranks):
        raise RuntimeError(f"{method} failed:\n" + "\n".join(text[-2000:] for text in printed))
    return json.loads(printed[0].splitlines()[-1])


def _measure(method: str, rows: Rows, repeats: int, store: str) -> dict[str, Any]:
    """In a rank."""
    import torch
    import torch.distributed as dist

    from megatron_mtpd.training.measure import CountBytes, Memory, has_gpu

    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if has_gpu() else torch.device("cpu")
    backend = "nccl" if has_gpu() else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(store, rows.tp), rank=rank, world_size=rows.tp)
    generator = torch.Generator().manual_seed(rank)
    logits = 3.0 * torch.randn(rows.rows, rows.vocab // rows.tp, generator=generator)
    logits = logits.to(getattr(torch, rows.dtype)).to(device)
    find = _method(method, rows)
    with CountBytes():
        find(logits[:1])  # libraries load what they need at their first call
    memory = Memory()
    with CountBytes() as counter:
        find(logits)
    peak, seconds = memory.peak_extra_bytes(), []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        find(logits)
        if has_gpu():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    dist.destroy_process_group()
    return {
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "peak_extra_bytes": peak,
        "tp_bytes": counter.bytes,
    }


def _method(method: str, rows: Rows) -> Callable[[Any], Any]:
    import torch.distributed as dist
    from torch import Tensor

    from megatron_mtpd.losses import topn

    group = dist.group.WORLD

    def gathered(x: Tensor) -> Tensor:
        if rows.tp == 1:
            return x
        everyone = x.new_empty(rows.tp * len(x), x.shape[1])
        dist.all_gather_into_tensor(everyone, x.contiguous(), group=group)
        return everyone.view(rows.tp, *x.shape).transpose(0, 1).flatten(1)

    def topk(x: Tensor) -> Tensor:
        values = x.topk(min(rows.topn, x.shape[1])).values
        return values[:, -1] if rows.tp == 1 else gathered(values).topk(rows.topn).values[:, -1]

    if method == "topk":
        return topk
    if method == "kthvalue":
        return lambda x: gathered(x).kthvalue(rows.vocab - rows.topn + 1).values
    if method == "triton":
        from megatron_mtpd.losses import triton_topn

        return lambda x: triton_topn.topn_cut(x, rows.topn, group)
    return lambda x: topn.topn_cut(x, rows.topn, group)


if __name__ == "__main__":
    method, rows, repeats, store = json.loads(sys.argv[1])
    print(json.dumps(_measure(method, Rows(**rows), repeats, store)), flush=True)
    os._exit(0)  # gloo's threads now and then abort a process that ends as usual, after all is said
