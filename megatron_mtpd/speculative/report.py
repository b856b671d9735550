"""What the benchmark shows: `acceptance.json`, a table, pictures, TensorBoard and a page of HTML, from the same
numbers.

Counts are sums over prompts. Speed is the sum over replicas of tokens over busy time, so it says what all of them do at
once and not how evenly the last prompts were spread. A speedup compares with the same prompts and batch size.

Deliberately absent: measuring.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from megatron_mtpd.checkpoint.files import written_whole
from megatron_mtpd.provenance import provenance
from megatron_mtpd.speculative import cost
from megatron_mtpd.speculative.counts import Acceptance
from megatron_mtpd.speculative.prompts import Prompt
from megatron_mtpd.speculative.teacher_forced import TeacherForced, add

OVERALL = "overall"


def summarize(
    prompts: list[Prompt], lines: list[dict[str, Any]], runs: list[int | str], settings: dict[str, Any]
) -> dict[str, Any]:
    """Everything that `acceptance.json` holds. `lines`: the results of single prompts, whatever their order."""
    lines = sorted((line for line in lines if line["prompt"] < len(prompts)), key=lambda line: line["prompt"])
    good: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    failed: dict[int, str] = {}
    for line in lines:
        if "error" in line:
            failed[line["prompt"]] = line["error"]
        else:
            good[line["run"]].append(line)
    names = [OVERALL, *dict.fromkeys(p.benchmark for p in prompts)]
    decoding = sorted(run for run in good if isinstance(run, int))
    found = {run: {n: _run(good[run], prompts, n) for n in names} for run in decoding}
    for run, by_name in found.items():
        for name, values in by_name.items():
            speeds = {base: found[base][name]["tokens_per_second"] for base in (0, 1) if base in found}
            values["tokens_per_second_autoregressive"] = speeds.get(0)
            values["speedup_vs_autoregressive"] = _ratio(values["tokens_per_second"], speeds.get(0))
            values["speedup_vs_one_head"] = _ratio(values["tokens_per_second"], speeds.get(1))
        if run and settings["temperature"] == 0:
            plain = {line["prompt"]: line["tokens"] for line in good[0]}
            both = [line for line in good[run] if line["prompt"] in plain]
            equal = sum(line["tokens"] == plain[line["prompt"]] for line in both)
            by_name[OVERALL]["outputs_equal_to_plain"] = f"{equal} of {len(both)}"
    forced = {n: _teacher_forced(good["teacher_forced"], prompts, n) for n in names}
    missing = sum(len(prompts) - sum(line["run"] == run for line in lines) for run in runs)
    return {
        "runs": [{"num_heads": k, **v[OVERALL], "benchmarks": {n: v[n] for n in names[1:]}} for k, v in found.items()],
        "teacher_forced": {**forced[OVERALL], "benchmarks": {n: forced[n] for n in names[1:]}},
        "step_cost": _cost(found, good),
        "num_prompts": len(prompts),
        "num_truncated_prompts": sum(line["cut"] > 0 for line in good["teacher_forced"]),
        "failed_prompts": [{"prompt": prompts[i].name, "error": why} for i, why in sorted(failed.items())],
        "complete": not missing,
        "num_missing": missing,
        "settings": settings,
        "provenance": provenance(),
    }


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _of(lines: list[dict[str, Any]], prompts: list[Prompt], name: str) -> list[dict[str, Any]]:
    return [line for line in lines if name in (OVERALL, prompts[line["prompt"]].benchmark)]


def _run(lines: list[dict[str, Any]], prompts: list[Prompt], name: str) -> dict[str, Any]:
    lines = _of(lines, prompts, name)
    counts = [Acceptance(**line["acceptance"]) for line in lines]
    tokens, seconds = defaultdict(int), defaultdict(float)
    for line in lines:
        tokens[line["rank"]] += len(line["tokens"])
        seconds[line["rank"]] += line["seconds"]
    return {
        **sum(counts[1:], counts[0] if counts else Acceptance()).report(),
        "num_prompts": len(lines),
        "num_tokens": sum(tokens.values()),
        "num_steps": sum(line["num_steps"] for line in lines),
        "tokens_per_second": sum(tokens[rank] / seconds[rank] for rank in tokens) or None,
    }


def _teacher_forced(lines: list[dict[str, Any]], prompts: list[Prompt], name: str) -> dict[str, Any]:
    total = None
    for line in _of(lines, prompts, name):
        values = {k: line[k] for k in ("loss_sum", "loss_tokens", "heads_loss_sum", "heads_loss_tokens")}
        one = TeacherForced(Acceptance(**line["acceptance"]), **values)
        total = one if total is None else add(total, one)
    return total.report() if total else {"main_loss": None}


def _cost(found: dict[int, dict[str, Any]], good: dict[Any, list[dict[str, Any]]]) -> dict[str, Any] | None:
    """The fitted cost of a step, what it predicts, and which number of heads is fastest, predicted and measured."""
    seconds = {}
    for run in found:
        steps = sum(line["num_steps"] for line in good[run])
        if steps:
            seconds[run] = sum(line["seconds"] - line["prefill_seconds"] for line in good[run]) / steps
    if len(seconds) < 2:
        return None
    fitted = cost.fit(seconds)
    most = max(found)
    rates = [rate or 0.0 for rate in found[most][OVERALL]["cumulative_acceptance_rate"]]
    measured = {run: (1 + sum(rates[:run])) / s for run, s in seconds.items()}
    return {
        "seconds": {"base": fitted.base, "head": fitted.head, "position": fitted.position},
        "measured_seconds_per_step": seconds,
        "predicted_seconds_per_step": {run: fitted.seconds(run) for run in range(most + 1)},
        "predicted_tokens_per_second": {run: fitted.tokens_per_second(rates, run) for run in range(most + 1)},
        "best_num_heads_predicted": fitted.best_num_heads(rates),
        "best_num_heads_measured": max(measured, key=lambda run: measured[run]),
    }


# --- what people read -------------------------------------------------------------------------------------------------


def write(summary: dict[str, Any], directory: Path) -> None:
    """acceptance.json, .txt, .png, .html and TensorBoard events; each file appears whole or not at all."""
    text, picture = table(summary), draw(summary)
    files = {
        "acceptance.json": json.dumps(summary, indent=1).encode(),
        "acceptance.txt": text.encode(),
        "acceptance.png": picture,
        "acceptance.html": page(summary, text, picture).encode(),
    }
    for name, data in files.items():
        with written_whole(directory / name) as file:
            file.write(data)
    to_tensorboard(summary, directory)


def _percent(rates: list[float | None]) -> str:
    return " ".join("   -" if rate is None else f"{100 * rate:4.0f}" for rate in rates)


def table(summary: dict[str, Any]) -> str:
    """The runs for a terminal; the main head's loss first."""
    forced = summary["teacher_forced"]
    lines = []
    if forced["main_loss"] is not None:
        lines += [
            f"main head's loss on the prompts: {forced['main_loss']:.4f} nats a token",
            f"teacher-forced CAR (%):          {_percent(forced['cumulative_acceptance_rate'])}",
            "",
        ]
    lines.append(
        f"{'heads':>5} {'drafts':>8} {'length':>7} {'tokens/s':>9} {'x plain':>8} {'x 1 head':>8}  AR | CAR (%) by head"
    )
    for run in summary["runs"]:
        numbers = [run["acceptance_length"], run["tokens_per_second"]]
        numbers += [run["speedup_vs_autoregressive"], run["speedup_vs_one_head"]]
        shown = ["-" if x is None else f"{x:.{d}f}" for x, d in zip(numbers, (3, 0, 2, 2), strict=True)]
        rates = f"{_percent(run['acceptance_rate'])} | {_percent(run['cumulative_acceptance_rate'])}"
        front = f"{run['num_heads']:>5} {run['num_drafts']:>8} {shown[0]:>7} {shown[1]:>9} {shown[2]:>8} {shown[3]:>8}"
        lines.append(f"{front}  {rates}")
    if step := summary["step_cost"]:
        lines += [
            "",
            f"fastest number of heads: {step['best_num_heads_predicted']} by the cost model, "
            f"{step['best_num_heads_measured']} among those measured",
        ]
    if summary["failed_prompts"]:
        lines += ["", f"{len(summary['failed_prompts'])} bad prompts, for example {summary['failed_prompts'][0]}"]
    if not summary["complete"]:
        lines += ["", f"{summary['num_missing']} results are missing: run the same command again."]
    return "\n".join(lines) + "\n"


