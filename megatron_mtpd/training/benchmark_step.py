"""Step time and peak memory of whole training steps: no MTP, Megatron's own MTP, and MTP-D, side by side.

`mtpd_new_heads` is the step after looped extension: all is frozen but the second half of the heads.

Each variant lives in a process of its own, so that its peak memory is its own, and all take turns of a few steps, so
that noise of the machine falls on all alike. A step is Megatron's `train_step`: forward, backward, gradient reduction,
optimizer. Memory is the peak of what torch allocated on a GPU, and of the resident memory beyond the imported libraries
on a CPU.

Deliberately absent: judgement. The result is a table of medians and of ratios to Megatron's own MTP.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

VARIANTS = ("no_mtp", "megatron_mtp", "mtpd_eager", "mtpd_fused")
FROZEN = "mtpd_new_heads"
BASELINE = "megatron_mtp"


def benchmark(
    flags: Sequence[str],
    variants: Sequence[str],
    rounds: int,
    steps: int,
    threads: int,
    on_round: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Measure `rounds` turns of `steps` steps of every variant, after one turn to warm up.

    `flags` are those of tools/pretrain_mtpd.py: model, batch, parallel sizes of one process. Returns a row a variant:
    `variant, seconds_median, seconds_min, seconds_max, peak_bytes, ratio_time_vs_megatron, ratio_memory_vs_megatron`.
    Raises RuntimeError with the end of its output when a variant fails.
    """
    workers = {variant: _Worker(variant, flags, threads) for variant in variants}
    try:
        for worker in workers.values():
            worker.steps(steps)  # warm-up: allocators, lazily built state
        seconds: dict[str, list[float]] = {variant: [] for variant in variants}
        for turn in range(rounds):
            for variant, worker in workers.items():
                seconds[variant] += worker.steps(steps)
            on_round(turn)
        rows = [
            {
                "variant": variant,
                "seconds_median": statistics.median(times),
                "seconds_min": min(times),
                "seconds_max": max(times),
                "peak_bytes": workers[variant].peak_bytes,
            }
            for variant, times in seconds.items()
        ]
    finally:
        for worker in workers.values():
            worker.stop()
    base = next((row for row in rows if row["variant"] == BASELINE), None)
    for row in rows:
        row["ratio_time_vs_megatron"] = base and row["seconds_median"] / base["seconds_median"]
        row["ratio_memory_vs_megatron"] = base and row["peak_bytes"] / base["peak_bytes"]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    titles = f"{'variant':14}{'ms a step':>12}{'min':>9}{'max':>9}{'peak MB':>10}{'time':>8}{'memory':>8}"
    lines = [f"{titles}  (vs {BASELINE})"]
    for row in rows:
        ratios = [row["ratio_time_vs_megatron"], row["ratio_memory_vs_megatron"]]
        times = [1e3 * row[f"seconds_{name}"] for name in ("median", "min", "max")]
        shown = "".join(f"{'-':>8}" if ratio is None else f"{ratio:8.3f}" for ratio in ratios)
        lines.append(
            f"{row['variant']:14}{times[0]:12.1f}{times[1]:9.1f}{times[2]:9.1f}{row['peak_bytes'] / 1e6:10.0f}{shown}"
        )
    return "\n".join(lines)


