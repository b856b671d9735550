"""What is reported of a run, under which names, and where: Megatron's log line, TensorBoard and a JSONL file.

The log line must stay readable with many heads, so its names are short (`ar/2`); TensorBoard and JSONL get the full
ones (`acceptance_rate/head_2`). Megatron averages pairs (sum, count) over micro-batches and ranks, in training and in
validation, so every metric is given as such a pair, and all three places show the same numbers.

| log line | TensorBoard, JSONL | of head k |
|---|---|---|
| ce/k | cross_entropy/head_k | cross-entropy, nats |
| kd/k | distillation/head_k | the distillation objective, without its weight |
| ar/k | acceptance_rate/head_k | AR_k: its argmax is the main head's, given that heads 1..k-1 were accepted |
| car/k | cumulative_acceptance_rate/head_k | CAR_k: heads 1..k were all accepted |
| overlap/k | overlap/head_k | sum_v min(p, q): acceptance of a sampled draft |
| tokens/step | tokens_per_step/greedy | tokens of one speculative step that follow from it |
| objective | objective | 1: --mtpd-objective, 2: --mtpd-next-objective; only where there is a next one |
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mtpd.losses.report import LossReport

FULL_NAMES = {
    "ce": "cross_entropy",
    "kd": "distillation",
    "ar": "acceptance_rate",
    "car": "cumulative_acceptance_rate",
    "overlap": "overlap",
}
OTHER_NAMES = {
    "lm loss": "lm loss",
    "tokens/step": "tokens_per_step/greedy",
    "tokens/step sampled": "tokens_per_step/sampled",
    "grad-norm": "grad_norm/trunk",
}


def metrics_from_report(report: LossReport) -> dict[str, Tensor]:
    """The metrics of a micro-batch, each a tensor [2] of sum and count, by their names in the log line."""
    metrics = {"lm loss": (report.main_loss, report.main_tokens)}
    for k in range(report.tokens.numel()):
        metrics |= {
            f"ce/{k + 1}": (report.cross_entropy[k], report.tokens[k]),
            f"kd/{k + 1}": (report.distillation[k], report.tokens[k]),
            f"ar/{k + 1}": (report.cumulative[k], report.reached[k]),
            f"car/{k + 1}": (report.cumulative[k], report.drafted[k]),
            f"overlap/{k + 1}": (report.overlap[k], report.drafted[k]),
        }
    metrics["tokens/step"] = (report.tokens_per_step, report.drafted[-1])
    metrics["tokens/step sampled"] = (report.tokens_per_step_sampled, report.drafted[-1])
    return {name: torch.stack([total, count]).float() for name, (total, count) in metrics.items()}


def full_name(tag: str) -> str:
    """TensorBoard's name of a tag of Megatron's: `ar/2 validation` -> `acceptance_rate/head_2 validation`."""
    name, _, split = tag.partition(" validation")
    suffix = " validation" + split if split or tag.endswith(" validation") else ""
    metric, _, head = name.partition("/")
    if metric in FULL_NAMES and head.isdigit():
        return f"{FULL_NAMES[metric]}/head_{head}{suffix}"
    return OTHER_NAMES.get(name, name) + suffix


class MetricsWriter:
    """A TensorBoard SummaryWriter that renames, derives, groups heads in one chart, and writes JSONL beside it.

    Args:
        writer: the SummaryWriter, or None for JSONL alone.
        jsonl: path of the file, appended to; None for TensorBoard alone.
        num_heads: number of heads, for the layout of charts.
        heads_grad_norm: called when Megatron reports the gradient norm; the norm of the heads' own, or None.

    A record is written when the iteration of the next scalar is another one, so that each iteration has one line.
    """

    def __init__(
        self,
        writer: Any,
        jsonl: str | Path | None,
        num_heads: int,
        heads_grad_norm: Any = lambda: None,
    ) -> None:
        self._writer = writer
        self._heads_grad_norm = heads_grad_norm
        self._record: dict[str, Any] = {}
        self._jsonl = None
        if jsonl is not None:
            Path(jsonl).parent.mkdir(parents=True, exist_ok=True)
            self._jsonl = open(jsonl, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  # lives as long as we do
        if writer is not None:
            writer.add_custom_scalars(chart_layout(num_heads))

    def add_scalar(self, tag: str, value: Any, iteration: int, *args: Any, **kwargs: Any) -> None:
        """Megatron's tag and value for an iteration; the copies "vs samples" are dropped: the JSONL has the samples."""
        if tag.endswith((" vs samples", " ppl")):
            return
        value = float(value)
        self._add(full_name(tag), value, iteration)
        if tag in ("lm loss", "lm loss validation"):
            self._add(full_name(tag.replace("loss", "perplexity")), math.exp(min(value, 80.0)), iteration)
        if tag == "grad-norm":
            heads = self._heads_grad_norm()
            if heads is not None:
                self._add("grad_norm/heads", float(heads), iteration)

    def _add(self, name: str, value: float, iteration: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(name, value, iteration)
        if self._record.get("iteration") != iteration:
            self._write_record()
            self._record = {"iteration": iteration, "time": time.time()}
        # JSON has no NaN or infinity; null is what readers of JSONL expect
        self._record[name] = value if math.isfinite(value) else None

    def _write_record(self) -> None:
        if self._jsonl is not None and self._record:
            self._jsonl.write(json.dumps(self._record) + "\n")
        self._record = {}

    def flush(self) -> None:
        """Write what is pending."""
        self._write_record()
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write what is pending and close the files. The writer cannot be used afterwards."""
        self.flush()
        if self._jsonl is not None:
            self._jsonl.close()
            self._jsonl = None
        if self._writer is not None:
            self._writer.close()

    def __getattr__(self, name: str) -> Any:  # add_text, add_histogram, ...: TensorBoard's own
        if self._writer is None:
            return lambda *args, **kwargs: None
        return getattr(self._writer, name)


def chart_layout(num_heads: int) -> dict[str, dict[str, list]]:
    """TensorBoard's custom layout: one chart a metric with all heads in it, for training and for validation."""

    def charts(suffix: str) -> dict[str, list]:
        heads = range(1, num_heads + 1)
        layout: dict[str, list] = {"main head: loss": ["Multiline", [f"^lm loss{suffix}$"]]}
        for name in FULL_NAMES.values():
            layout[name.replace("_", " ")] = ["Multiline", [f"^{name}/head_{k}{suffix}$" for k in heads]]
        layout["tokens per step"] = ["Multiline", [f"^tokens_per_step/(greedy|sampled){suffix}$"]]
        return layout

    training = charts("")
    training["gradient norms"] = ["Multiline", ["^grad_norm/trunk$", "^grad_norm/heads$"]]
    return {"Training": training, "Validation": charts(" validation")}