def draw(summary: dict[str, Any]) -> bytes:
    """AR and CAR by head with their intervals, and speedup by number of heads, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    runs = [run for run in summary["runs"] if run["num_heads"]]
    if runs:
        run = max(runs, key=lambda run: run["num_heads"])
        for axis, name, title in (
            (axes[0], "acceptance_rate", "AR: accepted, if reached"),
            (axes[1], "cumulative_acceptance_rate", "CAR: accepted with all before"),
        ):
            bars = [(k, r, i) for k, (r, i) in enumerate(zip(run[name], run[name + "_interval"], strict=True), 1) if i]
            for k, rate, (low, high) in bars:
                axis.bar(k, 100 * rate, color="C0")
                axis.errorbar(k, 100 * rate, [[100 * (rate - low)], [100 * (high - rate)]], color="black", capsize=3)
            axis.set(title=title, xlabel="head", ylabel="%", ylim=(0, 105))
            axis.set_xticks(range(1, run["num_heads"] + 1))
    speeds = [(r["num_heads"], r["speedup_vs_autoregressive"]) for r in summary["runs"]]
    speeds = [(k, s) for k, s in speeds if s is not None]
    if speeds:
        axes[2].plot(*zip(*speeds, strict=True), "o-", label="measured")
    if step := summary["step_cost"]:
        predicted = step["predicted_tokens_per_second"]
        axes[2].plot(list(predicted), [p / predicted[0] for p in predicted.values()], ":", label="cost model")
    axes[2].set(title="Speedup over plain decoding", xlabel="heads", ylabel="x")
    axes[2].axhline(1.0, color="grey", linewidth=0.8)
    axes[2].legend()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()


def to_tensorboard(summary: dict[str, Any], directory: Path) -> None:
    """The same numbers as scalars at the checkpoint's iteration, so that the checkpoints of a run make curves."""
    from torch.utils.tensorboard import SummaryWriter

    step = summary["settings"]["iteration"]
    step = step if isinstance(step, int) else 0
    with SummaryWriter(str(directory / "tensorboard")) as writer:
        for run in summary["runs"]:
            prefix = f"acceptance/{run['num_heads']} heads"
            for name in ("acceptance_length", "tokens_per_second", "speedup_vs_autoregressive"):
                if run[name] is not None:
                    writer.add_scalar(f"{prefix}/{name}", run[name], step)
            for short, name in (("AR", "acceptance_rate"), ("CAR", "cumulative_acceptance_rate")):
                for k, rate in enumerate(run[name], 1):
                    if rate is not None:
                        writer.add_scalar(f"{prefix}/{short} {k}", rate, step)
        if summary["teacher_forced"]["main_loss"] is not None:
            writer.add_scalar("acceptance/main loss", summary["teacher_forced"]["main_loss"], step)
        writer.add_text("acceptance", f"```\n{table(summary)}\n```", step)


def page(summary: dict[str, Any], text: str, picture: bytes) -> str:
    """One file of HTML that needs nothing else."""
    image = base64.b64encode(picture).decode()
    details = html.escape(json.dumps(summary, indent=1))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Acceptance</title>'
        "<style>body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
        "pre{overflow:auto;background:#f6f6f6;padding:1em}img{max-width:100%}</style>"
        f"<h1>Acceptance of {html.escape(summary['settings']['checkpoint'])}</h1>"
        f'<pre>{html.escape(text)}</pre><img alt="rates and speedup" src="data:image/png;base64,{image}">'
        f"<details><summary>All numbers</summary><pre>{details}</pre></details></html>\n"
    )