class _Worker:
    """A process that trains one variant and answers `steps`."""

    def __init__(self, variant: str, flags: Sequence[str], threads: int) -> None:
        command = [sys.executable, "-m", __name__, variant, *flags]
        environment = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        self.variant = variant
        self.peak_bytes = 0
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
        )

    def steps(self, count: int) -> list[float]:
        """Run `count` steps; seconds of each."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(f"{count}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what it printed says why
        printed = []
        for line in self.process.stdout:
            if line.startswith(_ANSWER):
                answer = json.loads(line.removeprefix(_ANSWER))
                self.peak_bytes = answer["peak_bytes"]
                return answer["seconds"]
            printed.append(line)
        raise RuntimeError(f"{self.variant} stopped:\n" + "".join(printed[-25:]))

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


_ANSWER = "benchmark_step "


def _serve(variant: str, flags: Sequence[str]) -> None:
    """In the worker: build everything as training does, then run steps when asked."""
    step, libraries = prepare(variant, list(flags))
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        print(_ANSWER + json.dumps({"seconds": seconds, "peak_bytes": _peak_bytes() - libraries}), flush=True)


def prepare(variant: str, flags: list[str]) -> tuple[Callable[[], None], int]:
    """A function that runs one step, and the bytes that were taken before the model was built."""
    import torch
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import get_model_config
    from megatron.training import argument_utils, training
    from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

    from megatron_mtpd.data.datasets import train_valid_test_datasets_provider
    from megatron_mtpd.specs import hybrid_stack_spec
    from megatron_mtpd.training import pretrain as entry  # prepares the machine: first
    from megatron_mtpd.training.forward_step import forward_step

    libraries = _peak_bytes()
    if variant == "no_mtp":
        flags = without_heads(flags)
    if variant == FROZEN:
        flags += ["--mtpd-train", "new-heads", "--mtpd-old-heads", str(_num_heads(flags) // 2)]
    elif variant.startswith("mtpd_"):
        flags += ["--mtpd-loss", variant.removeprefix("mtpd_")]
        flags += [] if "--mtpd-distill-start" in flags else ["--mtpd-distill-start", "0"]  # the steps that distil
    args = entry.parse([*flags, "--train-iters", "10000", "--eval-iters", "0", "--eval-interval", "10000"])
    if variant.startswith("mtpd_"):
        model_config = entry.model_config_from_args(args)
    else:
        model_config = argument_utils.hybrid_config_from_args(args, model_config_cls=HybridModelConfig)
        model_config.hybrid_stack_spec = hybrid_stack_spec(model_config.transformer)
        assert model_config.get_builder_cls() is HybridModelBuilder
    container = entry.pretrain_cfg_container_from_args(args, model_config)
    training.initialize_megatron(store=torch.distributed.HashStore() if args.world_size == 1 else None)
    model, optimizer, scheduler = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=container,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    iterator, _, _ = training.build_train_valid_test_data_iterators(train_valid_test_datasets_provider)
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    for chunk in model:
        chunk.train()
    args.curr_iteration = 0
    function = forward_step if variant.startswith("mtpd_") else _forward_step

    def step() -> None:
        training.train_step(
            function, iterator, model, optimizer, scheduler, config, get_forward_backward_func(), iteration=0
        )
        torch.cuda.synchronize()

    return step, libraries


def _forward_step(data_iterator: Iterator[Any], model: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The forward step of Megatron's own models."""
    from megatron_mtpd.data.datasets import get_batch

    batch = get_batch(data_iterator)
    mask = batch["loss_mask"]
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    output = model(*inputs, labels=batch["labels"], loss_mask=mask)

    def loss_func(mask: Any, losses: Any) -> tuple[Any, Any, dict[str, Any]]:
        return (losses.float() * mask).sum(), mask.sum().int(), {}

    return output, partial(loss_func, mask)


def without_heads(flags: list[str]) -> list[str]:
    """The same main model, no heads."""
    for name in ("--mtp-num-layers", "--hybrid-layer-pattern"):
        if name in flags:
            place = flags.index(name) + 1
            value = "0" if name == "--mtp-num-layers" else flags[place].split("/")[0]
            flags = [*flags[:place], value, *flags[place + 1 :]]
    return flags


def _num_heads(flags: list[str]) -> int:
    if "--mtp-num-layers" in flags:
        return int(flags[flags.index("--mtp-num-layers") + 1])
    return flags[flags.index("--hybrid-layer-pattern") + 1].count("/")


def _peak_bytes() -> int:
    import torch

    from megatron_mtpd.training.measure import peak_resident_bytes

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident_bytes()


def save(rows: Sequence[dict[str, Any]], path: Path, options: Namespace, flags: Sequence[str]) -> None:
    """The rows with what is needed to measure them again, as JSON."""
    from megatron_mtpd.provenance import provenance

    document = {"rows": list(rows), "flags": list(flags), "options": vars(options), "provenance": provenance()}
    path.write_text(json.dumps(document, indent=1, default=str) + "\n")


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2:])
