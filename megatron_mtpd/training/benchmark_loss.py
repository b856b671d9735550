"""Time, peak memory and tensor-parallel traffic of the loss section: Megatron's own MTP loss, MTP-D eager, MTP-D fused.

The loss section is everything from the hidden states of main model and heads to their gradients and the output
weight's: output layer, losses, backward. Megatron's is cross-entropy alone, by `process_mtp_loss` and
`compute_language_model_loss`; the other two distil as well. Each variant lives in processes of its own, one a
tensor-parallel rank, so that its peak memory is its own, and the variants take turns, so that noise of the machine
falls on all alike. Memory is what a step takes beyond its inputs (weight, hidden states, labels): their gradients
count.

Deliberately absent: judgement. The result is a table of medians and of ratios to Megatron's.
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

from megatron_mtpd.config import Objective

VARIANTS = ("megatron_mtp", "mtpd_eager", "mtpd_fused")
BASELINE = "megatron_mtp"
_RATIOS = {
    "ratio_time_vs_megatron": "seconds_median",
    "ratio_cpu_time_vs_megatron": "cpu_seconds_median",
    "ratio_memory_vs_megatron": "peak_extra_bytes",
}


@dataclass(frozen=True)
class Workload:
    """Sizes of the loss section. `dtype`: fp32, bf16 or fp16, of weight and hidden states."""

    heads: int = 4
    vocab: int = 32_768
    topn: int = 10_000
    tokens: int = 1_024
    hidden: int = 512
    dtype: str = "fp32"
    tp: int = 1
    sequence_parallel: bool = False
    objective: Objective = "topn_kl"
    threads: int = 1
    """Of each rank, on a CPU."""

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"--dtype is {self.dtype!r}: choose one of {', '.join(_DTYPES)}.")
        for name in ("heads", "vocab", "topn", "tokens", "hidden", "tp", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give at least 1.")
        if self.vocab % self.tp:
            raise ValueError(f"--vocab {self.vocab} does not divide into --tp {self.tp} slices.")
        if self.sequence_parallel and (self.tp == 1 or self.tokens % self.tp):
            raise ValueError(
                f"--sequence-parallel needs --tp of at least 2 that divides --tokens {self.tokens}; it is {self.tp}."
            )


_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def benchmark(
    workload: Workload, variants: Sequence[str], repeats: int, on_turn: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Measure `repeats` steps of every variant, in turns, after one to warm up.

    Returns a row a variant: `variant, seconds_median, seconds_min, seconds_max, cpu_seconds_median` (of the processor,
    all threads: what other work on the machine disturbs least), `peak_extra_bytes` (of the fullest rank), `tp_bytes`
    (of the collectives' tensors on one rank in a step), `ratio_time_vs_megatron, ratio_cpu_time_vs_megatron,
    ratio_memory_vs_megatron` (None without that variant). Raises RuntimeError with the end of its output when a variant
    fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        workers: dict[str, _Worker] = {}
        try:
            for variant in variants:
                workers[variant] = _Worker(variant, workload, Path(folder))
            for worker in workers.values():
                worker.step()
            seconds: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
            for turn in range(repeats):
                for variant, worker in workers.items():
                    seconds[variant].append(worker.step())
                on_turn(turn)
        finally:
            for worker in workers.values():
                worker.stop()
    rows = []
    for variant, times in seconds.items():
        wall, cpu = zip(*times, strict=True)
        rows.append(
            {
                "variant": variant,
                "seconds_median": statistics.median(wall),
                "seconds_min": min(wall),
                "seconds_max": max(wall),
                "cpu_seconds_median": statistics.median(cpu),
                "peak_extra_bytes": workers[variant].peak_extra_bytes,
                "tp_bytes": workers[variant].tp_bytes,
            }
        )
    base = next((row for row in rows if row["variant"] == BASELINE), None)
    for row in rows:
        for ratio, name in _RATIOS.items():
            row[ratio] = base and row[name] / base[name]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    titles = ("variant", "ms a step", "min", "max", "extra MB", "TP MB", "time", "CPU time", "memory")
    lines: list[tuple[str, ...]] = [titles]
    for row in rows:
        times = [f"{1e3 * row[f'seconds_{name}']:.1f}" for name in ("median", "min", "max")]
        sizes = [f"{row['peak_extra_bytes'] / 1e6:.1f}", f"{row['tp_bytes'] / 1e6:.2f}"]
        ratios = ["-" if row[ratio] is None else f"{row[ratio]:.3f}" for ratio in _RATIOS]
        lines.append((row["variant"], *times, *sizes, *ratios))
    shown = [f"{name:14}" + "".join(f"{cell:>10}" for cell in cells) for name, *cells in lines]
    return "\n".join([f"{shown[0]}  (the last three: times that of {BASELINE})", *shown[1:]])


def save(rows: Sequence[dict[str, Any]], path: Path, workload: Workload) -> None:
    """The rows with what is needed to measure them again, as JSON."""
    from megatron_mtpd.provenance import provenance

    document = {
        "rows": list(rows),
        "workload": asdict(workload),
        "load_average": os.getloadavg()[0],
        "provenance": provenance(),
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


class _Worker:
    """The processes of one variant, a tensor-parallel rank each."""

    def __init__(self, variant: str, workload: Workload, folder: Path) -> None:
        self.variant, self.peak_extra_bytes, self.tp_bytes = variant, 0, 0
        self.ranks = []
        self.logs = [folder / f"{variant}.{rank}" for rank in range(workload.tp)]
        for rank, log in enumerate(self.logs):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(workload.tp),
                "OMP_NUM_THREADS": str(workload.threads),
                "PYTHONWARNINGS": "ignore",
                "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            }
            arguments = json.dumps([variant, asdict(workload), str(folder / f"{variant}.store")])
            with log.open("w") as stderr:
                process = subprocess.Popen(
                    [sys.executable, "-m", __name__, arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                    env={**os.environ, **environment},
                )
            self.ranks.append(process)

    def step(self) -> tuple[float, float]:
        """Run one step on all ranks; seconds of the slowest, and of its processor."""
        for process in self.ranks:
            try:
                assert process.stdin
                process.stdin.write("step\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass  # what it printed says why
        answers = [self._answer(process) for process in self.ranks]
        self.peak_extra_bytes = max(answer["peak_extra_bytes"] for answer in answers)
        self.tp_bytes = max(answer["tp_bytes"] for answer in answers)
        return max(answer["seconds"] for answer in answers), max(answer["cpu_seconds"] for answer in answers)

    def _answer(self, process: subprocess.Popen) -> dict[str, Any]:
        for line in process.stdout or ():
            if line.startswith(_ANSWER):
                return json.loads(line.removeprefix(_ANSWER))
        self.stop()
        printed = "".join("".join(log.read_text().splitlines(keepends=True)[-25:]) for log in self.logs)
        raise RuntimeError(f"{self.variant} stopped:\n{printed}")

    def stop(self) -> None:
        for process in self.ranks:
            if process.poll() is None:
                process.kill()
            process.wait()


_ANSWER = "benchmark_loss "


def _serve(variant: str, workload: Workload, store: str) -> None:
    """In a rank: build the inputs, then run a step when asked."""
    from megatron_mtpd.training.loss_section import prepare  # prepares the machine: first
    from megatron_mtpd.training.measure import CountBytes, Memory

    with CountBytes():  # what it imports at its first use is not memory of a step
        step = prepare(variant, workload, store)
    memory = Memory()
    counter = None
    for _ in sys.stdin:
        if counter is None:  # the step that warms up
            with CountBytes() as counter:
                step()
            answer = {"seconds": 0.0, "cpu_seconds": 0.0}
        else:
            start, cpu_start = time.perf_counter(), time.process_time()
            step()
            answer = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
        answer |= {"peak_extra_bytes": memory.peak_extra_bytes(), "tp_bytes": counter.bytes}
        print(_ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    _serve(arguments[0], Workload(**arguments[1]), arguments[2])
